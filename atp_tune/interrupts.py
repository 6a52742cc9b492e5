"""Ctrl-C and SIGTERM: they raise KeyboardInterrupt, but never within a call of the storage."""

import signal
import sys
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

    Where Python swallows the exception, as in a generator that is deleted, the signal is sent again.
    """
    if current_thread() is not main_thread():
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        if in_call(frame):
            send_again(signum)
            return
        once()
        raise Interruption(signum)

    def swallowed(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Interruption):
            others(what)
            return
        for stop in stops:
            signal.signal(stop, first)
        send_again(what.exc_value.signum)

    before, others = {stop: signal.signal(stop, first) for stop in stops}, sys.unraisablehook
    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = others
        for stop, handler in before.items():
            signal.signal(stop, handler)


class Interruption(KeyboardInterrupt):
    """The exception of a signal, with the signal's number."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.signum = signum


def send_again(signum: int) -> None:
    """Sends a signal to the main thread in a moment; a real one also ends a sleep."""
    Timer(SOON, signal.pthread_kill, (main_thread().ident, signum)).start()


def in_call(frame: FrameType | None) -> bool:
    """Whether the stack is within a call of the storage, other than a `pause`.

    True also in callbacks of weak references and in finalisers, which an exception would leave half done, and in which
    Python swallows it.
    """
    while frame is not None:
        if frame.f_code is pause.__code__:
            return False
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "__del__":
            return True
        if module.startswith(("sqlalchemy.", "optuna.storages.", "optuna.study._tell", "weakref")):
            return True
        frame = frame.f_back
    return False


def pause(seconds: float) -> None:
    """Sleeps between two attempts of a call; it may be interrupted here."""
    sleep(seconds)
