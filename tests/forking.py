"""`python tune.py …` in processes that are forked from one which has imported everything: a start costs no imports."""

import multiprocessing
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, TextIO
from unittest.mock import patch

from processes import at_end

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


@cache
def ensure_preloaded() -> None:
    """Starts the process that is forked, with the places that this one imports from.

    Python 3.11 does not tell it, and what cannot be imported there is left out without a word: each command would then
    import everything itself, for seconds.
    """
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        forkserver.ensure_running()


class Forked:
    """A command in a process of its own, used as a `subprocess.Popen` of text with two pipes.

    `variables` are its whole environment; `inject` is called in the process before the command begins.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        cwd: Path | None = None,
        inject: Callable[[], None] | None = None,
    ) -> None:
        self.args = list(arguments)
        (out, to_out), (err, to_err) = CONTEXT.Pipe(duplex=False), CONTEXT.Pipe(duplex=False)
        words = (self.args, dict(variables), cwd or Path.cwd(), to_out, to_err, inject)
        ensure_preloaded()
        self._process = CONTEXT.Process(target=_run, args=words)
        self._process.start()
        to_out.close()
        to_err.close()
        self.stdout, self.stderr = _reader(out), _reader(err)
        at_end(self._end)

    def _end(self) -> None:
        self.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the number of the signal that ended it, below zero; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code when it has ended; TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it says on stdout and stderr from now on, when it has ended; TimeoutExpired after so many seconds."""
        over = monotonic() + timeout if timeout is not None else None
        said = {self.stdout: b"", self.stderr: b""}
        with selectors.DefaultSelector() as waiting:
            for stream in said:
                if not stream.closed:
                    waiting.register(stream, selectors.EVENT_READ)
            while waiting.get_map():
                ready = waiting.select(max(0.0, over - monotonic()) if over is not None else None)
                if not ready:
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    said[key.fileobj] += chunk  # type: ignore[index]
                    if not chunk:
                        waiting.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
        self.wait(max(0.0, over - monotonic()) if over is not None else None)
        return said[self.stdout].decode(), said[self.stderr].decode()


def _run(*arguments: Any) -> None:
    import preloaded  # which is there already in the process that this one is forked from, and takes seconds elsewhere

    preloaded.run(*arguments)


def _reader(pipe: Connection) -> TextIO:
    """One end of a pipe as a file of text."""
    stream = os.fdopen(os.dup(pipe.fileno()))
    pipe.close()
    return stream
