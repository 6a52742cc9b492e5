"""Ctrl-C and SIGTERM: they raise KeyboardInterrupt, but never within a transaction of the database."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

SOON = 0.02  # seconds until an interruption that would break a transaction is tried again


@contextmanager
def interruptible(*stops: signal.Signals, once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first of these signals raises KeyboardInterrupt outside transactions; `once` is called before.

    An exception within a transaction of SQLAlchemy would leave the database locked and Optuna's threads waiting. After
    the first signal `once` may install other handlers; those of before are back at the end. Does nothing in a thread
    that gets no signals.
    """
    if current_thread() is not main_thread():
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        if in_transaction(frame):
            Timer(SOON, signal.pthread_kill, (main_thread().ident, signum)).start()  # a real one also ends a sleep
            return
        once()
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
