"""What a person asks of studies, and what other machines and programs take of them, and lists of what is known.

`tune.py studies`, `plugins`, `schema`, `env`, `status`, `report`, `plan`, `serve`, `merge` and `export`.
"""

import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import load_study, wrong
from atp_tune.cli.terminal import STOPS, as_json, console, echo, gib, quiet, table, trials, working
from atp_tune.errors import UserError, printable
from atp_tune.utils.system import chosen_format

if TYPE_CHECKING:
    import optuna

    from atp_tune.api.environment import MachineReport
    from atp_tune.config.studyfile import StudyFile
    from atp_tune.cost.forecast import StudyCost
    from atp_tune.results.status import Listed


def studies(*, json: bool = False) -> None:
    """List the studies in `studies/` and how far each of them is.

    Example: `python tune.py studies`
    """
    from atp_tune.config.finding import known

    entries = [study for path in known().values() for study in _listed(path)]
    if json:
        print(as_json(entries))
        return
    rows = table("study", "state", "what")
    rows.columns[0].no_wrap = False  # beside a long name the description would have no room
    for one in entries:
        state: str = "see status" if one.state == "unknown" else one.state
        if state in ("complete", "unfinished"):
            state = f"{one.done} of {one.total}" + (f", best {one.best.value:.2f}" if one.best else "")
        rows.add_row(one.name, state, one.error or one.description.removeprefix(f"{one.name}: "))
    echo(rows)


def _listed(path: Path) -> "list[Listed]":
    """The study that a study file names, then the studies that were run from it with `--study-name`."""
    from atp_tune.config.studyfile import load
    from atp_tune.results.status import Listed, listed
    from atp_tune.results.summary import summarise
    from atp_tune.storage.fingerprint import is_screening
    from atp_tune.storage.opening import find_study, names_in, open_storage

    try:
        file = load(str(path))
        db = open_storage(file.storage_url, create=False) if file.database else None
        studies = [find_study(db, name) for name in names_in(db)] if db else []
        own = {study.study_name: summarise(study) for study in studies if study and not is_screening(study)}
        rows = [listed(file, own.pop(file.name, None))]
        rows += [listed(file, one) for one in own.values() if one.made_from and one.made_from.name == file.name]
        return rows
    except UserError as error:
        return [Listed(name=path.stem, state="invalid", path=str(path), error=str(error))]


# --- `tune.py plugins`: lists the pruners, allocations, scores, sources of texts and samplers that are known.


def plugins(
    file: list[Path] | None = None,
    *,
    study: str | None = None,
    json: bool = False,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """List what a study can name: pruners, allocations, scores, sources of texts and samplers.

    They are built in, come from installed packages by entry points, or from files, whose code runs only with
    `--trust-plugins`. A pruner's settings are keys of its table in a study file, as in `--set prune.wanda.compare=row`;
    the bounds of an allocation's parameters are those at 60 % of a Llama with 32 blocks. docs/plugins.md says how to
    write one.

    Example: `python tune.py plugins`

    Example: `python tune.py plugins examples/plugins/ria.py --trust-plugins`

    Options:
        file [FILE.py]...: List the plug-ins of these files too.
        study NAME: List the plug-ins that this study names too.
    """
    from atp_tune.config.plugged import entries, named_in
    from atp_tune.plugins import ASK, registered_in

    if set_ and study is None:
        raise wrong("--set", "only with --study")
    names = []
    with quiet():
        for each in file or ():
            if not trust_plugins:
                raise UserError(f"{each}: is Python code, which is not run; read it, then allow it with {ASK}")
            names += registered_in(each)
        if study is not None:
            loaded = load_study(study, None, set_, None, trust_plugins)
            names += [(one.kind, one.short) for one in named_in(loaded.study)]
        rows = entries(names)
    if json:
        print(as_json(rows))
        return
    for kind in dict.fromkeys(entry.kind for entry in rows):
        echo(f"{kind}s" if kind != "source of texts" else "sources of texts")
        of_kind = [entry for entry in rows if entry.kind == kind]
        width = max(len(entry.name) for entry in of_kind)
        for entry in of_kind:
            source = "" if entry.origin == "built in" else f" ({entry.origin})"
            echo(f"  {entry.name:<{width}}  {entry.about}{source}")
            for setting in entry.settings:
                about = f": {setting.description}" if setting.description else ""
                echo(f"  {'':<{width}}    {setting.name} = {setting.default}, {setting.type}{about}")
            for name, (low, high) in entry.parameters.items():
                echo(f"  {'':<{width}}    {name} in [{low:.4g}, {high:.4g}]")


# --- `tune.py schema`: prints the JSON schema of study files.


def schema() -> None:
    """Print the JSON schema of study files, by which editors complete keys and mark mistakes.

    It is shipped beside the studies as `study.schema.json`. A study file names it in its first line,
    `#:schema ./study.schema.json`, which Taplo and Even Better TOML (VS Code) read.

    Example: `python tune.py schema > study.schema.json`
    """
    from atp_tune.config.studyfile import schema_text

    print(schema_text(), end="")


# --- `tune.py env`: prints what a bug report needs.


def env(*, json: bool = False) -> None:
    """Print what a bug report needs: versions, CPU, memory, GPUs, caches, and which extras are installed.

    Variables that may hold a password are left out, and the home folder is written as ~.
    `atp_tune/api/environment.py` lists the keys of the JSON document.

    Example: `python tune.py env`
    """
    from atp_tune.api.environment import environment

    machine = environment()
    if json:
        print(as_json(machine))
        return
    for name, text in _lines(machine):
        echo(f"{name and name + ':':<11}{text}")


def _lines(machine: "MachineReport") -> Iterator[tuple[str, str]]:
    yield "atp_tune", machine.atp_tune
    yield "python", f"{machine.python}, {machine.executable}"
    yield "system", machine.system
    yield "packages", _packages(machine.versions)
    missing = [name for name, packages in machine.extras.items() if None in packages.values()]
    have = {name: packages for name, packages in machine.extras.items() if name not in missing}
    yield "extras", "; ".join(f"{name} ({_packages(packages)})" for name, packages in have.items()) or "none"
    yield "", f"not installed: {', '.join(missing) or 'none'}"
    if cpu := machine.cpu:
        yield "CPU", f"{cpu.name}: {', '.join(cpu.flags) or 'instruction sets are not known'}"
        cores = f"{cpu.cores} cores, {cpu.logical} logical, {cpu.usable} usable"
        yield "", f"{cores}; torch: {cpu.torch_threads} threads, {cpu.torch_capability}"
    if memory := machine.memory:
        limit = "no limit" if memory.cgroup_limit is None else f"limit {gib(memory.cgroup_limit)}"
        yield "memory", f"{gib(memory.total)}, available {gib(memory.available)}, swap {gib(memory.swap)}"
        yield "", f"{limit} of control groups"
    if gpus := machine.gpus:
        for index, gpu in enumerate(gpus.devices):
            memory_of = f"{gib(gpu.memory)} ({gib(gpu.free)} free)"
            yield f"GPU {index}", f"{gpu.name}, {memory_of}, compute capability {gpu.capability}"
        if not gpus.devices:
            yield "GPU", "MPS" if gpus.mps else "none"
        built = gpus.built_with or "no CUDA"
        yield "", f"driver {gpus.driver or 'none'}; torch built with {built}; Triton {gpus.triton}"
    for name, folder in machine.caches.items():
        yield "cache", f"{name}: {folder.path} ({'missing' if folder.bytes is None else gib(folder.bytes)})"
    yield "variables", ", ".join(f"{name}={value}" for name, value in machine.variables.items()) or "none"
    for problem in machine.problems:
        yield "problem", problem


def _packages(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '–'}" for name, version in versions.items())


# --- `tune.py status`: shows the trials of a study.


def status(
    *,
    study: str,
    watch: bool = False,
    every: float | None = None,
    json: bool = False,
    storage: str | None = None,
    study_name: str | None = None,
    set_: list[str] | None = None,
) -> None:
    """Show the trials of a study, the best one and the range of perplexities. Works while the study runs.

    `--watch` waits for a study that does not exist yet; Ctrl-C ends it with exit code 130. Without a terminal
    it prints, each time a trial starts or ends, the trials that changed; with `--json`, the whole document on one line.
    `atp_tune/results/status.py` lists the keys of the document.

    Example: `python tune.py status --study smol --watch`

    Options:
        watch: Repeat until the study is complete.
        every SECONDS 0.1..: Seconds between two updates of `--watch`; default: 2.
    """
    if every is not None and not watch:
        raise wrong("--every", "only with --watch")
    from atp_tune.cli import tables
    from atp_tune.results.status import make_status, stored_study
    from atp_tune.results.summary import summarise

    file = load_study(study, storage, set_)
    if watch:
        tables.watch(file, study_name or file.name, every or 2, json)
        return
    summary = summarise(stored_study(file, study_name))
    print(as_json(make_status(summary, datetime.now()))) if json else tables.show_status(summary, file)


# --- `tune.py report`: writes a report of one or several studies.


def report(
    *,
    study: list[str],
    study_name: list[str] | None = None,
    format_: str | None = None,
    out: Path | None = None,
    storage: str | None = None,
    set_: list[str] | None = None,
) -> None:
    """Write a report with figures. It reads only the storage, so it works while the study runs.

    Example: `python tune.py report --study smol`

    Options:
        study NAME: Name or path of a study; several are compared.
        study_name NAME: Name in the storage: one per study, or several of one study.
        format_ FORMAT: html, md, json, png or latex; default: html.
        out FILE: Default: NAME.report.html beside the study file.
    """
    from atp_tune.report import FORMATS, check, report_name, write
    from atp_tune.report.formats import gather
    from atp_tune.results.status import stored_study

    kind = chosen_format(format_, out, FORMATS)
    # Studies with their names in the storage: none, one for each, or several of one study file.
    study_names: list[str | None] = [*(study_name or [])]
    if len(study) == 1 and study_names:
        study = study * len(study_names)
    if study_names and len(study_names) != len(study):
        raise UserError(f"--study-name: must be given once for each --study, got {len(study_names)} for {len(study)}")
    pairs = zip(study, study_names or [None] * len(study), strict=True)
    files = [(load_study(one, storage, set_), name) for one, name in pairs]
    target = out or files[0][0].beside(report_name([name or file.name for file, name in files], kind))
    check(kind, target)
    stored = [stored_study(file, name) for file, name in files]
    now = datetime.now()
    with quiet():
        write([gather(one, now) for one in stored], kind, target)
    print(printable(str(target)))


# --- `tune.py plan`: estimates what a study will cost.


def plan(
    *,
    study: str,
    json: bool = False,
    storage: str | None = None,
    study_name: str | None = None,
    device: str | None = None,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """Estimate what a study will cost before it runs: tokens, seconds, memory, and what does not fit.

    Loads the model and sends one batch of each text through three blocks, from whose seconds all others are estimated;
    nothing is stored.
    `atp_tune/cost/forecast.py` lists the keys of the JSON document.

    Example: `python tune.py plan --study smol`
    """
    show_plan(load_study(study, storage, set_, device, trust_plugins), study_name, json)


def show_plan(file: "StudyFile", study_name: str | None, json: bool = False) -> None:
    """Measures and prints the cost of a study, its trials and memory, and what does not fit; or one JSON document."""
    from atp_tune.cost.planning import foresee

    with working(json) as watch:
        forecast = foresee(file, study_name or file.name, watch)
    if json:
        echo(as_json(forecast))
        return
    where = {
        "none": "on the device",
        "cpu": "in host memory, for each worker again, two blocks on the device",
        "disk": "on disk, mapped",
    }
    weights = forecast.weights
    echo(f"{printable(forecast.study)}: {forecast.device}, {forecast.dtype}\n")
    rows = table("trial", "tokens", "calibrate", "prune", "evaluate", "seconds")
    for trial in forecast.trial:
        times = trial.seconds
        parts = (times.calibrate, times.prune, times.evaluate, times.total) if times else ()
        seconds = [f"{part:.1f}" for part in parts] or ["–"] * 4
        name = trial.pruner if trial.what == "trial" else f"screening {trial.pruner}"
        rows.add_row(name, f"{trial.tokens.total:,}", *seconds)
    echo(rows)
    memory = forecast.memory
    peaks = f"host {gib(memory.host)} of {gib(memory.host_free)} ({gib(memory.loading)} while loading)"
    if memory.device is not None and memory.device_free is not None:
        peaks += f", device {gib(memory.device)} of {gib(memory.device_free)}"
    echo(f"study:   {_study_cost(forecast.whole)}")
    blocks = f"{weights.blocks} blocks of up to {gib(weights.largest_block)}, {where[weights.offload]}"
    echo(f"weights: {gib(weights.bytes)} in {blocks}")
    echo(f"memory:  {peaks}")
    for problem in forecast.problems:
        echo(f"does not fit: {problem}", style="yellow")


def cost_beside(costs: "Sequence[StudyCost]", preset: str, other: str) -> str:
    """One line on the cost of a study, and of another preset if that is known."""
    from atp_tune.results.formatting import duration

    own, *others = costs
    line = f"{preset}: {_study_cost(own.model_copy(update={'tokens': None}))}"
    for cost in others:
        if cost.seconds is not None and own.seconds is not None:
            line += f"; --preset {other} measures {'more' if cost.seconds > own.seconds else 'less'}"
            line += f", in about {duration(cost.seconds)}"
    return line


def _study_cost(whole: "StudyCost") -> str:
    """Trials, tokens and time of a study in one line."""
    from atp_tune.results.formatting import duration

    if whole.trials is None:
        return "the number of trials is not known"
    tokens = "" if whole.tokens is None else f", {whole.tokens:,} tokens through the model"
    time = "" if whole.seconds is None else f", about {duration(whole.seconds)}"
    left = "" if not whole.done or whole.seconds_left is None else f" ({duration(whole.seconds_left)} left)"
    done = f"{whole.done} of " if whole.done else ""
    screened = f" after {trials(whole.screened)} of screening" if whole.screened else ""
    most = "at most " if whole.early_termination and whole.done < whole.trials else ""
    without = ", without the tasks of limit.min_accuracy" if whole.without_tasks else ""
    parts = (("for the gradient", whole.descents), ("to train the best plan", whole.training))
    own = " and ".join(f"{duration(seconds)} {what}" for what, seconds in parts if seconds)
    of_it = f", of which {own}" if time and own else ""
    return f"{most}{done}{trials(whole.trials)}{screened}{tokens}{time}{of_it}{left}{without}"


# --- `tune.py serve`: the dashboard, and the port for workers on other machines.


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
    from atp_tune.report import servers
    from atp_tune.storage.database import without_password

    (address, others), signals = servers.choose(study, storage), list[int]()

    # Shows the studies, the dashboard's address, and how workers join.
    def show(studies: list[str], port: int, grpc_port: int) -> None:
        named = studies if len(studies) <= 5 else [*studies[:4], f"… {len(studies)} studies"]
        name = servers.reachable_host(listen)
        echo(f"serving {without_password(address)}: {', '.join(map(printable, named)) or 'no study yet'}")
        if others:
            echo(f"not served:   {', '.join(map(printable, others))}; --study NAME serves its database")
        echo(f"dashboard:    http://{name}:{port}")
        echo(f"workers join: python tune.py --study NAME --storage grpc://{name}:{grpc_port}")
        if not servers.is_loopback(listen):
            echo(
                "warning: neither port has a login: whoever can connect can change and delete studies; "
                "docs/serving.md shows a proxy with TLS and a token", style="yellow",
            )  # fmt: skip
        echo("Ctrl-C stops", style="dim")

    before = {number: signal.signal(number, lambda number, _: signals.append(number)) for number in STOPS}
    try:
        with quiet():
            servers.serve(address, listen, (port, grpc_port), artifacts, lambda: bool(signals), show, echo)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    echo("stopped: everything that workers sent is stored")


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


# --- `tune.py export`: writes the best configuration, in one of several formats, or the trial that its options name or
# that the user chooses from a table.


@dataclass(frozen=True)
class ChoiceOptions:
    """The options that name a trial; at most one is given.

    Options:
        trial N 0..: This trial, measured in full; default: the best.
        sparsity SHARE: The point of a front that is nearest to this sparsity, as 0.5 or 50%.
        bpw BITS: The point of a front that is nearest to these bits a weight, as 4.8.
        max_increase SHARE: The sparsest plan with at most so much more perplexity than dense: 10%.
        max_perplexity NUMBER: The sparsest plan with at most this validation perplexity.
        max_kl NUMBER: The sparsest plan with at most this KL, in nats per token.
        max_drop SHARE: Of images: the sparsest plan that loses at most 1% (one point) of accuracy.
    """

    trial: int | None = None
    sparsity: str | None = None
    bpw: str | None = None
    max_increase: str | None = None
    max_perplexity: str | None = None
    max_kl: str | None = None
    max_drop: str | None = None


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
    by block, or by linear where they differ within a block. Rounded weights themselves are written by `apply --format`.

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
        format_ FORMAT: json, llm-compressor, yaml or csv; default: `--out`'s ending, else json.
        out FILE: Default: NAME.best.json beside the study file.
        json: Print the configuration; a file is written only with `--out`.
    """
    from atp_tune.config.best import read_config
    from atp_tune.config.typed import option
    from atp_tune.folders.exporting import FORMATS, write
    from atp_tune.results.status import best_config, file_as_run, stored_study
    from atp_tune.utils.cache import alone_with

    if (study is None) == (config is None):
        raise wrong("--study", "give either --study NAME or --config FILE")
    if out == Path("-"):
        raise wrong("--out", "- is no file; --json prints the configuration")
    kind = chosen_format("json" if json and format_ is None else format_, out, FORMATS)
    named = [option(name) for name, value in vars(choice).items() if value is not None]
    if config is not None and named:
        raise wrong(named[0], "only with --study")
    if json and kind != "json":
        raise wrong("--json", f"prints the configuration; leave out --format {kind}")
    ending = FORMATS[kind][0]
    if config is not None:
        target = out or (PRINTED if json else config.with_name(f"{config.name.removesuffix('.json')}{ending}"))
    else:
        file = load_study(str(study), storage, set_)
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
        notes = {  # on the parts of a configuration that a table or a recipe does not have
            "rows of a linear differ in sparsity: this has each linear's mean; `apply` writes the exact plan, and "
            "--format json has the rows (plan)": configuration.plan.by_row,
            "these are the zeros of the plan; `apply` trains the weights it keeps, which another program does not": (
                configuration.is_trained
            ),
        }
        for note, holds in notes.items():
            if holds:
                print(f"note: {note}", file=sys.stderr)
    print(configuration.to_json() if json else f"{printable(str(target))}\n", end="")
