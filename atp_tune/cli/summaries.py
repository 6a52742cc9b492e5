"""Last words of commands: where a sparse checkpoint is, what is served, what was merged, which studies there are."""

from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.terminal import console, gib, markdown, markdown_table, table, trials
from atp_tune.errors import printable

if TYPE_CHECKING:
    from atp_tune.merging import Merged
    from atp_tune.metrics.perplexity import Perplexity
    from atp_tune.results.status import Listed
    from atp_tune.serving.serve import Served, Service
    from atp_tune.sparse.provenance import Finetuned
    from atp_tune.spec.config import Config

TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


def show_applied(config: "Config", measured: "Perplexity", out: Path) -> None:
    """Where the sparse checkpoint is, and whether its perplexity is the one that was promised."""
    console.print(f"sparse checkpoint: {out}", highlight=False)
    promised = config.perplexity.report
    if promised is None:
        console.print(f"perplexity on the report text: {measured} (the configuration has none yet)", highlight=False)
        return
    change = measured.value / promised.value - 1
    console.print(
        f"perplexity on the report text: {measured}, the configuration says {promised} ({change:+.3%})",
        highlight=False,
    )
    if abs(change) > TOLERANCE:
        console.print(
            "warning: they differ by more than 0.1 %; another device, number format or number of threads?",
            style="yellow",
        )


def show_finetuned(done: "Finetuned", out: Path) -> None:
    """Perplexity before and after fine-tuning as a Markdown table, zeros, and what it took."""
    from atp_tune.results.formatting import duration

    rows = markdown_table("model", "zeros", "report perplexity", "against pruned")
    if done.dense:
        rows.add_row("dense", "", str(done.dense), "–")
    rows.add_row("pruned", f"{done.zeros.before:,}", str(done.before), "–")
    rows.add_row("fine-tuned", f"{done.zeros.after:,}", str(done.after), str(done.change))
    console.print(markdown(rows), highlight=False)
    trained = f"{done.settings.steps} steps on {done.windows} windows of {printable(done.text.source)}"
    console.print(
        f"\n{trained}: {duration(done.seconds)}, {gib(done.memory)} at most on {done.device}", highlight=False
    )
    console.print(f"sparse checkpoint: {out}", highlight=False)


def show_served(service: "Service", served: "Served") -> None:
    """What is served, where people look, and how workers join."""
    from atp_tune.serving.servers import host_of, is_loopback
    from atp_tune.storage.database import without_password

    names = served.studies if len(served.studies) <= 5 else [*served.studies[:4], f"… {len(served.studies)} studies"]
    studies = ", ".join(map(printable, names)) or "no study yet"
    name = host_of(service.listen)
    console.print(f"serving {without_password(service.address)}: {studies}", highlight=False)
    console.print(f"dashboard:    http://{name}:{served.port}", highlight=False)
    join = f"python tune.py --study NAME --storage grpc://{name}:{served.grpc_port}"
    console.print(f"workers join: {join}", highlight=False)
    if not is_loopback(service.listen):
        console.print(
            "warning: neither has a login: whoever reaches these ports can change and delete studies; "
            "docs/serving.md shows a proxy with TLS and a token", style="yellow",
        )  # fmt: skip
    console.print("Ctrl-C stops", style="dim")


def show_merged(merged: "Merged", out: Path) -> None:
    """What each storage gave to a study, and how to go on with it."""
    from atp_tune.results.summary import summarise

    for share in merged.shares:
        known = f", {share.known} of them known already" if share.known else ""
        left = f"; {share.unfinished} that run or wait are left out" if share.unfinished else ""
        console.print(f"{share.address}: {trials(share.trials)}{known}{left}", highlight=False)
    found = summarise(merged.study)
    console.print(f"{out}: {trials(len(found.trials))}, {found.done} of {found.total} done", highlight=False)
    file = found.made_from.name if found.made_from else "NAME"
    other = "" if found.name == file else f" --study-name {found.name}"
    console.print(f"go on: python tune.py --study {file}{other} --storage sqlite:///{out}", highlight=False)


def show_studies(studies: "list[Listed]") -> None:
    """Every study that can be run by name, and how far it is."""
    rows = table("study", "state", "what")
    for study in studies:
        rows.add_row(study.name, _state(study), study.error or study.description)
    console.print(rows)


def _state(study: "Listed") -> str:
    if study.state in ("complete", "unfinished"):
        best = f", best {study.best.value:.2f}" if study.best else ""
        return f"{study.done} of {study.total} trials{best}"
    return "see status" if study.state == "unknown" else study.state
