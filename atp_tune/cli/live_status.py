"""`status`: a study looked at once, or again and again: on a screen, in a pipe, or as a JSON document per change."""

import signal
import sys
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

from atp_tune.cli.runtime import interruptible
from atp_tune.cli.tables import progress_line, show_status, trials_table
from atp_tune.cli.terminal import console
from atp_tune.errors import UserError, printable
from atp_tune.results.status import Status, TrialStatus, status_of, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.spec.studyfile import StudyFile
from atp_tune.storage import opening


def show_once(study: Study, file: StudyFile, as_json: bool) -> None:
    """The study as it stands."""
    summary = summarise(study)
    if as_json:
        print(to_json(status_of(summary, datetime.now())))
    else:
        show_status(summary, file)


def watch(file: StudyFile, name: str, every: float, as_json: bool) -> None:
    """The study until it is complete, and its summary at the end; Ctrl-C ends with exit code 130, as it does a run."""
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
    """What the study holds, every so many seconds, until it is complete; None while it is not there."""
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


class StatusView:
    """Where a study is watched, a context manager; it says something again only when it changed."""

    def __init__(self) -> None:
        self._said: Status | str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is to be put back."""

    def wait(self, text: str) -> None:
        """Says, once, that there is nothing to show yet."""
        if self.is_new(text):
            console.print(text)

    def show(self, summary: Summary) -> None:
        """Shows the study as it stands."""
        raise NotImplementedError

    def is_new(self, what: Status | str) -> bool:
        """Whether it differs from what was said last; the clock alone is no difference."""
        before, self._said = self._said, what.without_clock() if isinstance(what, Status) else what
        return before != self._said


class JsonView(StatusView):
    """JSON lines: one document per change."""

    def wait(self, text: str) -> None:
        """Says so on stderr, once."""
        if self.is_new(text):
            print(text, file=sys.stderr, flush=True)

    def show(self, summary: Summary) -> None:
        """Prints one line."""
        status = status_of(summary, datetime.now())
        if self.is_new(status):
            print(to_json(status, indent=None), flush=True)


class PipeView(StatusView):
    """A pipe or a file: per change the trials that changed; the first block has all."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, TrialStatus] = {}

    def show(self, summary: Summary) -> None:
        """Prints trials and the line of progress; of a complete study nothing, as its summary follows."""
        status = status_of(summary, datetime.now())
        if summary.complete or not self.is_new(status):
            return
        changed = {trial.number for trial in status.trials if self._known.get(trial.number) != trial}
        self._known = {trial.number: trial for trial in status.trials}
        if changed:
            console.print(trials_table(summary, [trial for trial in summary.trials if trial.number in changed]))
        console.print(progress_line(status))


class TerminalView(StatusView):
    """A terminal: its alternate screen, drawn again in place; what was last seen stays behind after Ctrl-C."""

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
        if kind is KeyboardInterrupt:  # another one now would leave the terminal without its own screen and cursor
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._live.stop()
        if kind is KeyboardInterrupt and self._last is not None:
            console.print(fitting(self._last, datetime.now()))

    def wait(self, text: str) -> None:
        """Shows one line."""
        self._live.update(_line(text), refresh=True)

    def show(self, summary: Summary) -> None:
        """Shows as many trials as there are rows for, and the line of progress."""
        self._last = summary
        self._live.update(fitting(summary, datetime.now()), refresh=True)


def fitting(summary: Summary, now: datetime) -> RenderableType:
    """The table and the line of progress in as many rows as the terminal has: else the best and the last trials."""
    progress = _line(progress_line(status_of(summary, now)))
    for trials in _choices(summary, console.height):
        hidden = _hidden(summary, trials)
        drawn = Group(trials_table(summary, trials), *([_line(hidden, "dim")] if hidden else []), progress)
        if len(console.render_lines(drawn)) <= console.height:
            return drawn
    return progress


def _choices(summary: Summary, rows: int) -> Iterator[list[FrozenTrial]]:
    """All trials, then ever fewer of those that have begun: the last ones, and before them the best."""
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
