"""Progress of a call from Python: a bar in a terminal or a notebook, lines in a log."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from atp_tune.api.arguments import as_arguments
from atp_tune.events import Event, EventHandler, Message, Step, TrialEnded, TrialStarted
from atp_tune.interrupts import interruptible
from atp_tune.libraries import silenced
from atp_tune.results.formatting import best_so_far, trial_line

PAUSE = 0.3  # seconds between changes of a bar's text: a notebook without widgets keeps each of them

logger = logging.getLogger("atp_tune")


@contextmanager
def working(progress: bool) -> Iterator[EventHandler]:
    """Shows progress, silences libraries, and lets Ctrl-C interrupt; errors name arguments of Python."""
    with as_arguments(), shown(progress) as watch, silenced(), interruptible(signal.SIGINT):
        yield watch


@contextmanager
def shown(progress: bool) -> Iterator[EventHandler]:
    """A handler that logs messages and results of trials; with `progress` also a bar, or lines on stderr.

    The lines are log messages of level INFO of the logger `atp_tune`. With `progress`, where stderr is neither a
    terminal nor a notebook and the logger has no handler, they go to stderr.
    """
    if not progress:
        yield Lines(None)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without widgets, that it has none
        from tqdm.auto import tqdm
    is_shown = sys.stderr.isatty() or _is_notebook()
    bar = tqdm(total=None, disable=not is_shown, unit="trial", dynamic_ncols=True)
    own = None if is_shown or logger.hasHandlers() else logging.StreamHandler()
    level = logger.level
    if own:
        logger.addHandler(own)
        logger.setLevel(logging.INFO)
    try:
        yield Lines(bar)
    finally:
        bar.close()
        if own:
            logger.removeHandler(own)
            logger.setLevel(level)


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook; false in a terminal's IPython."""
    return "ipykernel" in sys.modules and "zmq" in sys.modules


class Lines:
    """Logs messages and results, and moves a bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._title = self._plan = ""
        self._began = self._first = monotonic()
        self._shown = 0.0
        self._said: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        match event:
            case Message(text):
                if text not in self._said:
                    logger.info(text)
                self._said.add(text)
            case TrialStarted(title, plan):
                self._title, self._plan, self._began = title, str(plan) if plan else "", monotonic()
                self._describe(title)
            case Step(phase, done, total):
                self._describe(f"{self._title}: {phase} {done}/{total}")
            case TrialEnded():
                logger.info("%s", trial_line(event, self._plan, monotonic() - self._began))
                self._advance(event)

    def _describe(self, text: str) -> None:
        now = monotonic()
        if self._bar is not None and now - self._shown > PAUSE:
            self._bar.set_description_str(text, refresh=True)
            self._shown = now

    def _advance(self, event: TrialEnded) -> None:
        if self._bar is not None:
            self._bar.total = event.total
            self._bar.n = event.done
            self._bar.set_postfix_str(best_so_far(event), refresh=True)
