"""What people see of a study: trials, progress, summary, studies. Needs neither torch nor a model."""

import statistics
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atp_tune.errors import printable

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from atp_tune.cost.forecast import Forecast, Memory, Whole
    from atp_tune.results.status import Listed, Running, Status
    from atp_tune.results.summary import Rank, Summary
    from atp_tune.scores.perplexity import Change, Perplexity
    from atp_tune.serving.serve import Served, Service
    from atp_tune.sparse.provenance import Finetuned
    from atp_tune.spec.config import Config, Divergences, Scores, ZeroShot
    from atp_tune.spec.studyfile import StudyFile
    from atp_tune.trials.merging import Merged

WRAPPED = ("remark", "what", "plan")  # columns that may take several lines
LEAST = len("φ=-0.0123456")  # columns of a plan, so that no parameter is broken
WIDE = 1000  # columns: no line of a Markdown table is broken
TOLERANCE = 0.001  # relative difference of perplexities that rounding may make


class Terminal(Console):
    """A console on which nothing that a study or a file is called can move the cursor or change colours."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, each line made printable first."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


console = Terminal(soft_wrap=True, markup=False)  # paths and reasons may hold brackets


def show_summary(summary: "Summary", file: "StudyFile") -> None:
    """Dense, uniform and the best of each allocation as one Markdown table, and the commands that come next."""
    from atp_tune.results.wording import method_of, mixture_of

    sparsity = summary.sparsity or file.study.sparsity
    console.print(f"{printable(summary.name)}: {sparsity:.0%} sparsity\n", highlight=False)
    console.print(markdown(_results(summary)), highlight=False)
    console.print(
        "\n±: standard error over windows; against uniform: same pruner, same windows, error of the difference",
        style="dim", highlight=False,
    )  # fmt: skip
    best = summary.best_trial
    if best is not None:
        lowest = ", the lowest perplexity of the front; `export --trial N` takes another" if summary.front else ""
        console.print(f"best: trial {best.number}, {method_of(best)}{lowest}", highlight=False)
    if summary.front:
        console.print(f"\nPareto front\n\n{markdown(_front(summary))}\n", highlight=False)
    _show_rest(summary)
    if summary.zero_shot is not None and summary.zero_shot.mean:
        console.print(f"zero-shot accuracy: {_means(summary.zero_shot)}", highlight=False)
    if mixture := mixture_of(summary):
        console.print(mixture, highlight=False)
    if best is not None:
        _show_next(summary, file)


def _results(summary: "Summary") -> Table:
    from atp_tune.results.summary import is_uniform, score_of
    from atp_tune.results.wording import method_of
    from atp_tune.spec.config import Scores

    has_kl = "kl" in summary.goals
    kl = ("search KL", "report KL", "KL against uniform") if has_kl else ()
    table = markdown_table("method", "sparsity", "search perplexity", "report perplexity", "against uniform", *kl)
    table.add_row("dense", "0%", *_cells(summary.dense), "–", *(("0", "0", "–") if has_kl else ()))
    for trial in summary.uniforms:
        scores = Scores(search=score_of(trial), report=summary.reports.get(trial.number))
        kls = (*_cells(summary.kl(trial)), "–") if has_kl else ()
        table.add_row(method_of(trial), _zeros(trial), *_cells(scores), "–", *kls)
    for rank in summary.ranks:
        if not is_uniform(rank.trial):
            kls = (*_cells(summary.kl(rank.trial)), _change(rank.kl_against, rank)) if has_kl else ()
            change = _change(rank.against, rank)
            table.add_row(method_of(rank.trial), _zeros(rank.trial), *_cells(rank.scores), change, *kls)
    return table


def _means(found: "ZeroShot") -> str:
    """The mean accuracy of each model in one line."""
    means = ", ".join(f"{name} {mean.value:.1%}" for name, mean in found.mean.items())
    return f"{means} (mean of {len(found.tasks)} tasks; the report has them)"


def _change(against: "Change | None", rank: "Rank") -> str:
    if against is None:
        return "–"
    return f"{against}" + (" (search)" if rank.on == "search" else "")


def _front(summary: "Summary") -> Table:
    """The trials of the Pareto front, on the search text."""
    from atp_tune.results.summary import score_of
    from atp_tune.results.wording import method_of

    table = Table(box=box.MARKDOWN, header_style="")
    for column in ("trial", "method", "search perplexity", "search KL"):
        table.add_column(column, no_wrap=True)
    for trial in summary.front:
        table.add_row(str(trial.number), method_of(trial), str(score_of(trial)), str(summary.kl(trial).search))
    return table


def _zeros(trial: "FrozenTrial") -> str:
    return f"{trial.user_attrs['realised']:.2%}" if "realised" in trial.user_attrs else "–"


def markdown_table(*columns: str) -> Table:
    """An empty table for a Markdown document, see `markdown`."""
    table = Table(box=box.MARKDOWN, header_style="")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def markdown(table: Table) -> str:
    """A table as text for a Markdown document: each row is one line, however narrow the terminal is."""
    wide = Console(width=WIDE, file=StringIO())
    with wide.capture() as captured:
        wide.print(table)
    return "\n".join(line.strip() for line in captured.get().splitlines() if line.strip())


def _show_rest(summary: "Summary") -> None:
    from atp_tune.results.summary import is_uniform

    others = any(trial.values is not None and not is_uniform(trial) for trial in summary.trials)
    if summary.best_trial is not None and is_uniform(summary.best_trial) and others:
        console.print("no trial is better than uniform", highlight=False)
    screening = summary.screening
    if screening is not None and not summary.trials:
        console.print(
            f"screening: {screening.done} of {screening.total} trials are done; "
            f"they are the study {printable(screening.study)}",
            highlight=False,
        )
    if summary.total is not None and summary.done < summary.total:
        console.print(f"{summary.done} of {summary.total} trials are done", highlight=False)
    elif not summary.complete and summary.best_trial is not None and summary.best.report is None:
        console.print("the report text is not measured yet: the same command goes on", highlight=False)


def _show_next(summary: "Summary", file: "StudyFile") -> None:
    best = file.best_of(summary.name)
    if summary.best.report is not None and _is_of(best, summary.best_trial):
        config = printable(str(_short(best)))
        console.print(f"best configuration: {config}", highlight=False)
        console.print(
            f"sparse checkpoint:  python tune.py apply --config {config} --out {printable(summary.name)}-sparse",
            highlight=False,
        )


def _is_of(file: Path, trial: "FrozenTrial | None") -> bool:
    """Whether a configuration is there and of this trial: one of an earlier best may have been left."""
    from atp_tune.errors import UserError
    from atp_tune.spec.config import read_config

    try:
        return trial is not None and file.exists() and read_config(file).trial == trial.number
    except UserError:
        return False


def show_status(summary: "Summary", file: "StudyFile") -> None:
    """All trials of a study, then its summary."""
    from atp_tune.results.summary import score_of

    console.print(trials_table(summary, summary.trials))
    values = [score.value for trial in summary.trials if (score := score_of(trial)) is not None]
    if len(values) > 1:
        console.print(
            f"spread: {min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}",
            highlight=False,
        )
    show_summary(summary, file)


def trials_table(summary: "Summary", trials: "list[FrozenTrial]") -> Table:
    """Some of a study's trials, one a row."""
    from atp_tune.results.wording import remark_of

    best = summary.best_trial
    has_kl = "kl" in summary.goals
    table = _table("trial", "state", "plan", "perplexity", *(["KL"] if has_kl else []), "zeros", "s", "remark")
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        words = ("best" if is_best else "", remark_of(trial, summary))
        row = _row(trial, "; ".join(word for word in words if word))
        kl = summary.kl(trial).search
        table.add_row(*row[:4], *([f"{kl.value:.4f}" if kl else ""] if has_kl else []), *row[4:])
    return table


def _row(trial: "FrozenTrial", remark: str) -> list[str]:
    from atp_tune.results.summary import score_of
    from atp_tune.results.wording import plan_of

    attrs, score = trial.user_attrs, score_of(trial)
    value = "" if score is None else f"{score.value:.2f}"
    error = f" ± {score.stderr:.2f}" if score and "stderr" in attrs else ""
    return [
        str(trial.number),
        trial.state.name.lower(),
        plan_of(trial),
        value + error,
        f"{attrs['realised']:.2%}" if "realised" in attrs else "",
        f"{sum(attrs['seconds'].values()):.0f}" if "seconds" in attrs else "",
        remark,
    ]


def progress_line(status: "Status") -> str:
    """How far a study is, in one line: trials, best, what runs and for how long, time left."""
    from atp_tune.results.wording import duration

    done = f"[{status.done}/{status.total}]" if status.total else f"[{status.done}]"
    best, score = "no best yet", status.best and status.best.search
    if status.best and score:
        kl = status.best.kl and status.best.kl.search
        value = f"KL {kl.value:.4f}" if kl and status.objective == ("kl",) else f"{score.value:.2f}"
        best = f"best {value} (trial {status.best.trial})"
    running = [_runs(one) for one in status.running] or [_screens(status) or _idle(status)]
    left = [] if status.seconds_left is None else [f"about {duration(status.seconds_left)} left"]
    return f"{done} {', '.join([best, *running, *left])}"


def _screens(status: "Status") -> str:
    """How far the screening is, until the study's own trials begin."""
    found = status.screening
    return f"screening: {found.done} of {found.total} trials" if found and not status.trials else ""


def _runs(one: "Running") -> str:
    from atp_tune.results.wording import duration

    return f"trial {one.trial} " + ("was lost with its process" if one.lost else f"runs for {duration(one.seconds)}")


def _idle(status: "Status") -> str:
    if status.complete:
        return "complete"
    measured = status.total is not None and status.done >= status.total
    return "the report text is not measured yet" if measured else "no trial runs"


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
    from atp_tune.results.wording import duration

    table = Table(box=box.MARKDOWN, header_style="")
    for column in ("model", "zeros", "report perplexity", "against pruned"):
        table.add_column(column, no_wrap=True)
    if done.dense:
        table.add_row("dense", "", str(done.dense), "–")
    table.add_row("pruned", f"{done.zeros.before:,}", str(done.before), "–")
    table.add_row("fine-tuned", f"{done.zeros.after:,}", str(done.after), str(done.change))
    console.print(markdown(table), highlight=False)
    trained = f"{done.settings.steps} steps on {done.windows} windows of {printable(done.text.source)}"
    console.print(
        f"\n{trained}: {duration(done.seconds)}, {_gib(done.memory)} at most on {done.device}", highlight=False
    )
    console.print(f"sparse checkpoint: {out}", highlight=False)


def show_forecast(found: "Forecast") -> None:
    """What a study will cost: a trial of each pruner, the whole, memory, and what stands in the way."""
    where = {"device": "on the device", "host": "in host memory, two blocks on the device", "disk": "on disk, mapped"}
    weights = found.weights
    console.print(f"{printable(found.study)}: {found.device}, {found.dtype}\n", highlight=False)
    table = _table("trial", "tokens", "calibrate", "prune", "evaluate", "seconds")
    for trial in found.trial:
        times = trial.seconds
        parts = (times.calibrate, times.prune, times.evaluate, times.total) if times else (None,) * 4
        seconds = ["–" if part is None else f"{part:.1f}" for part in parts]
        name = trial.pruner if trial.what == "trial" else f"screening {trial.pruner}"
        table.add_row(name, f"{trial.tokens.total:,}", *seconds)
    console.print(table)
    for line in (
        f"study:   {_study_cost(found.whole)}",
        f"weights: {_gib(weights.bytes)} in {weights.blocks} blocks of up to {_gib(weights.largest_block)}, "
        f"{where[weights.residency]}",
        f"memory:  {_memory(found.memory)}",
    ):
        console.print(line, highlight=False)
    for problem in found.problems:
        console.print(f"does not fit: {problem}", style="yellow", highlight=False)


def _study_cost(whole: "Whole") -> str:
    """Trials, tokens and time of a study in one line."""
    from atp_tune.results.wording import duration

    if whole.trials is None:
        return "not known how many trials"
    tokens = "" if whole.tokens is None else f", {whole.tokens:,} tokens through the model"
    time = "" if whole.seconds is None else f", about {duration(whole.seconds)}"
    left = "" if not whole.done or whole.seconds_left is None else f" ({duration(whole.seconds_left)} left)"
    done = f"{whole.done} of " if whole.done else ""
    screened = f" after {_trials(whole.screened)} of screening" if whole.screened else ""
    return f"{done}{_trials(whole.trials)}{screened}{tokens}{time}{left}"


def _memory(memory: "Memory") -> str:
    """Peaks of host and device in one line."""
    host = f"host {_gib(memory.host)} of {_gib(memory.host_free)} ({_gib(memory.loading)} while loading)"
    if memory.device is None or memory.device_free is None:
        return host
    return f"{host}, device {_gib(memory.device)} of {_gib(memory.device_free)}"


def _gib(size: int) -> str:
    return f"{size / 1024**3:.2f} GiB"


def show_served(service: "Service", served: "Served") -> None:
    """What is served, where people look, and how workers join."""
    from atp_tune.serving.servers import host_of, is_loopback
    from atp_tune.trials.database import without_password

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
        console.print(f"{share.address}: {_trials(share.trials)}{known}{left}", highlight=False)
    found = summarise(merged.study)
    console.print(f"{out}: {_trials(len(found.trials))}, {found.done} of {found.total} done", highlight=False)
    file = found.made_from.name if found.made_from else "NAME"
    other = "" if found.name == file else f" --study-name {found.name}"
    console.print(f"go on: python tune.py --study {file}{other} --storage sqlite:///{out}", highlight=False)


def _trials(number: int) -> str:
    return f"{number} trial" + "s" * (number != 1)


def show_studies(studies: "list[Listed]") -> None:
    """Every study that can be run by name, and how far it is."""
    table = _table("study", "state", "what")
    for study in studies:
        table.add_row(study.name, _state(study), study.error or study.description)
    console.print(table)


def _state(study: "Listed") -> str:
    if study.state in ("complete", "unfinished"):
        best = f", best {study.best.value:.2f}" if study.best else ""
        return f"{study.done} of {study.total} trials{best}"
    return "see status" if study.state == "unknown" else study.state


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for column in columns:
        least = LEAST if column == "plan" else None
        table.add_column(column, overflow="fold", no_wrap=column not in WRAPPED, min_width=least)
    return table


def _cells(scores: "Scores | Divergences") -> list[str]:
    return [str(score) if score else "–" for score in (scores.search, scores.report)]


def _short(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
