"""`status` and `status --watch`: on a terminal, in a pipe, or as JSON."""

import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from time import sleep

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from atp_tune.cli.tables import progress_line, show_status, trials_table
from atp_tune.cli.terminal import console, echo, interruptible
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError, printable
from atp_tune.results.status import Status, TrialStatus, status_of, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import opening


def watch(file: StudyFile, name: str, every: float, as_json: bool) -> None:
    """Shows a study until it is complete, then its summary; Ctrl-C ends it with exit code 130, as it does a run.

    A terminal's alternate screen has as many trials as it has rows for; after Ctrl-C the normal screen has the last
    state. Elsewhere what changed is printed.
    """
    live = Live(console=console(), screen=True, auto_refresh=False) if console().is_terminal and not as_json else None
    changes, last, waits = Changes(as_json), None, f"study {name}: has no trials yet; waiting for it"
    try:
        with interruptible(), live or nullcontext():
            try:
                for summary in looks(file, name, every):
                    last = summary
                    if live:
                        shown = _line(waits) if summary is None else fitting(summary, datetime.now())
                        live.update(shown, refresh=True)
                    else:
                        changes.show(summary, waits)
            except KeyboardInterrupt:
                if live:  # another one would leave the terminal without its screen and cursor
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    live.stop()
                if live and last:
                    echo(fitting(last, datetime.now()))
                raise
    except KeyboardInterrupt:
        sys.exit(130)
    if last is not None and not as_json:
        show_status(last, file)


def looks(file: StudyFile, name: str, every: float) -> Iterator[Summary | None]:
    """Summaries of the study every so many seconds, until it is complete; None while it does not exist."""
    db = study = None
    while True:
        db = db or opening.open_storage(file.storage_url, create=False)
        study = study or (opening.find_study(db, name) if db else None)
        try:
            summary = summarise(study) if study else None
        except (StorageInternalError, SQLAlchemyError, KeyError) as error:
            reason = "it is gone" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(f"study {name}: cannot be read any more: {reason}") from None
        yield summary
        if summary and summary.complete:
            return
        sleep(every)


class Changes:
    """Prints the states of a study, each only if it differs from the one before: what changed of it, or JSON lines."""

    def __init__(self, as_json: bool = False) -> None:
        self._as_json = as_json
        self._said: Status | str | None = ""
        self._known: dict[int, TrialStatus] = {}

    def show(self, summary: Summary | None, waits: str = "") -> None:
        """Prints a state; nothing of a complete study, but in JSON, since its summary follows.

        `waits`: what is said, once, of a study that does not exist yet.
        """
        status = None if summary is None else status_of(summary, datetime.now())
        before, self._said = self._said, status and status.without_clock()
        if before == self._said:  # times that the clock alone changes do not count
            return
        if summary is None or status is None:
            print(waits, file=sys.stderr, flush=True) if self._as_json else echo(waits)
        elif self._as_json:
            print(to_json(status, indent=None), flush=True)
        elif not summary.complete:
            changed = {trial.number for trial in status.trials if self._known.get(trial.number) != trial}
            self._known = {trial.number: trial for trial in status.trials}
            if changed:
                echo(trials_table(summary, [trial for trial in summary.trials if trial.number in changed]))
            echo(progress_line(status))


def fitting(summary: Summary, now: datetime) -> RenderableType:
    """All trials and the progress; only the best and the last trials where the terminal has too few rows."""
    progress = _line(progress_line(status_of(summary, now)))
    for trials in _choices(summary, console().height):
        waiting = sum(trial.state == TrialState.WAITING for trial in summary.trials)
        counts = ((len(summary.trials) - len(trials) - waiting, "earlier"), (waiting, "waiting"))
        hidden = " and ".join(f"{count} {word}" for count, word in counts if count)
        more = [_line(f"and {hidden}", "dim")] if len(trials) < len(summary.trials) else []
        drawn = Group(trials_table(summary, trials), *more, progress)
        if len(console().render_lines(drawn)) <= console().height:
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


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=False, overflow="fold")
