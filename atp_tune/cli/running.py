"""What the long commands do around the work: progress, interruption, and the words at the end."""

import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from atp_tune.cli.display import Display
from atp_tune.cli.forecasting import show_forecast
from atp_tune.cli.runtime import STOPS, interruptible, quiet
from atp_tune.cli.summaries import show_applied, show_finetuned, show_merged, show_served
from atp_tune.cli.tables import show_summary
from atp_tune.cli.terminal import console
from atp_tune.events import unwatched
from atp_tune.spec.config import read_config
from atp_tune.spec.studyfile import StudyFile

if TYPE_CHECKING:
    import optuna

    from atp_tune.cli.worker_pool import WorkerPool
    from atp_tune.search.study_run import StudyRun
    from atp_tune.serving.serve import Service
    from atp_tune.sparse.provenance import Settings
    from atp_tune.spec.study import Text


def run_study(
    file: StudyFile, name: str | None, timeout: float | None, pool: "WorkerPool | None" = None, mix: bool = False
) -> None:
    """Runs or resumes a study with progress, in this process or by a pool of workers; the summary at the end.

    Ctrl-C and SIGTERM stop it, and the trial that ran is queued again.
    """
    from atp_tune.results.summary import summarise
    from atp_tune.search.study_run import StudyRun

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


def _driven(run: "StudyRun", pool: "WorkerPool | None", display: Display) -> "optuna.Study | None":
    from atp_tune.cli.worker_pool import Job
    from atp_tune.search.runner import finished_study, tune
    from atp_tune.search.study_run import load_existing

    if pool is None:
        return tune(run)
    study = finished_study(run)
    if study is None:
        pool(Job(run.file, run.name, None if run.timeout is None else time() + run.timeout, run.mix), display)
        study = finished_study(run) or load_existing(run)
    return study


def run_plan(file: StudyFile, name: str | None, json: bool) -> None:
    """Shows what a study will cost; with `json` as one document, and nothing else."""
    from atp_tune.cost.planning import foresee
    from atp_tune.results.status import to_json

    with quiet(), Display() as display:
        found = foresee(file, name or file.name, unwatched if json else display)
    console.print(to_json(found), highlight=False) if json else show_forecast(found)


def run_report(studies: Sequence["optuna.Study"], kind: str, out: Path) -> None:
    """Writes a report of studies as they stand."""
    from atp_tune.report import gather, write

    now = datetime.now()
    with quiet():
        write([gather(study, now) for study in studies], kind, out)


def run_apply(config: Path, out: Path, device: str, allowed: Mapping[str, bool]) -> None:
    """Writes the sparse checkpoint of a configuration, and compares its perplexity with the file's."""
    read = read_config(config)
    from atp_tune.sparse.applying import apply

    with quiet(), Display() as display:
        measured = apply(read, config.parent / read.folder, out, device, display, allowed)
    show_applied(read, measured, out)


def run_prune(file: StudyFile, parameters: dict[str, float], out: Path | None) -> None:
    """Prunes once, and prints plan and perplexity."""
    from atp_tune.sparse.applying import prune_once

    with quiet(), Display() as display:
        plan, measured = prune_once(file, parameters, out, display)
    console.print(f"{plan}, sparsity {file.study.sparsity:g}: perplexity {measured} on the report text")
    if out is not None:
        console.print(f"sparse checkpoint: {out}")


def run_finetune(
    model: Path, out: Path, text: "Text | None", report: "Text | None", settings: "Settings", device: str
) -> None:
    """Fine-tunes a sparse folder, and prints what it was worth; Ctrl-C and SIGTERM leave a file to go on from."""
    from atp_tune.sparse.finetuning import finetune

    with quiet(), interruptible(), Display() as display:
        try:
            done = finetune(model, out, text, report, settings, device, display)
        except KeyboardInterrupt:
            display.close()
            console.print(f"stopped: the same command goes on from what is in {out}.part, if a step was written down")
            sys.exit(130)
    show_finetuned(done, out)


def run_merge(places: Sequence[str], out: Path, name: str | None) -> None:
    """Unites storages of one study, and says what each of them gave."""
    from atp_tune.merging import merge

    with quiet():
        merged = merge(places, out, name)
    show_merged(merged, out)


def run_serve(service: "Service") -> None:
    """Serves until Ctrl-C or SIGTERM, and says where."""
    from atp_tune.serving.serve import serve

    told: list[int] = []
    before = {number: signal.signal(number, lambda number, _: told.append(number)) for number in STOPS}
    try:
        with quiet():
            serve(service, lambda: bool(told), lambda served: show_served(service, served), console.print)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    console.print("stopped: all that was sent is stored")
