"""`tune.py serve`, `merge` and `export`: what other machines and programs take of a study."""

import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import load_study, wrong
from atp_tune.cli.terminal import STOPS, console, echo, quiet, trials
from atp_tune.errors import printable

if TYPE_CHECKING:
    import optuna

    from atp_tune.report.servers import Served, Service


def serve(
    *,
    study: str | None = None,
    storage: str | None = None,
    listen: str = "127.0.0.1",
    port: int = 8080,
    grpc_port: int = 13000,
    artifacts: Path | None = None,
) -> None:
    """Serve Optuna's dashboard for all studies of a storage, and let workers on other machines join them.

    Without `--study` and `--storage` it serves the database in `studies/` that was changed last.

    Example: `python tune.py serve`, then `python tune.py --study smol --storage grpc://HOST:13000` on any machine

    Options:
        study NAME: Serve the storage of this study, with all studies in it.
        listen ADDRESS: 0.0.0.0 lets other machines connect.
        port 0..65535: Port of the dashboard.
        grpc_port 0..65535: Port for workers on other machines.
        artifacts DIR: Folder of the dashboard's files; default: beside the database.
    """
    from atp_tune.report.servers import choose
    from atp_tune.report.servers import serve as answer

    service = choose(study, storage, listen, port, grpc_port, artifacts)
    signals = list[int]()
    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in STOPS}
    try:
        with quiet():
            answer(service, lambda: bool(signals), lambda served: _show(service, served), echo)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    echo("stopped: everything that workers sent is stored")


def _show(service: "Service", served: "Served") -> None:
    """Prints which studies are served, the dashboard's address, and the command by which workers join."""
    from atp_tune.report.servers import is_loopback, reachable_host
    from atp_tune.storage.database import without_password

    names = served.studies if len(served.studies) <= 5 else [*served.studies[:4], f"… {len(served.studies)} studies"]
    studies = ", ".join(map(printable, names)) or "no study yet"
    name = reachable_host(service.listen)
    echo(f"serving {without_password(service.address)}: {studies}")
    if service.others:
        echo(f"not served:   {', '.join(map(printable, service.others))}; --study NAME serves its database")
    echo(f"dashboard:    http://{name}:{served.port}")
    echo(f"workers join: python tune.py --study NAME --storage grpc://{name}:{served.grpc_port}")
    if not is_loopback(service.listen):
        echo(
            "warning: neither port has a login: whoever can connect can change and delete studies; "
            "docs/serving.md shows a proxy with TLS and a token", style="yellow",
        )  # fmt: skip
    echo("Ctrl-C stops", style="dim")


# --- `tune.py merge`: copies the trials of several databases into a new one.


def merge(storages: list[str], *, out: Path, study: str | None = None) -> None:
    """Merge the trials of one study from several databases, as of machines without a shared network, into a new one.

    Example: `python tune.py merge here.db there.db --out both.db`

    Options:
        storages FILE…: Databases or storage URLs of one study.
        out FILE: The new database.
        study NAME: Name of the study; needed if the databases hold several.
    """
    from atp_tune.api.merging import merge as unite
    from atp_tune.results.summary import summarise

    with quiet():
        merged, shares = unite(storages, out, study)
    for share in shares:
        note = f", {share.known} of them known already" if share.known else ""
        left = f"; {share.unfinished} running or waiting trials are left out" if share.unfinished else ""
        echo(f"{share.address}: {trials(len(share.trials))}{note}{left}")
    summary = summarise(merged)
    echo(f"{out}: {trials(len(summary.trials))}, {summary.done} of {summary.total} done")
    file = summary.made_from.name if summary.made_from else "NAME"
    other = "" if summary.name == file else f" --study-name {summary.name}"
    echo(f"resume: python tune.py --study {file}{other} --storage sqlite:///{out}")


# --- `tune.py export`: writes the best configuration, in one of several formats.

# --- Which trial of a study `export` writes: the one that its options name, or that the user chooses from a table.


@dataclass(frozen=True)
class ChoiceOptions:
    """The options that name a trial; at most one is given.

    Options:
        trial N 0..: This trial, measured in full; default: the best.
        sparsity SHARE: The point of a front that is nearest to this sparsity, as 0.5 or 50%.
        max_increase SHARE: The sparsest plan with at most so much more perplexity than dense: 10%.
        max_perplexity NUMBER: The sparsest plan with at most this validation perplexity.
        max_kl NUMBER: The sparsest plan with at most this KL, in nats per token.
        max_drop SHARE: Of images: the sparsest plan that loses at most 1% (one point) of accuracy.
    """

    trial: int | None = None
    sparsity: str | None = None
    max_increase: str | None = None
    max_perplexity: str | None = None
    max_kl: str | None = None
    max_drop: str | None = None

    @property
    def options(self) -> list[str]:
        """The options that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def _chosen(stored: "optuna.Study", choice: ChoiceOptions, may_ask: bool) -> int | None:
    """The number of the chosen trial; None for the best. What was chosen is said in one line on stderr.

    `may_ask`: without a choice, a person chooses from the numbered points of a study over an interval of sparsities.
    UserError for a choice that the study has not.
    """
    from atp_tune.results.goals import Choice, chosen
    from atp_tune.results.summary import overview, summarise
    from atp_tune.storage.attributes import StudySnapshot

    study = StudySnapshot(stored)
    pick = chosen(study, vars(choice))
    if isinstance(pick, Choice):
        print(printable(str(pick)), file=sys.stderr)
        return pick.trial.number
    if pick is not None or not may_ask:
        return pick
    summary = summarise(study)
    if len(summary.points) < 2 or summary.best_trial is None:
        return None
    from atp_tune.cli.tables import drawn

    table = overview(summary)
    rows = [[str(row or ""), *cells] for row, cells in enumerate(table.rows)]
    echo(drawn(replace(table, head=["point", *table.head], rows=rows)))
    usual = next((k for k, point in enumerate(summary.points, 1) if point.is_best), 1)
    numbers = {str(k): point.trial.number for k, point in enumerate(summary.points, 1)}
    answer = ""
    while answer not in numbers:
        if answer:
            echo(f"  must be a number from 1 to {len(numbers)}")
        try:
            answer = console().input(f"point – 1 to {len(numbers)} ({usual}): ").strip() or str(usual)
        except EOFError:
            raise KeyboardInterrupt from None  # Ctrl-D
    number = numbers[answer]
    return None if number == summary.best_trial.number else number


PRINTED = Path("stdout")  # so that relative paths of a printed configuration start at the current folder


def export(
    *,
    study: str | None = None,
    config: Path | None = None,
    format_: str | None = None,
    out: Path | None = None,
    json: bool = False,
    choice: ChoiceOptions,
    storage: str | None = None,
    study_name: str | None = None,
    set_: list[str] | None = None,
) -> None:
    """Write the best configuration so far as a JSON file for `apply`, or in another format.

    `llm-compressor` writes a recipe for its `oneshot`. `yaml` and `csv` write a table of sparsities for your own code:
    by block, or by linear where they differ within a block. Where a study rounds weights, `gptqmodel`, `torchao` and
    `llama.cpp` write recipes too.

    A study of two objectives has no single best trial: `export` takes the trial of the Pareto front with the lowest
    perplexity, or the one that `--trial` names. A study over an interval of sparsities is asked for a point: by
    `--sparsity`, by a limit (at the upper end of the standard error), by `--trial`, or in a terminal from a table.

    Example: `python tune.py export --study smol --out best.json`

    Example: `python tune.py export --study smol --trial 3 --out third.json`

    Example: `python tune.py export --study smol-front --sparsity 0.5`

    Example: `python tune.py export --study smol-front --max-increase 10%`

    Example: `python tune.py export --config best.json --format llm-compressor`

    Options:
        config FILE: Export this configuration instead of a study's.
        format_ FORMAT: json, llm-compressor, yaml or csv, and of rounded weights gptqmodel, torchao or llama.cpp;
            default: `--out`'s ending, else json.
        out FILE: Default: NAME.best.json beside the study file.
        json: Print the configuration; a file is written only with `--out`.
    """
    from atp_tune.config.best import read_config
    from atp_tune.folders.exporting import FORMATS, write
    from atp_tune.results.status import best_config, file_as_run, stored_study
    from atp_tune.utils.cache import alone_with
    from atp_tune.utils.system import chosen_format

    if (study is None) == (config is None):
        raise wrong("--study", "give either --study NAME or --config FILE")
    if out == Path("-"):
        raise wrong("--out", "- is no file; --json prints the configuration")
    kind = chosen_format("json" if json and format_ is None else format_, out, FORMATS)
    if config is not None and choice.options:
        raise wrong(choice.options[0], "only with --study")
    if json and kind != "json":
        raise wrong("--json", f"prints the configuration; leave out --format {kind}")
    ending = FORMATS[kind][0]
    if config is not None:
        target = out or (PRINTED if json else config.with_name(f"{config.name.removesuffix('.json')}{ending}"))
    else:
        file = load_study(str(study), storage, None, set_)
        stored, name = stored_study(file, study_name), study_name or file.name
        may_ask = sys.stdin.isatty() and sys.stdout.isatty() and not json
        number = _chosen(stored, choice, may_ask)
        usual = file.best_path(name) if number is None else file.beside(f"{name}.trial-{number}.json")
        target = out or (PRINTED if json else usual.with_suffix(ending))
    with alone_with(target):  # what is known there of the same trial stays in it
        if config is not None:
            configuration = read_config(config)
            configuration = configuration.seen_from(config.parent / configuration.folder, target.parent)
        else:
            configuration = best_config(file_as_run(stored, file, bool(set_)), stored, target, number)
        if target is not PRINTED:
            write(configuration, kind, target)
    if target is not PRINTED and kind != "json":
        notes = (  # on the parts of a configuration that a table or a recipe does not have
            (
                configuration.plan.by_row,
                "rows of a linear differ in sparsity: this has each linear's mean; `apply` writes the exact plan, and "
                "--format json has the rows (plan)",
            ),
            (
                configuration.is_trained,
                "these are the zeros of the plan; `apply` trains the weights it keeps, which another program does not",
            ),
        )
        for holds, note in notes:
            if holds:
                print(f"note: {note}", file=sys.stderr)
    print(configuration.to_json() if json else f"{printable(str(target))}\n", end="")
