"""Several workers that run one study under one display: processes of this machine, or tasks of a Ray cluster.

The first worker loads the model and makes the study, then the others start. They share only the storage, as workers
do that are started by hand. A worker that dies is restarted. A process (`--workers N`, `--devices A,B`) has a device of
its own, or a share of the CPU cores; the tasks are in `ray_engine`.
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
from atp_tune.cli.terminal import interruptible, quiet
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Event, EventHandler, Message, TrialStarted

RESTARTS = 2  # of a worker that dies before its first trial; trials that end their process are given up elsewhere
STOP_TIMEOUT = 60  # seconds that workers have to stop after Ctrl-C


@dataclass(frozen=True)
class WorkerJob:
    """The needs of each worker: study file, name of the study, time after which no trial starts (seconds since 1970).

    `mix`: devices and number formats may differ between trials.
    """

    file: StudyFile
    name: str
    end: float | None
    mix: bool


class StudyWorker(ABC):
    """One worker, which is restarted when it dies."""

    def __init__(self, index: int, display: Display) -> None:
        self.index = index
        self.is_alive = self.is_ready = False
        self._line = Line(display, f"worker {index}: ")
        self._deaths = 0

    @abstractmethod
    def launch(self) -> None:
        """Starts its process or task."""

    @abstractmethod
    def ask_to_stop(self) -> None:
        """Asks it to stop, as Ctrl-C does."""

    @abstractmethod
    def wait(self) -> None:
        """Waits until it has stopped, at most `STOP_TIMEOUT`."""

    def start(self) -> None:
        """Starts it, perhaps again."""
        self.is_alive = True
        self.launch()

    def hear(self, event: Event) -> None:
        """Shows one event."""
        self.is_ready = self.is_ready or isinstance(event, TrialStarted)
        if isinstance(event, TrialStarted) and event.number is not None:
            self._deaths = 0
        self._line(event)

    def ended(self, error: str | None = None) -> None:
        """Handles its regular end; UserError with the reason if it could not run."""
        self.is_alive, self.is_ready = False, True
        self._line.hide()
        if error is not None:
            raise UserError(error)

    def died(self, how: str, counts: bool = True) -> None:
        """Restarts it after it died; TrialError after `RESTARTS` deaths in a row (those with `counts`)."""
        self.ended()
        self._deaths += counts
        if self._deaths > RESTARTS:
            raise TrialError(
                f"worker {self.index} died ({how}) {self._deaths} times in a row; its trial is queued again by the "
                "next run"
            )
        self._line(Message(f"worker {self.index} died ({how}): it is started again"))
        self.start()


AnyWorker = TypeVar("AnyWorker", bound=StudyWorker)


def supervise(workers: Sequence[AnyWorker], listen: Callable[[Sequence[AnyWorker]], None]) -> None:
    """Starts the workers and returns when all have ended; `listen` waits a moment for events of live ones."""
    first, *waiting = workers
    first.start()
    try:
        while alive := [worker for worker in workers if worker.is_alive]:
            listen(alive)
            while first.is_ready and waiting:
                waiting.pop(0).start()
    finally:
        left = [worker for worker in workers if worker.is_alive]
        for worker in left:
            worker.ask_to_stop()
        for worker in left:
            worker.wait()


def work(job: WorkerJob, index: int, device: str, tell: EventHandler) -> str | None:
    """Runs the study in a worker until SIGINT, with `tell` as event handler; the reason if it could not run."""
    from atp_tune.config.plugged import plug_in
    from atp_tune.cost.remaining import foretold
    from atp_tune.report.publishing import publish
    from atp_tune.search.runner import StudyRun, tune

    timeout = None if job.end is None else job.end - time()
    file = replace(job.file, study=job.file.study.model_copy(update={"device": device}))
    with quiet(lambda text: tell(Message(text))), interruptible(signal.SIGINT), suppress(KeyboardInterrupt):
        try:
            plug_in(file.study, file.folder, file.trusts_plugins)
            tune(
                StudyRun(
                    file, job.name, timeout, foretold(tell), reports=index == 0, writes=False, mix=job.mix,
                    publisher=publish,
                )
            )  # fmt: skip
        except (UserError, TrialError) as error:
            return str(error)
    return None


def run_workers(job: WorkerJob, display: Display, devices: Sequence[str]) -> None:
    """Runs the study in one process per device, until all have ended; UserError as the first worker's.

    UserError before any starts if a device does not exist.
    """
    if names := {*devices} - {"auto", "cpu"}:
        from atp_tune.checkpoints.devices import existing

        for name in sorted(names):
            existing(name)
    supervise([ProcessWorker(index, display, job, devices) for index in range(len(devices))], _listen)


def _listen(alive: "Sequence[ProcessWorker]") -> None:
    """Waits for events, and passes them to their workers."""
    by_news = {worker.news: worker for worker in alive}
    for news in connection.wait(list(by_news), timeout=1):
        by_news[news].listen()  # type: ignore[index]


class ProcessWorker(StudyWorker):
    """A worker that is a process."""

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
        """Shows one event, or handles the end of the process."""
        try:
            event: Event | str = self.news.recv()
        except (EOFError, OSError):
            self._process.join()
            if self._process.exitcode == 0:
                self.ended()
            else:
                self.died(f"exit code {self._process.exitcode}")
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
        """Waits for the process, and kills it if it does not stop."""
        self._process.join(STOP_TIMEOUT)
        self._process.kill()


def _work(job: WorkerJob, index: int, devices: Sequence[str], news: Connection) -> None:
    """The process of a worker: runs the study and sends events to the parent."""
    os.setpgid(0, 0)  # Ctrl-C goes only to the parent, which passes it on
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it imports: a KeyboardInterrupt within C++ code aborts
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so does SIGTERM, which Slurm sends to every process
    Thread(target=_stop_with_the_parent, daemon=True).start()
    with suppress(KeyboardInterrupt):
        error = work(job, index, choose_device(devices[index], index, len(devices)), news.send)
        if error is not None:
            news.send(error)


def _stop_with_the_parent() -> None:
    """Stops this process as Ctrl-C does when its parent has died; its trial is queued again."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)


def choose_device(name: str, index: int, count: int) -> str:
    """The device of one worker among `count`: CUDA devices in turn, else the CPU with a share of its threads."""
    import torch

    if name in ("auto", "cuda") and (cards := torch.cuda.device_count()):
        return f"cuda:{index % cards}"
    if name in ("auto", "cpu"):
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    return name
