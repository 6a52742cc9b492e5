"""Contexts that commands run in: `quiet` silences libraries, `interruptible` handles Ctrl-C and SIGTERM."""

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
    """Silences the logs and warnings of libraries; their exceptions still reach the caller.

    Log messages of this package go to `tell`, by default the console.
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
    """Passes the package's log messages to a function."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Passes one message on."""
        self._tell(record.getMessage())


@contextmanager
def interruptible(*stops: signal.Signals) -> Iterator[None]:
    """Ctrl-C or SIGTERM raises KeyboardInterrupt, never within a transaction; a second Ctrl-C ends the process at once.

    An exception within a transaction of SQLAlchemy would leave the database locked and Optuna's threads waiting.
    A second SIGTERM is ignored, since Slurm sends several.
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
    """Whether the stack is within a call of the database, other than a wait between two retries.

    True in callbacks of weak references too, where Python swallows exceptions.
    """
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("sqlalchemy.", "optuna.storages.", "optuna.study._tell", "weakref")):
            return True
        if module == "atp_tune.storage.retry":
            return False
        frame = frame.f_back
    return False
