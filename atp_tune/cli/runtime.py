"""What all commands run in: libraries kept quiet, and Ctrl-C and SIGTERM as one KeyboardInterrupt."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, main_thread
from types import FrameType

from atp_tune.cli.terminal import console

STOPS = (signal.SIGINT, signal.SIGTERM)
SOON = 0.02  # seconds until an interruption that would break a transaction is tried again


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
        if module == "atp_tune.storage.retry":
            return False
        frame = frame.f_back
    return False
