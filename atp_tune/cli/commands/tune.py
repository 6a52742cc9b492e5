"""`tune.py --study NAME`: runs a study."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

import atp_tune
from atp_tune.cli.options import STUDY, Device, Overrides, Storage, StudyLabel, load_study
from atp_tune.cli.terminal import console
from atp_tune.errors import UserError

if TYPE_CHECKING:
    import optuna

    from atp_tune.cli.display import Display
    from atp_tune.cli.worker_pool import WorkerPool
    from atp_tune.search.runner import StudyRun
    from atp_tune.spec.studyfile import StudyFile


class TrackerName(StrEnum):
    """Where else trials are written to."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


class PoolEngine(StrEnum):
    """What runs the workers of a study."""

    process = "process"
    ray = "ray"


def _version(asked: bool) -> None:
    if asked:
        print(f"atp_tune {atp_tune.__version__}")
        raise typer.Exit


def run(
    context: typer.Context,
    study: Annotated[str | None, STUDY] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials of the study, over all runs.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Start no new trial after so many seconds.")
    ] = None,
    storage: Storage = None,
    study_name: StudyLabel = None,
    device: Device = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; each gets a CUDA device, or a share of the CPU cores.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="LIST", help="One worker process for each device, as in `cuda:0,cuda:1`.")
    ] = None,
    allow_device_change: Annotated[
        bool,
        typer.Option(
            "--allow-device-change",
            metavar="",
            help="Resume a study that began on another device or in another dtype.",
        ),
    ] = False,
    engine: Annotated[
        PoolEngine,
        typer.Option(metavar="ENGINE", help="process: workers run on this machine; ray: on a cluster, one per GPU."),
    ] = PoolEngine.process,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Address of the Ray cluster; default: this machine's.")
    ] = None,
    track: Annotated[
        list[TrackerName] | None,
        typer.Option(metavar="TRACKER", help="Also write trials to tensorboard, mlflow or wandb; may be repeated."),
    ] = None,
    set_: Overrides = None,
    version: Annotated[
        bool, typer.Option("--version", metavar="", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Search for the per-block sparsities at which a pruned language model has the lowest perplexity.

    `python tune.py --study smol` runs a study of a real 30-block Llama on a laptop. In each trial Optuna proposes the
    sparsities, the dense checkpoint is pruned to them, and the perplexity is measured. Each trial is stored when it
    ends; the same command resumes a study that was stopped.

    `--study smol-fast` is the same search, faster: it sets `search.screen`, `search.stopper` and `prune.statistics`,
    which the README explains. `plan` estimates the cost of a study.

    `python tune.py status --study smol` shows the trials. `python tune.py apply --config studies/smol.best.json
    --out DIR` writes the sparse checkpoint.
    """
    if context.invoked_subcommand is not None:
        return
    if study is None:
        raise typer.BadParameter("give a study, as in --study smol; `studies` lists them", param_hint="--study")
    if trials is not None:
        set_ = [*(set_ or []), f"search.trials={trials}"]
    from atp_tune.tracking import check_installed

    file = load_study(study, storage, device, set_)
    names = _devices(file.study.device, workers, devices)
    for name in names:  # a mistake is reported before anything runs
        load_study(study, storage, name, set_)
    trackers = [name.value for name in track or ()]
    check_installed(trackers)
    pool = _worker_pool(engine, names, workers, devices, ray_address)
    _run(file, study_name, timeout, pool, allow_device_change, trackers)


def _devices(device: str, workers: int | None, devices: str | None) -> list[str]:
    """The device of each worker."""
    if devices is None:
        return [device] * (workers or 1)
    listed = [name.strip() for name in devices.split(",") if name.strip()]
    if not listed or (workers is not None and workers != len(listed)):
        raise typer.BadParameter(f"names {len(listed)} devices, --workers {workers}", param_hint="--devices")
    return listed


def _worker_pool(
    engine: PoolEngine, names: list[str], workers: int | None, devices: str | None, address: str | None
) -> "WorkerPool | None":
    """The pool of workers that runs the trials; None if this process does."""
    if engine == PoolEngine.ray:
        if devices is not None:
            raise typer.BadParameter("Ray chooses them; write --workers N", param_hint="--devices")
        try:
            from atp_tune.cli.ray_engine import run_on_ray
        except ModuleNotFoundError as error:
            raise UserError(f"--engine ray: {error}; install it with: pip install 'atp-tune[ray]'") from None
        return partial(run_on_ray, count=workers, address=address or "auto")
    if address is not None:
        raise typer.BadParameter("only with --engine ray", param_hint="--ray-address")
    from atp_tune.cli.worker_pool import run_workers

    return partial(run_workers, devices=names) if len(names) > 1 else None


def _run(
    file: "StudyFile",
    name: str | None,
    timeout: float | None,
    pool: "WorkerPool | None" = None,
    mix: bool = False,
    trackers: Sequence[str] = (),
) -> None:
    """Runs or resumes a study in this process or in a pool of workers; shows its progress, then its summary.

    Ctrl-C and SIGTERM stop the study; the trial that was running is queued again.
    """
    from atp_tune.cli.display import Display
    from atp_tune.cli.runtime import interruptible, quiet
    from atp_tune.cli.tables import show_summary
    from atp_tune.results.summary import summarise
    from atp_tune.search.runner import StudyRun, load_existing
    from atp_tune.tracking.following import Follower

    with quiet(), interruptible(), Display() as display:
        run = StudyRun(file, name or file.name, timeout, display, mix=mix)
        with Follower(trackers, partial(load_existing, run), file.beside, display) as follower:
            display.listeners.append(follower)
            try:
                study = _driven(run, pool, display)
            except KeyboardInterrupt:
                display.close()
                place = file.database or "the storage"
                console.print(f"stopped: finished trials are in {place}; the same command resumes the study")
                sys.exit(130)
    if study is not None:
        show_summary(summarise(study), file)


def _driven(run: "StudyRun", pool: "WorkerPool | None", display: "Display") -> "optuna.Study | None":
    from atp_tune.cli.worker_pool import WorkerJob
    from atp_tune.search.runner import finished_study, load_existing, tune

    if pool is None:
        return tune(run)
    study = finished_study(run)
    if study is None:
        pool(WorkerJob(run.file, run.name, None if run.timeout is None else time() + run.timeout, run.mix), display)
        study = finished_study(run) or load_existing(run)
    return study
