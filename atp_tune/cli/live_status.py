"""`status` and `status --watch`: on a terminal, in a pipe, or as JSON."""

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from datetime import datetime
from time import sleep
from types import TracebackType
from typing import Self

from optuna import Study
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from atp_tune.cli.tables import progress_line, show_status, trials_table
from atp_tune.cli.terminal import console, interruptible
from atp_tune.errors import UserError, printable
from atp_tune.results.status import Status, TrialStatus, status_of, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.spec.studyfile import StudyFile
from atp_tune.storage import opening


def show_once(study: Study, file: StudyFile, as_json: bool) -> None:
    """Prints the present state of a study."""
    summary = summarise(study)
    if as_json:
        print(to_json(status_of(summary, datetime.now())))
    else:
        show_status(summary, file)


def watch(file: StudyFile, name: str, every: float, as_json: bool) -> None:
    """Shows a study until it is complete, then its summary; Ctrl-C ends it with exit code 130, as it does a run."""
    view = JsonView() if as_json else TerminalView() if console.is_terminal else PipeView()
    try:
        with interruptible(), view:
            for summary in looks(file, name, every):
                if summary is None:
                    view.wait(f"study {name}: has no trials yet; waiting for it")
                else:
                    view.show(summary)
    except KeyboardInterrupt:
        sys.exit(130)
    if summary is not None and not as_json:
        show_status(summary, file)


def looks(file: StudyFile, name: str, every: float) -> Iterator[Summary | None]:
    """Summaries of the study every so many seconds, until it is complete; None while it does not exist."""
    db = study = None
    while True:
        db = db or opening.open_storage(file.storage_url, create=False)
        study = study or (opening.find_study(db, name) if db else None)
        summary = _read(study) if study else None
        yield summary
        if summary and summary.complete:
            return
        sleep(every)


def _read(study: Study) -> Summary:
    try:
        return summarise(study)
    except (StorageInternalError, SQLAlchemyError, KeyError) as error:
        reason = "it is gone" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"study {study.study_name}: cannot be read any more: {reason}") from None


class StatusView(ABC):
    """Prints the states of a study, each only if it differs from the one before; a context manager."""

    def __init__(self) -> None:
        self._said: Status | str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(  # noqa: B027 - a view of lines changes nothing of a terminal
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restores nothing."""

    def wait(self, text: str) -> None:
        """Prints, once, that the study does not exist yet."""
        if self.is_new(text):
            console.print(text)

    @abstractmethod
    def show(self, summary: Summary) -> None:
        """Shows the present state of the study."""

    def is_new(self, what: Status | str) -> bool:
        """Whether this differs from what was printed last; times that only the clock changes do not count."""
        before, self._said = self._said, what.without_clock() if isinstance(what, Status) else what
        return before != self._said


class JsonView(StatusView):
    """JSON lines: one document per change."""

    def wait(self, text: str) -> None:
        """Prints it to stderr, once."""
        if self.is_new(text):
            print(text, file=sys.stderr, flush=True)

    def show(self, summary: Summary) -> None:
        """Prints one line."""
        status = status_of(summary, datetime.now())
        if self.is_new(status):
            print(to_json(status, indent=None), flush=True)


class PipeView(StatusView):
    """A pipe or a file: prints all trials, then at each change those that changed."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, TrialStatus] = {}

    def show(self, summary: Summary) -> None:
        """Prints trials and the progress; nothing of a complete study, whose summary follows."""
        status = status_of(summary, datetime.now())
        if summary.complete or not self.is_new(status):
            return
        changed = {trial.number for trial in status.trials if self._known.get(trial.number) != trial}
        self._known = {trial.number: trial for trial in status.trials}
        if changed:
            console.print(trials_table(summary, [trial for trial in summary.trials if trial.number in changed]))
        console.print(progress_line(status))


class TerminalView(StatusView):
    """A terminal: redraws its alternate screen; after Ctrl-C the last state is printed to the normal screen."""

    def __init__(self) -> None:
        super().__init__()
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._last: Summary | None = None

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        if interrupted:  # another one would leave the terminal without its screen and cursor
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._live.stop()
        if interrupted and self._last is not None:
            console.print(fitting(self._last, datetime.now()))

    def wait(self, text: str) -> None:
        """Shows one line."""
        self._live.update(_line(text), refresh=True)

    def show(self, summary: Summary) -> None:
        """Shows as many trials as the terminal has rows for, and the progress."""
        self._last = summary
        self._live.update(fitting(summary, datetime.now()), refresh=True)


def fitting(summary: Summary, now: datetime) -> RenderableType:
    """All trials and the progress; only the best and the last trials where the terminal has too few rows."""
    progress = _line(progress_line(status_of(summary, now)))
    for trials in _choices(summary, console.height):
        hidden = _hidden(summary, trials)
        drawn = Group(trials_table(summary, trials), *([_line(hidden, "dim")] if hidden else []), progress)
        if len(console.render_lines(drawn)) <= console.height:
            return drawn
    return progress


def _choices(summary: Summary, rows: int) -> Iterator[list[FrozenTrial]]:
    """All trials, then the best trial with ever fewer of the last trials that have begun."""
    yield summary.trials
    begun = [trial for trial in summary.trials if trial.state != TrialState.WAITING]
    best = summary.best_trial
    for count in range(min(rows, len(begun)), 0, -1):
        last = begun[-count:]
        leads = best is not None and best.number < last[0].number
        yield [best, *last[1:]] if best is not None and leads else last


def _hidden(summary: Summary, trials: list[FrozenTrial]) -> str:
    waiting = sum(trial.state == TrialState.WAITING for trial in summary.trials)
    earlier = len(summary.trials) - len(trials) - waiting
    if len(trials) == len(summary.trials):
        return ""
    parts = [f"{count} {word}" for count, word in ((earlier, "earlier"), (waiting, "waiting")) if count]
    return f"and {' and '.join(parts)}"


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=False, overflow="fold")
