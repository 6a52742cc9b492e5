"""Contexts that commands run in: `quiet` silences libraries, `interruptible` handles Ctrl-C and SIGTERM."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from atp_tune import system
from atp_tune.cli.terminal import console
from atp_tune.system import silenced

STOPS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"


@contextmanager
def quiet(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Silences the logs and warnings of libraries; their exceptions still reach the caller.

    Log messages of this package go to `tell`, by default the console.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    own, words = logging.getLogger("atp_tune"), Words(tell or console.print)
    own.addHandler(words)
    try:
        with silenced():
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

    A second SIGTERM is ignored, since Slurm sends several.
    """
    stops = stops or STOPS

    def once() -> None:
        for stop in stops:
            signal.signal(stop, signal.SIG_DFL if stop == signal.SIGINT else signal.SIG_IGN)
        if console.is_terminal:
            with suppress(OSError, ValueError):  # not by `console`, which may be writing just now
                os.write(console.file.fileno(), SHOW_CURSOR)

    with system.interruptible(*stops, once=once):
        yield
