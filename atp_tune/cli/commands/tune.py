"""The command without a name: runs a study."""

import sys
from enum import StrEnum
from functools import partial
from time import time
from typing import TYPE_CHECKING, Annotated

import typer

import atp_tune
from atp_tune.cli.options import Device, Overrides, Storage, StudyLabel, load_study
from atp_tune.cli.terminal import console

if TYPE_CHECKING:
    import optuna

    from atp_tune.cli.display import Display
    from atp_tune.cli.worker_pool import WorkerPool
    from atp_tune.search.runner import StudyRun
    from atp_tune.spec.studyfile import StudyFile


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
        PoolEngine,
        typer.Option(metavar="ENGINE", help="process: workers run here; ray: on a Ray cluster, one per GPU."),
    ] = PoolEngine.process,
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The cluster; default: the one that this machine is in.")
    ] = None,
    set_: Overrides = None,
    version: Annotated[
        bool, typer.Option("--version", metavar="", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """Find how to share out sparsity over the blocks of a language model, and prune it.

    `python tune.py --study smol` tunes a real 30-block Llama on a laptop: each trial prunes the dense checkpoint as
    Optuna proposes and measures perplexity. Results are stored at once; the same command again goes on where it was.

    `--study smol-fast` is the same search with the levers for speed (`search.screen`, `search.stopper`,
    `prune.statistics`), which the README explains. `plan` tells first what a study will cost.

    `python tune.py status --study smol` shows the trials, `… apply --config studies/smol.best.json --out DIR` writes
    the sparse checkpoint.
    """
    if context.invoked_subcommand is not None:
        return
    if study is None:
        raise typer.BadParameter("which one? For example --study smol; `studies` lists them", param_hint="--study")
    if trials is not None:
        set_ = [*(set_ or []), f"search.trials={trials}"]
    file = load_study(study, storage, device, set_)
    names = _devices(file.study.device, workers, devices)
    for name in names:  # so that a mistake is told before anything runs
        load_study(study, storage, name, set_)
    pool = _worker_pool(engine, names, workers, devices, ray_address)
    _run(file, study_name, timeout, pool, allow_device_change)


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
    """Who runs the trials; None for this process alone."""
    if engine == PoolEngine.ray:
        if devices is not None:
            raise typer.BadParameter("Ray chooses them; write --workers N", param_hint="--devices")
        return _on_ray(workers, address)
    if address is not None:
        raise typer.BadParameter("only with --engine ray", param_hint="--ray-address")
    from atp_tune.cli.worker_pool import run_workers

    return partial(run_workers, devices=names) if len(names) > 1 else None


def _on_ray(workers: int | None, address: str | None) -> "WorkerPool":
    from atp_tune.errors import UserError

    try:
        from atp_tune.cli.ray_engine import run_on_ray
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: {error}; install it with: pip install 'atp-tune[ray]'") from None
    return partial(run_on_ray, count=workers, address=address or "auto")


def _run(
    file: "StudyFile", name: str | None, timeout: float | None, pool: "WorkerPool | None" = None, mix: bool = False
) -> None:
    """Runs or resumes a study with progress, in this process or by a pool of workers; the summary at the end.

    Ctrl-C and SIGTERM stop it, and the trial that ran is queued again.
    """
    from atp_tune.cli.display import Display
    from atp_tune.cli.runtime import interruptible, quiet
    from atp_tune.cli.tables import show_summary
    from atp_tune.results.summary import summarise
    from atp_tune.search.runner import StudyRun

    with quiet(), interruptible(), Display() as display:
        run = StudyRun(file, name or file.name, timeout, display, mix=mix)
        try:
            study = _driven(run, pool, display)
        except KeyboardInterrupt:
            display.close()
            console.print(
                f"stopped: finished trials are in {file.database or 'the storage'}; the same command goes on from there"
            )
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
