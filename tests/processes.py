"""Processes that tests start: each has ended, and its pipes are closed, when its test is over, even if it failed."""

import atexit
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

_scopes = [ExitStack()]  # of what outlives a test, and of the test that runs
atexit.register(_scopes[0].close)


@contextmanager
def scope() -> Iterator[None]:
    """What is started within it ends with it."""
    with ExitStack() as inner:
        _scopes.append(inner)
        inner.callback(_scopes.remove, inner)
        yield


def at_end(action: Callable[..., object], *arguments: object) -> None:
    """Has something done when the test is over, the last thing first."""
    _scopes[-1].callback(action, *arguments)


def output(*words: object, **options: Any) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(done.stdout)


def popen(command: list[str], **options: Any) -> "subprocess.Popen[Any]":
    """As `subprocess.Popen`."""
    process = subprocess.Popen(command, **options)
    at_end(end, process)
    return process


def end(process: "subprocess.Popen[Any]") -> None:
    """Kills a process if it still runs, and closes its pipes."""
    process.kill()
    with process:
        pass


def catches(process: "subprocess.Popen[Any]", number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; one that has ended, or put back the default, has none."""
    if process.poll() is not None:
        return False
    found = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
    return bool(found) and bool(int(found[1], 16) >> (number - 1) & 1)
