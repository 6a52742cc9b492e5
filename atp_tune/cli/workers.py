"""Several processes on one machine that run one study together, with one display: `--workers N`, `--devices A,B`.

The first loads the model and makes the study, then the others join it; each has a device of its own, or a share of the
CPU. They know of each other only through the storage, as workers on other machines do. One that dies is started again.
"""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from atp_tune.cli.display import Display, Line
from atp_tune.cli.running import interruptible, quiet
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, Note, TrialStarted
from atp_tune.studyfile import StudyFile

RESTARTS = 2  # of one worker
PATIENCE = 60  # seconds that workers have to stop after Ctrl-C

Job = tuple[StudyFile, str, float | None, bool]  # study file, the study's name, seconds to go on at most, any device


def run_workers(job: Job, devices: Sequence[str], display: Display) -> None:
    """Runs the study in one process per device, and returns when all have ended; UserError as the first one gave it."""
    workers = [Worker(job, index, devices, Line(display, f"worker {index}: ")) for index in range(len(devices))]
    workers[0].start()
    try:
        while any(worker.is_alive for worker in workers):
            _listen(workers)
            if workers[0].is_ready:
                for worker in workers:
                    worker.start_once()
    except (KeyboardInterrupt, UserError, TrialError):
        for worker in workers:
            worker.ask_to_stop()
        for worker in workers:
            worker.wait()
        raise


def _listen(workers: "list[Worker]") -> None:
    """Waits for news, and hands them on."""
    alive = {worker.news: worker for worker in workers if worker.is_alive}
    for news in connection.wait(list(alive), timeout=1):
        alive[news].listen()  # type: ignore[index]


class Worker:
    """One process, started again where it died."""

    def __init__(self, job: Job, index: int, devices: Sequence[str], line: Line) -> None:
        self.is_alive = self.is_ready = False
        self.news: Connection
        self._job, self._index, self._devices, self._line = job, index, devices, line
        self._process: Any = None
        self._starts = 0

    def start_once(self) -> None:
        """Starts it, unless it was."""
        if not self._starts:
            self.start()

    def start(self) -> None:
        """Starts the process."""
        context = get_context("spawn")
        self.news, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(self._job, self._index, self._devices, theirs))
        self._process.start()
        theirs.close()  # so that the end of the process is the end of its news
        self.is_alive = True
        self._starts += 1

    def listen(self) -> None:
        """Draws one event, or sees the process end."""
        try:
            event: Event | str = self.news.recv()
        except (EOFError, OSError):
            self._end()
            return
        if isinstance(event, str):
            raise UserError(event)
        self.is_ready = self.is_ready or isinstance(event, TrialStarted)
        self._line(event)

    def ask_to_stop(self) -> None:
        """Asks the process to stop, as Ctrl-C does."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)

    def wait(self) -> None:
        """Waits for the process to stop."""
        if self.is_alive:
            self._process.join(PATIENCE)
            self._process.kill()

    def _end(self) -> None:
        self._process.join()
        self.is_alive, self.is_ready = False, True
        self._line.hide()
        if self._process.exitcode != 0:
            self._again()

    def _again(self) -> None:
        died = f"worker {self._index} died (exit code {self._process.exitcode})"
        if self._starts > RESTARTS:
            raise TrialError(f"{died} for the {self._starts}th time; its trial is queued again by the next run")
        self._line(Note(f"{died}: it is started again"))
        self.start()


def _work(job: Job, index: int, devices: Sequence[str], news: Connection) -> None:
    """The process of one worker: a run whose events go to the parent."""
    os.setpgid(0, 0)  # Ctrl-C goes to the parent alone, which passes it on
    Thread(target=_stop_with_the_parent, daemon=True).start()
    from atp_tune.tuning import Run, tune

    file, name, timeout, mix = job
    with quiet(lambda text: news.send(Note(text))), interruptible(), suppress(KeyboardInterrupt):
        try:
            chosen = choose_device(devices[index], index, len(devices))
            study = file.study.model_copy(update={"device": chosen})
            tune(Run(replace(file, study=study), name, timeout, news.send, reports=index == 0, mix=mix))
        except (UserError, TrialError) as error:
            news.send(str(error))


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
