"""What the long commands do around the work: progress, interruption, and the words at the end."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Timer, main_thread
from time import time
from types import FrameType
from typing import TYPE_CHECKING

from atp_tune.cli.display import Display
from atp_tune.cli.forecasting import show_forecast
from atp_tune.cli.outcomes import show_applied, show_finetuned, show_merged, show_served
from atp_tune.cli.tables import show_summary
from atp_tune.cli.terminal import console
from atp_tune.events import unwatched
from atp_tune.spec.config import read_config
from atp_tune.spec.studyfile import StudyFile

if TYPE_CHECKING:
    import optuna

    from atp_tune.cli.crew import Crew
    from atp_tune.search.tuning import Run
    from atp_tune.serving.serve import Service
    from atp_tune.sparse.provenance import Settings
    from atp_tune.spec.study import Text

STOPS = (signal.SIGINT, signal.SIGTERM)
SOON = 0.02  # seconds until an interruption that would break a transaction is tried again


def run_study(
    file: StudyFile, name: str | None, timeout: float | None, crew: "Crew | None" = None, mix: bool = False
) -> None:
    """Runs or resumes a study with progress, in this process or by a crew; the summary at the end.

    Ctrl-C and SIGTERM stop it, and the trial that ran is queued again.
    """
    from atp_tune.results.summary import summarise
    from atp_tune.search.tuning import Run

    with quiet(), interruptible(), Display() as display:
        run = Run(file, name or file.name, timeout, display, mix=mix)
        try:
            study = _driven(run, crew, display)
        except KeyboardInterrupt:
            display.close()
            console.print(
                f"stopped: finished trials are in {file.database or 'the storage'}; the same command goes on from there"
            )
            sys.exit(130)
    if study is not None:
        show_summary(summarise(study), file)


def _driven(run: "Run", crew: "Crew | None", display: Display) -> "optuna.Study | None":
    from atp_tune.cli.crew import Job
    from atp_tune.search.tuning import begun, completed, tune

    if crew is None:
        return tune(run)
    study = completed(run)
    if study is None:
        crew(Job(run.file, run.name, None if run.timeout is None else time() + run.timeout, run.mix), display)
        study = completed(run) or begun(run)
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
    from atp_tune.trials.merging import merge

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


@contextmanager
def quiet(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Silences what libraries log for their developers; errors still come through as exceptions.

    What the package itself has to say beside the events of a run goes to `tell`, by default onto the screen.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own, words = logging.getLogger("atp_tune"), Words(tell or console.print)
    own.addHandler(words)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(words)


class Words(logging.Handler):
    """Hands on what the package logs, a line at a time."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Hands on one line."""
        self._tell(record.getMessage())


@contextmanager
def interruptible(*stops: signal.Signals) -> Iterator[None]:
    """Ctrl-C or SIGTERM raises KeyboardInterrupt once, never within a transaction; the next Ctrl-C ends the process.

    Raised in the middle of SQLAlchemy's work it would leave the database locked, and Optuna's threads waiting for it.
    A second SIGTERM does nothing: Slurm sends several.
    """
    stops = stops or STOPS

    def first(signum: int, frame: FrameType | None) -> None:
        if in_transaction(frame):
            Timer(SOON, signal.pthread_kill, (main_thread().ident, signum)).start()  # a real one also ends a sleep
            return
        for stop in stops:
            signal.signal(stop, signal.SIG_DFL if stop == signal.SIGINT else signal.SIG_IGN)
        if console.is_terminal:
            console.show_cursor()
        raise KeyboardInterrupt

    before = {stop: signal.signal(stop, first) for stop in stops}
    try:
        yield
    finally:
        for stop, handler in before.items():
            signal.signal(stop, handler)


def in_transaction(frame: FrameType | None) -> bool:
    """Whether a stack runs through the database and does not wait for it to come back, or through a callback of a weak
    reference, where Python swallows exceptions.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("sqlalchemy.", "optuna.storages.", "optuna.study._tell", "weakref")):
            return True
        if module == "atp_tune.trials.patience":
            return False
        frame = frame.f_back
    return False
