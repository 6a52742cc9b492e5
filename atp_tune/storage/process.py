"""The process that runs a trial: its identity, whether it is alive, and its trace."""

import faulthandler
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from atp_tune.errors import UserError, printable
from atp_tune.events import Event, EventHandler, Step
from atp_tune.utils.cache import cache_dir, sha256_of_json

HEARTBEAT = 15  # seconds between heartbeats of a running trial
GRACE = 60  # seconds without a heartbeat after which a trial is lost


def identity() -> dict[str, Any]:
    """Host, process id and start time of this process, and the boot time of its host.

    Times are in seconds since 1970 by the host's clock, which may be set while the process runs.
    """
    began, booted = psutil.Process().create_time(), psutil.boot_time()
    return {"host": platform.node(), "pid": os.getpid(), "process_started": began, "booted": booted}


def is_dead(identity: Mapping[str, Any]) -> bool:
    """Whether the process ran on this host and has ended; False for processes of other hosts."""
    return _is_known(identity) and not is_alive(identity)


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether the process runs on this host; False for processes of other hosts."""
    if not _is_known(identity):
        return False
    try:
        process = psutil.Process(identity["pid"])
        began, state = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    return state != psutil.STATUS_ZOMBIE and _is_same(began, identity)


def has_rebooted(identity: Mapping[str, Any]) -> bool:
    """Whether this host was booted after the process began, or its clock was set by more than `GRACE`."""
    return abs(psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))) > GRACE


def _is_known(identity: Mapping[str, Any]) -> bool:
    return identity.get("host") == platform.node() and "pid" in identity and "process_started" in identity


def _is_same(began: float, identity: Mapping[str, Any]) -> bool:
    """Whether a process's start time is that of the identity, by the clock or by the time since boot.

    On Linux, setting the clock moves the start times of all processes, on macOS it does not.
    """
    moved = psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))
    differs = began - float(identity["process_started"])
    return min(abs(differs), abs(differs - moved)) <= 1


# --- The trace of a process: the last step of its trial, in a small file that another process of the host can read.
#
# The file is in the cache folder. A step costs a write of microseconds, to the page cache, which outlives the
# process; a row in the database would cost milliseconds. Python's faulthandler adds the signal of a crash.

WIDTH = 100  # bytes of the place; faulthandler's output follows
CRASH = re.compile(rb"^Fatal Python error: (.{1,100})", re.MULTILINE)

log = logging.getLogger(__name__)


class Trace:
    """The trace of a process, which runs one trial after another."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._last: dict[str, tuple[int, int]] = {}  # phase → its part, and the last step done

    def heard_by(self, watch: EventHandler) -> EventHandler:
        """The handler, with each `Step` written to the trace first."""

        def hear(event: Event) -> None:
            if isinstance(event, Step):
                self._write(self._place(event))
            watch(event)

        return hear

    @contextmanager
    def of(self, study: str, trial: int) -> Iterator[None]:
        """Traces one trial; the file is removed when the trial ends. If it cannot be written, there is no trace."""
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
        """`after evaluate 3 of 30`, with the part for a phase that repeats."""
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
    """The place and the crash in the trace of a process of this host; None where unknown."""
    try:
        left = _file(study, trial, pid).read_bytes()
    except (OSError, UserError):
        return None, None
    crash = CRASH.search(left[WIDTH:])
    return _text(left[:WIDTH]) or None, _text(crash[1]) if crash else None


def forget(study: str, trial: int, pid: int) -> None:
    """Removes the trace of a process of this host."""
    with suppress(OSError, UserError):
        _file(study, trial, pid).unlink(missing_ok=True)


def _file(study: str, trial: int, pid: int) -> Path:
    """The file of a trace, named by a hash: a study's name may not be a safe file name."""
    return cache_dir("running") / sha256_of_json([platform.node(), pid, study, trial])


def _text(left: bytes) -> str:
    return printable(left.decode(errors="replace").strip())


@contextmanager
def _crashes_into(file: FileIO) -> Iterator[None]:
    """Writes fatal signals to a file, unless faulthandler is in use already (pytest, Ray, a user)."""
    if faulthandler.is_enabled():
        yield
        return
    faulthandler.enable(file, all_threads=False)
    try:
        yield
    finally:
        faulthandler.disable()
