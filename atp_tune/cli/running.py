"""Runs a study as the options of the command line say, in this process or in a pool of workers."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

from atp_tune.cli.commands.plan import show_plan
from atp_tune.cli.options import (
    Device,
    Overrides,
    Prompts,
    Storage,
    TrustPlugins,
    checked_prompts,
    flag,
    load_study,
    option,
    wrong,
)
from atp_tune.cli.terminal import console, working
from atp_tune.extras import require

if TYPE_CHECKING:
    import optuna

    from atp_tune.cli.display import Display
    from atp_tune.cli.worker_pool import WorkerPool
    from atp_tune.run.session import Session
    from atp_tune.search.runner import StudyRun
    from atp_tune.spec.studyfile import StudyFile


class PoolEngine(StrEnum):
    """The engine that runs the workers of a study."""

    process = "process"
    ray = "ray"


class TrackerName(StrEnum):
    """The trackers that trials are written to as well."""

    tensorboard = "tensorboard"
    mlflow = "mlflow"
    wandb = "wandb"


@dataclass(frozen=True)
class RunOptions:
    """The options of a command that runs a study."""

    trials: Annotated[int | None, typer.Option(min=1, help="Number of trials of the study, over all runs.")] = None
    timeout: Annotated[float | None, option("SECONDS", "Start no new trial after so many seconds.", min=0)] = None
    storage: Storage = None
    device: Device = None
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes; each gets a CUDA device, or a share of the CPU cores.")
    ] = None
    devices: Annotated[str | None, option("LIST", "One worker process for each device, as in `cuda:0,cuda:1`.")] = None
    allow_device_change: Annotated[
        bool,
        flag("--allow-device-change", "Resume a study that began on another device or in another dtype."),
    ] = False
    engine: Annotated[
        PoolEngine,
        option("ENGINE", "process: workers run on this machine; ray: on a cluster, one per GPU."),
    ] = PoolEngine.process
    ray_address: Annotated[str | None, option("HOST:PORT", "Address of the Ray cluster; default: this machine's.")] = (
        None
    )
    track: Annotated[
        list[TrackerName] | None,
        option("TRACKER", "Also write trials to tensorboard, mlflow or wandb; may be repeated."),
    ] = None
    trust_plugins: TrustPlugins = False
    set_: Overrides = None
    prompt: Prompts = None
    dry_run: Annotated[bool, flag("--dry-run", "Print the study's cost, as `plan` does; run nothing.")] = False

    def load(self, study: str, device: str | None = None) -> "StudyFile":
        """The study file with the overrides of all options."""
        set_ = [*(self.set_ or [])]
        if self.trials is not None:
            set_.append(f"search.trials={self.trials}")
        if self.prompt:
            set_.append(f"continuations.prompts={json.dumps(checked_prompts(self.prompt), ensure_ascii=False)}")
        return load_study(study, self.storage, device or self.device, set_, self.trust_plugins)


Said = Callable[["StudyFile", "Session"], str]  # what is said of a new study, once its model is loaded


def start(study: str, options: RunOptions, study_name: str | None = None, said: Said | None = None) -> None:
    """Runs or resumes a study, or prints its cost."""
    from atp_tune.tracking.trackers import check_installed

    file = options.load(study)
    names = _devices(file.study.device, options.workers, options.devices)
    for name in names:  # a mistake is reported before anything runs
        options.load(study, name)
    trackers = [name.value for name in options.track or ()]
    check_installed(trackers)
    pool = _worker_pool(options, names)
    if options.dry_run:
        show_plan(file, study_name)
        return
    _run(file, study_name, options, pool, trackers, said)


def _devices(device: str, workers: int | None, devices: str | None) -> list[str]:
    """The device of each worker."""
    if devices is None:
        return [device] * (workers or 1)
    listed = [name.strip() for name in devices.split(",") if name.strip()]
    if not listed or (workers is not None and workers != len(listed)):
        raise wrong("--devices", f"names {len(listed)} devices, --workers {workers}")
    return listed


def _worker_pool(options: RunOptions, names: list[str]) -> "WorkerPool | None":
    """The pool of workers that runs the trials; None if this process does."""
    if options.engine == PoolEngine.ray:
        if options.devices is not None:
            raise wrong("--devices", "Ray chooses them; write --workers N")
        require("ray", "--engine ray")
        from atp_tune.cli.ray_engine import run_on_ray

        return partial(run_on_ray, count=options.workers, address=options.ray_address or "auto")
    if options.ray_address is not None:
        raise wrong("--ray-address", "only with --engine ray")
    from atp_tune.cli.worker_pool import run_workers

    return partial(run_workers, devices=names) if len(names) > 1 else None


def _run(
    file: "StudyFile",
    name: str | None,
    options: RunOptions,
    pool: "WorkerPool | None",
    trackers: Sequence[str],
    said: Said | None,
) -> None:
    """Runs or resumes a study in this process or in a pool of workers; shows its progress, then its summary.

    Ctrl-C and SIGTERM stop the study; the trial that was running is queued again.
    """
    from atp_tune.api.tuning import run_study
    from atp_tune.cli.tables import show_summary
    from atp_tune.cli.terminal import interruptible
    from atp_tune.events import Message
    from atp_tune.search.runner import StudyRun, load_existing
    from atp_tune.tracking.following import Follower

    with working() as display, interruptible():
        opened = (lambda context: display(Message(said(file, context)))) if said else None
        run = StudyRun(
            file, name or file.name, options.timeout, display, mix=options.allow_device_change, opened=opened
        )
        with Follower(trackers, partial(load_existing, run), file.beside, display) as follower:
            display.listeners.append(follower)
            try:
                result = run_study(run, partial(_in_pool, pool, display) if pool else None)
            except KeyboardInterrupt:
                display.close()
                place = file.database or "the storage"
                console.print(f"stopped: finished trials are in {place}; the same command resumes the study")
                sys.exit(130)
    if result is not None:
        show_summary(result.summary, file)


def _in_pool(pool: "WorkerPool", display: "Display", run: "StudyRun") -> "optuna.Study | None":
    """Runs a study in a pool of workers."""
    from atp_tune.cli.worker_pool import WorkerJob
    from atp_tune.search.runner import finished_study, load_existing

    pool(WorkerJob(run.file, run.name, None if run.timeout is None else time() + run.timeout, run.mix), display)
    return finished_study(run) or load_existing(run)
