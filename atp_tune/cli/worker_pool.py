"""Several workers that run one study together under one display: processes of this machine, or tasks of a Ray cluster.

The first loads the model and makes the study, then the others join it. They know of each other only through the
storage, as workers that were started by hand do. One that dies is started again. A process (`--workers N`, `--devices
A,B`) has a device of its own, or a share of the CPU; `ray_engine` has the tasks.
"""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from threading import Thread
from time import time
from typing import Any, TypeVar

from atp_tune.cli.display import Display, Line
from atp_tune.cli.runtime import interruptible, quiet
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, EventHandler, Message, TrialStarted
from atp_tune.spec.studyfile import StudyFile

RESTARTS = 2  # of one worker that does not come as far as a trial; those whose trials end them are given up
STOP_TIMEOUT = 60  # seconds that workers have to stop after Ctrl-C


@dataclass(frozen=True)
class WorkerJob:
    """What every worker is given: the study file, the study's name, when to start no more (seconds since 1970), and
    whether devices and number formats may be mixed.
    """

    file: StudyFile
    name: str
    end: float | None
    mix: bool = False


WorkerPool = Callable[[WorkerJob, Display], None]


class StudyWorker(ABC):
    """One worker, started again where it died."""

    def __init__(self, index: int, display: Display) -> None:
        self.index = index
        self.is_alive = self.is_ready = False
        self._line = Line(display, f"worker {index}: ")
        self._deaths = 0
        self._was_started = False

    @abstractmethod
    def launch(self) -> None:
        """Sets it to work."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Asks it to stop, as Ctrl-C does."""

    @abstractmethod
    def wait(self) -> None:
        """Waits until it has stopped, for a while."""

    def start_once(self) -> None:
        """Starts it, unless it was."""
        if not self._was_started:
            self._start()

    def hear(self, event: Event) -> None:
        """Draws one event."""
        self.is_ready = self.is_ready or isinstance(event, TrialStarted)
        if isinstance(event, TrialStarted) and event.number is not None:
            self._deaths = 0
        self._line(event)

    def ended(self, error: str | None = None) -> None:
        """It has ended, as it should; UserError if it could not run."""
        self.is_alive, self.is_ready = False, True
        self._line.hide()
        if error is not None:
            raise UserError(error)

    def died(self, how: str, counts: bool = True) -> None:
        """It is gone without an answer: it is started again, unless that happens again and again."""
        self.ended()
        self._deaths += counts
        if self._deaths > RESTARTS:
            times = f"worker {self.index} died ({how}) {self._deaths} times in a row"
            raise TrialError(f"{times}; its trial is queued again by the next run")
        self._line(Message(f"worker {self.index} died ({how}): it is started again"))
        self._start()

    def _start(self) -> None:
        self._was_started = self.is_alive = True
        self.launch()


AnyWorker = TypeVar("AnyWorker", bound=StudyWorker)


def supervise(workers: Sequence[AnyWorker], listen: Callable[[Sequence[AnyWorker]], None]) -> None:
    """Starts the workers and returns when all have ended; `listen` waits a moment for news of those that live."""
    workers[0].start_once()
    try:
        while alive := [worker for worker in workers if worker.is_alive]:
            listen(alive)
            if workers[0].is_ready:
                for worker in workers:
                    worker.start_once()
    finally:
        left = [worker for worker in workers if worker.is_alive]
        for worker in left:
            worker.ask_to_stop()
        for worker in left:
            worker.wait()


def work(job: WorkerJob, index: int, device: str, tell: EventHandler) -> str | None:
    """What a worker does: a run whose events go to `tell`, until SIGINT; the reason if it could not run."""
    from atp_tune.search.runner import StudyRun, tune

    timeout = None if job.end is None else job.end - time()
    file = replace(job.file, study=job.file.study.model_copy(update={"device": device}))
    with quiet(lambda text: tell(Message(text))), interruptible(signal.SIGINT), suppress(KeyboardInterrupt):
        try:
            tune(StudyRun(file, job.name, timeout, tell, reports=index == 0, writes=False, mix=job.mix))
        except (UserError, TrialError) as error:
            return str(error)
    return None


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
