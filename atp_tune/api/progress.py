"""Progress of a call from Python: a bar in a terminal or a notebook, lines in a log."""

import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import ceil
from time import monotonic
from typing import Any

from atp_tune.api.arguments import as_arguments, as_in_python
from atp_tune.cost.remaining import Remaining
from atp_tune.events import Event, EventHandler, Message, Step, TrialEnded, TrialStarted
from atp_tune.results.formatting import best_so_far, duration, trial_line
from atp_tune.utils.system import interruptible, silenced

PAUSE = 0.3  # seconds between changes of a bar's text: a notebook without widgets keeps each of them

logger = logging.getLogger("atp_tune")


@contextmanager
def working(progress: bool) -> Iterator[EventHandler]:
    """Shows progress, silences libraries, and lets Ctrl-C interrupt; errors name arguments (`as_arguments`)."""
    with as_arguments(), shown(progress) as watch, silenced(), interruptible(signal.SIGINT):
        yield watch


@contextmanager
def shown(progress: bool) -> Iterator[EventHandler]:
    """A handler that logs messages and results of trials; with `progress` also a bar, or lines on stderr.

    The lines are log messages of level INFO of the logger `atp_tune`. With `progress`, where stderr is neither a
    terminal nor a notebook and the logger has no handler, they go to stderr.
    """
    if not progress:
        yield Lines()
        return
    # Whether this process is the kernel of a notebook; false in a terminal's IPython.
    is_shown = sys.stderr.isatty() or ("ipykernel" in sys.modules and "zmq" in sys.modules)
    lines = Lines(is_shown)
    own = None if is_shown or logger.hasHandlers() else logging.StreamHandler()
    level = logger.level
    if own:
        logger.addHandler(own)
        logger.setLevel(logging.INFO)
    try:
        yield lines
        lines.finish()
    finally:
        lines.close()
        if own:
            logger.removeHandler(own)
            logger.setLevel(level)


class Lines:
    """Logs messages and results, and moves a bar, which is made when work begins."""

    def __init__(self, has_bar: bool = False) -> None:
        self._bar: Any = None
        self._has_bar = has_bar
        self._title = self._plan = self._results = ""
        self._began = self._first = monotonic()
        self._shown = 0.0
        self._said: set[str] = set()
        self._remaining = Remaining()

    def __call__(self, event: Event) -> None:
        """Takes one event."""
        self._remaining.hear(event, monotonic())
        match event:
            case Message(text):
                if text not in self._said:
                    level = logging.WARNING if text.startswith("warning: ") else logging.INFO  # seen beside a bar too
                    logger.log(level, "%s", as_in_python(text))
                self._said.add(text)
            case TrialStarted(title, plan):
                self._title, self._plan, self._began = title, str(plan) if plan else "", monotonic()
                self._describe(title)
            case Step(phase, done, total):
                self._describe(f"{self._title}: {phase} {done}/{total}")
            case TrialEnded():
                left = self._remaining.left(monotonic())
                said = "" if left is None else f", {duration(left)} left"
                logger.info("%s", trial_line(event, self._plan, monotonic() - self._began, said))
                self._results = f"{event.done}/{event.total} {event.what}s, {best_so_far(event)}"

    def finish(self) -> None:
        """Fills the bar: all is done."""
        if self._bar is not None and self._bar.total:
            self._bar.n = self._bar.total

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def _describe(self, text: str) -> None:
        now = monotonic()
        if not self._has_bar or now - self._shown <= PAUSE:
            return
        self._shown, self._bar = now, self._bar if self._bar is not None else _new_bar()
        left, took = self._remaining.left(now), round(now - self._first)
        if left is not None:  # of the whole call
            self._bar.n, self._bar.total = took, took + ceil(left)
        eta = "" if left is None else f"ETA {timedelta(seconds=ceil(left))}"
        self._bar.set_postfix_str(", ".join(part for part in (self._results, eta) if part), refresh=False)
        self._bar.set_description_str(text, refresh=True)


def _new_bar() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without widgets, that it has none
        from tqdm.auto import tqdm
    return tqdm(total=None, dynamic_ncols=True, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
