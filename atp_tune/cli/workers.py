"""Workers that are processes of this machine: `--workers N`, `--devices A,B`.

Each has a device of its own, or a share of the CPU.
"""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from atp_tune.cli.display import Display
from atp_tune.cli.worker_pool import STOP_TIMEOUT, StudyWorker, WorkerJob, supervise, work
from atp_tune.events import Event


def run_workers(job: WorkerJob, display: Display, devices: Sequence[str]) -> None:
    """Runs the study in one process per device, and returns when all have ended; UserError as the first one gave it."""
    supervise([ProcessWorker(index, display, job, devices) for index in range(len(devices))], _listen)


def _listen(alive: "Sequence[ProcessWorker]") -> None:
    """Waits for news, and hands them on."""
    by_news = {worker.news: worker for worker in alive}
    for news in connection.wait(list(by_news), timeout=1):
        by_news[news].listen()  # type: ignore[index]


class ProcessWorker(StudyWorker):
    """One process."""

    def __init__(self, index: int, display: Display, job: WorkerJob, devices: Sequence[str]) -> None:
        super().__init__(index, display)
        self.news: Connection
        self._job, self._devices = job, devices
        self._process: Any = None

    def launch(self) -> None:
        """Starts the process."""
        context = get_context("spawn")
        self.news, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(self._job, self.index, self._devices, theirs))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of its news

    def listen(self) -> None:
        """Draws one event, or sees the process end."""
        try:
            event: Event | str = self.news.recv()
        except (EOFError, OSError):
            self._end()
            return
        if isinstance(event, str):
            self._process.join(STOP_TIMEOUT)
            self.ended(event)
        else:
            self.hear(event)

    def ask_to_stop(self) -> None:
        """Sends SIGINT."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGINT)

    def wait(self) -> None:
        """Waits for the process, and kills it in the end."""
        self._process.join(STOP_TIMEOUT)
        self._process.kill()

    def _end(self) -> None:
        self._process.join()
        if self._process.exitcode == 0:
            self.ended()
        else:
            self.died(f"exit code {self._process.exitcode}")


def _work(job: WorkerJob, index: int, devices: Sequence[str], news: Connection) -> None:
    """The process of one worker: a run whose events go to the parent."""
    os.setpgid(0, 0)  # Ctrl-C goes to the parent alone, which passes it on
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so does SIGTERM, which Slurm sends to every process
    Thread(target=_stop_with_the_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        error = work(job, index, choose_device(devices[index], index, len(devices)), news.send)
        if error is not None:
            news.send(error)


def _stop_with_the_parent() -> None:
    """Without the parent nobody sees the work: it stops as after Ctrl-C, and its trial is queued again."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)


def choose_device(name: str, index: int, count: int) -> str:
    """The device of one worker among `count`: CUDA devices in turn, else a share of the CPU's threads."""
    import torch

    if name == "auto" and torch.cuda.is_available():
        return f"cuda:{index}"
    if name in ("auto", "cpu"):
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    return name
