"""Commands and their options; each hands over to a function of the package and prints what comes back."""

from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from atp_tune.cli.crew import Crew
    from atp_tune.status import Listed
    from atp_tune.studyfile import StudyFile

app = typer.Typer(
    add_completion=False, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False
)

BARE = Path(__file__).parents[1] / "prune.toml"  # what `prune` starts from without a study

StudyName = Annotated[str, typer.Option("--study", metavar="NAME", help="Name in `studies/`, or path of a .toml file.")]
StudyLabel = Annotated[
    str | None,
    typer.Option("--study-name", metavar="NAME", help="Keep the trials under another name in the storage."),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna storage URL; default: NAME.db beside the study file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key: `--set texts.search.windows=8`."),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="One JSON document on stdout, and nothing else.")]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N.")]


class Engine(StrEnum):
    """What runs the workers of a study."""

    process = "process"
    ray = "ray"


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name in `studies/`, or path of a .toml file.")
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Total for the study, over all runs.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Start no trial after this time.")
    ] = None,
    storage: Storage = None,
    study_name: StudyLabel = None,
    device: Device = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that run trials: a CUDA device each, or a share of the CPU.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="LIST", help="One process for each, as in `cuda:0,cuda:1`.")
    ] = None,
    allow_device_change: Annotated[
        bool,
        typer.Option(
            "--allow-device-change",
            metavar="",
            help="Go on though the study began on another device or in another dtype.",
        ),
    ] = False,
    engine: Annotated[
        Engine, typer.Option(metavar="ENGINE", help="process: workers run here; ray: on a Ray cluster, one per GPU.")
    ] = Engine.process,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The cluster; default: the one that this machine is in.")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Find how to share out sparsity over the blocks of a language model, and prune it.

    `python tune.py --study smol` tunes a real 30-block Llama on a laptop: each trial prunes the dense checkpoint as
    Optuna proposes and measures perplexity. Results are stored at once; the same command again goes on where it was.

    `python tune.py status --study smol` shows the trials, `… apply --config studies/smol.best.json --out DIR` writes
    the sparse checkpoint.
    """
    if context.invoked_subcommand is not None:
        return
    if study is None:
        raise typer.BadParameter("which one? For example --study smol; `studies` lists them", param_hint="--study")
    from atp_tune.cli.running import run_study

    if trials is not None:
        set_ = [*(set_ or []), f"search.trials={trials}"]
    file = _load(study, storage, device, set_)
    names = _devices(file.study.device, workers, devices)
    for name in names:  # so that a mistake is told before anything runs
        _load(study, storage, name, set_)
    crew = _crew(engine, names, workers, devices, ray_address)
    run_study(file, study_name, timeout, crew, allow_device_change)


@app.command()
def status(
    study: StudyName,
    watch: Annotated[bool, typer.Option("--watch", metavar="", help="Draw again until the study is complete.")] = False,
    every: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks of `--watch`; default: 2.")
    ] = None,
    json: Json = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Show a study's trials, the best and the spread; also while it runs.

    `--watch` waits for a study that is not there yet, and Ctrl-C ends it with exit code 130. In a pipe it prints, each
    time that a trial began or ended, what changed; with `--json` one line that holds the whole document. The
    document's keys are in `atp_tune/status.py`.

    Example: `python tune.py status --study smol --watch`
    """
    if every is not None and not watch:
        raise typer.BadParameter("only with --watch", param_hint="--every")
    from atp_tune.cli import watching

    file = _load(study, storage, None, set_)
    if watch:
        watching.watch(file, study_name or file.name, every or 2, json)
    else:
        watching.show_once(_stored(file, study_name), file, json)


@app.command()
def plan(
    study: StudyName,
    json: Json = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    device: Device = None,
    set_: Overrides = None,
) -> None:
    """Tell what a study will cost, before anything long runs: tokens, seconds, memory, and what does not fit.

    The model is loaded, and a batch of each text goes through three blocks; nothing is stored. The keys of the JSON
    document are in `atp_tune/forecast.py`.

    Example: `python tune.py plan --study smol`
    """
    from atp_tune.cli.running import run_plan

    run_plan(_load(study, storage, device, set_), study_name, json)


@app.command()
def serve(
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Serve the storage of this study, and all others in it.")
    ] = None,
    storage: Storage = None,
    listen: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the dashboard.")] = 8080,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Where workers join.")] = 13000,
    artifacts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Files that the dashboard offers; default: beside the database.")
    ] = None,
) -> None:
    """Show all studies of a storage in the browser while they run, and let workers on other machines join.

    Without `--study` and `--storage`: the database in `studies/` that was changed last.

    Example: `python tune.py serve`, then `python tune.py --study smol --storage grpc://HOST:13000` on any machine
    """
    from atp_tune.cli.running import run_serve
    from atp_tune.serving.choosing import choose

    run_serve(choose(study, storage, listen, port, grpc_port, artifacts))


@app.command()
def merge(
    storages: Annotated[list[str], typer.Argument(metavar="FILE…", help="Databases of one study, or storage URLs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The new database.")],
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name in them; needed where they hold several.")
    ] = None,
) -> None:
    """Unite what machines without a shared network have found of one study, in a new database.

    Example: `python tune.py merge here.db there.db --out both.db`
    """
    from atp_tune.cli.running import run_merge

    run_merge(storages, out, study)


@app.command()
def export(
    study: StudyName,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME.best.json beside the study.")] = None,
    json: Annotated[
        bool,
        typer.Option("--json", metavar="", help="Print the configuration; a file is written only with `--out`."),
    ] = False,
    storage: Storage = None,
    study_name: StudyLabel = None,
    set_: Overrides = None,
) -> None:
    """Write the best configuration so far as one JSON file, from which `apply` prunes.

    Example: `python tune.py export --study smol --out best.json`
    """
    from atp_tune.errors import printable
    from atp_tune.storage import check_facts
    from atp_tune.studyfile import facts
    from atp_tune.summary import best_config, made_from

    file = _load(study, storage, None, set_)
    stored = _stored(file, study_name)
    made = None if set_ else made_from(stored.user_attrs.get("made_from"))
    if made is None:  # the study does not say what it was made with, or other settings are asked for
        check_facts(stored, facts(file.study, file.folder), partly=True)
    printed = Path("stdout")  # relative paths of what is printed start where the user stands
    target = out or (printed if json else file.best_of(study_name or file.name))
    config = best_config(replace(made, path=file.path) if made else file, stored, target)
    if target is not printed:
        config.write(target)
    print(config.to_json() if json else f"{printable(str(target))}\n", end="")


@app.command()
def report(
    study: Annotated[
        list[str], typer.Option("--study", metavar="NAME", help="Name or path of a study; several are compared.")
    ],
    study_name: Annotated[
        list[str] | None,
        typer.Option(
            "--study-name", metavar="NAME", help="Name in the storage; one for each study, or several of one."
        ),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="html, md, json, png or latex; default: html.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Default: NAME.report.html beside the study.")
    ] = None,
    storage: Storage = None,
    set_: Overrides = None,
) -> None:
    """Write a report with figures, from the storage alone; also while the study runs.

    Example: `python tune.py report --study smol`
    """
    from atp_tune.cli.running import run_report
    from atp_tune.errors import printable
    from atp_tune.report import kind_of, name_of

    kind = kind_of(format_, out)
    found = [(_load(one, storage, None, set_), name) for one, name in _paired(study, study_name or [])]
    names = [name or file.name for file, name in found]
    target = out or found[0][0].beside(name_of(names, kind))
    run_report([_stored(file, name) for file, name in found], kind, target)
    print(printable(str(target)))


@app.command()
def apply(
    config: Annotated[Path, typer.Option(metavar="FILE", help="A configuration written by a run or by `export`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the sparse checkpoint; new or empty.")],
    device: Device = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", metavar="", help="Read a model's .bin weights, which are pickles.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", metavar="", help="Run the Python code in a model's folder.")
    ] = False,
) -> None:
    """Prune as a configuration says, into a folder that `from_pretrained` loads, and measure it again.

    Example: `python tune.py apply --config studies/smol.best.json --out smol-sparse`
    """
    from atp_tune.cli.running import run_apply

    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    run_apply(config, out, device or "auto", allowed)


@app.command()
def prune(
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Hub id, folder or .gguf file.")] = None,
    pruner: Annotated[str | None, typer.Option(help="magnitude, wanda, sparsegpt, dsnot or alps.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros, as in 0.7.")] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform, atp, curve, owl, alphapruning, er, erk or global; default: atp.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Common difference per block; 0 is uniform.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another parameter, as in γ=-0.1 or gamma=-0.1.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the sparse checkpoint; new or empty.")
    ] = None,
    study: Annotated[
        str | None, typer.Option(metavar="NAME", help="Take model, texts and settings from a study.")
    ] = None,
    device: Device = None,
    set_: Overrides = None,
) -> None:
    """Prune once, without a search, and print the perplexity on the report text.

    Calibration is C4 and the report text WikiText-2 test, as in the papers, unless `--study` or `--set` says else.

    Example: `python tune.py prune --study smol --beta 0.004`

    Example: `python tune.py prune --study smol --allocation owl --parameter lam=0.08`

    Example: `python tune.py prune --model meta-llama/Llama-2-7b-hf --sparsity 0.7 --beta 0.004 --out DIR`
    """
    from atp_tune.cli.running import run_prune

    if model is None and study is None:
        raise typer.BadParameter("which model? Or --study NAME, to take a study's", param_hint="--model")
    values = _parameters(beta, parameter)
    if allocation in ("atp", "curve") and not values:
        raise typer.BadParameter(f"{allocation} without any is uniform; for example --beta 0.004", param_hint="--beta")
    if model is not None and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().absolute())
    names = allocation and [allocation]
    options = {
        "model.source": model, "prune.pruners": pruner and [pruner], "allocation.names": names, "sparsity": sparsity,
    }  # fmt: skip
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    file = _load(study or str(BARE), None, device, [*named, *(set_ or [])])
    if study is None:  # relative paths start where the user stands
        file = replace(file, path=Path("prune.toml"))
    run_prune(file, values, out)


@app.command()
def studies(json: Json = False) -> None:
    """List the studies that can be run by name, with their state.

    Example: `python tune.py studies`
    """
    from atp_tune.cli.tables import show_studies
    from atp_tune.status import to_json
    from atp_tune.studyfile import known

    found = [_listed(path) for path in known()]
    print(to_json(found)) if json else show_studies(found)


def _listed(path: Path) -> "Listed":
    from atp_tune.errors import UserError
    from atp_tune.status import invalid, listed
    from atp_tune.storage import find_study, open_storage
    from atp_tune.studyfile import load
    from atp_tune.summary import summarise

    try:
        file = load(str(path))
        db = open_storage(file.storage_url, create=False) if file.database else None
        study = find_study(db, file.name) if db else None
        return listed(file, summarise(study) if study else None)
    except UserError as error:
        return invalid(path, str(error))


def _devices(device: str, workers: int | None, devices: str | None) -> list[str]:
    """The device of each worker."""
    if devices is None:
        return [device] * (workers or 1)
    listed = [name.strip() for name in devices.split(",") if name.strip()]
    if not listed or (workers is not None and workers != len(listed)):
        raise typer.BadParameter(f"names {len(listed)} devices, --workers {workers}", param_hint="--devices")
    return listed


def _crew(
    engine: Engine, names: list[str], workers: int | None, devices: str | None, address: str | None
) -> "Crew | None":
    """Who runs the trials; None for this process alone."""
    if engine == Engine.ray:
        if devices is not None:
            raise typer.BadParameter("Ray chooses them; write --workers N", param_hint="--devices")
        return _on_ray(workers, address)
    if address is not None:
        raise typer.BadParameter("only with --engine ray", param_hint="--ray-address")
    from atp_tune.cli.workers import run_workers

    return partial(run_workers, devices=names) if len(names) > 1 else None


def _on_ray(workers: int | None, address: str | None) -> "Crew":
    from atp_tune.errors import UserError

    try:
        from atp_tune.cli.ray_engine import run_on_ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: {error}; install it with: pip install 'atp-tune[ray]'") from None
    return partial(run_on_ray, count=workers, address=address or "auto")


def _parameters(beta: float | None, others: list[str] | None) -> dict[str, float]:
    from atp_tune.allocations.budget import SYMBOLS

    names = {symbol: name for name, symbol in SYMBOLS.items()}
    values = {} if beta is None else {"beta": beta}
    for text in others or []:
        symbol, _, value = text.partition("=")
        name = names.get(symbol, symbol)
        if name in values:
            raise typer.BadParameter(f"{symbol} is given twice", param_hint="--parameter")
        try:
            values[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f'"{text}" is not NAME=NUMBER', param_hint="--parameter") from None
    return values


def _paired(studies: list[str], names: list[str]) -> list[tuple[str, str | None]]:
    """Studies with their names in the storage: none, one for each, or several of one study file."""
    from atp_tune.errors import UserError

    if len(studies) == 1 and names:
        return [(studies[0], name) for name in names]
    if names and len(names) != len(studies):
        raise UserError(f"--study-name: must be given once for each --study, got {len(names)} for {len(studies)}")
    return [(study, names[index] if names else None) for index, study in enumerate(studies)]


def _load(study: str, storage: str | None, device: str | None, set_: list[str] | None) -> "StudyFile":
    from atp_tune.studyfile import absolute_storage, load

    place = absolute_storage(storage, Path()) if storage else None
    options: dict[str, Any] = {"storage": place, "device": device}
    named = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load(study, [*(set_ or []), *named])


def _stored(file: "StudyFile", study_name: str | None) -> Any:
    from atp_tune.errors import UserError
    from atp_tune.storage import find_study, open_storage

    db = open_storage(file.storage_url, create=False)
    study = find_study(db, study_name or file.name) if db else None
    if study is None:
        other = f" --study-name {study_name}" if study_name else ""
        raise UserError(
            f"study {study_name or file.name}: has no trials yet; run: python tune.py --study {file.name}{other}"
        )
    return study
