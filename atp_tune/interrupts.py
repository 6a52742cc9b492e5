"""Ctrl-C and SIGTERM: they raise KeyboardInterrupt, but never within a call of the storage."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from time import sleep
from types import FrameType

SOON = 0.02  # seconds until an interruption that would break a call is tried again


@contextmanager
def interruptible(*stops: signal.Signals, once: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first of these signals raises KeyboardInterrupt outside calls of the storage; `once` is called before.

    An exception within a transaction of SQLAlchemy would leave the database locked and Optuna's threads waiting; within
    a request of gRPC, a channel whose next request may never be answered. After the first signal `once` may install
    other handlers; those of before are back at the end. Does nothing in a thread that gets no signals.
    """
    if current_thread() is not main_thread():
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        if in_call(frame):
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


def in_call(frame: FrameType | None) -> bool:
    """Whether the stack is within a call of the storage, other than a `pause`.

    True in callbacks of weak references too, where Python swallows exceptions.
    """
    while frame is not None:
        if frame.f_code is pause.__code__:
            return False
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("sqlalchemy.", "optuna.storages.", "optuna.study._tell", "weakref")):
            return True
        frame = frame.f_back
    return False


def pause(seconds: float) -> None:
    """Sleeps between two attempts of a call; it may be interrupted here."""
    sleep(seconds)
