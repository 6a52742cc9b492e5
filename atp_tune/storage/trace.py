"""Where the trial of a process is, in a small file that outlives the process: the next one on its host reads it.

It lies in the cache, and a step is a write of microseconds into the system's page cache, which survives the process; a
row in a database would take milliseconds of each step. Python's faulthandler adds the signal by which the process ends
itself, if it does.
"""

import faulthandler
import logging
import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from atp_tune.cache import cache_dir, sha256_of_json
from atp_tune.errors import UserError, printable
from atp_tune.events import Event, EventHandler, Step

WIDTH = 100  # bytes of the place, before what faulthandler writes
CRASH = re.compile(rb"^Fatal Python error: (.{1,100})", re.MULTILINE)

log = logging.getLogger(__name__)


class Trace:
    """The trace of a process, which runs one trial after another."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._last: dict[str, tuple[int, int]] = {}  # phase → part of it, and the step that was done last

    def heard_by(self, watch: EventHandler) -> EventHandler:
        """The same watch, with each step of a trial written down before it is told."""

        def hear(event: Event) -> None:
            if isinstance(event, Step):
                self._write(self._place(event))
            watch(event)

        return hear

    @contextmanager
    def of(self, study: str, trial: int) -> Iterator[None]:
        """Follows one trial; the file is gone when it ends. Where there can be none its places will not be known."""
        with ExitStack() as stack:
            try:
                file = _file(study, trial, os.getpid())
                stack.callback(file.unlink, missing_ok=True)
                self._file = stack.enter_context(FileIO(file, "w"))
                stack.enter_context(_crashes_into(self._file))
            except (OSError, UserError) as error:
                log.debug("no trace of trial %d: %s", trial, error)
            self._last.clear()
            self._write("at its beginning")
            try:
                yield
            finally:
                self._file = None

    def _place(self, step: Step) -> str:
        """`after evaluate 3 of 30`; of a phase that is gone through several times, which time it is."""
        part, done = self._last.get(step.phase, (1, 0))
        part += step.done <= done
        self._last[step.phase] = part, step.done
        return f"after {step.phase} {step.done} of {step.total}" + (f", part {part}" if part > 1 else "")

    def _write(self, place: str) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # a full disk
            self._file.seek(0)
            self._file.write(place.encode()[:WIDTH].ljust(WIDTH))


def left_of(study: str, trial: int, pid: int) -> tuple[str | None, str | None]:
    """What a process of this host left of a trial that it ran: the place, and its crash; None where it left none."""
    try:
        left = _file(study, trial, pid).read_bytes()
    except (OSError, UserError):
        return None, None
    crash = CRASH.search(left[WIDTH:])
    return _text(left[:WIDTH]) or None, _text(crash[1]) if crash else None


def forget(study: str, trial: int, pid: int) -> None:
    """Removes what a process of this host left of a trial."""
    with suppress(OSError, UserError):
        _file(study, trial, pid).unlink(missing_ok=True)


def _file(study: str, trial: int, pid: int) -> Path:
    """Named by a hash: a study's name may be a stranger's."""
    return cache_dir("running") / sha256_of_json([platform.node(), pid, study, trial])


def _text(left: bytes) -> str:
    return printable(left.decode(errors="replace").strip())


@contextmanager
def _crashes_into(file: FileIO) -> Iterator[None]:
    """Has fatal signals written into a file, unless something else has asked for them: pytest, Ray, a person."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(file, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()
