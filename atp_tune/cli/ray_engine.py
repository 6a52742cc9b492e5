"""Workers that are tasks of a Ray cluster, one per GPU: `--engine ray`.

A worker whose node dies is restarted on another one. Events reach the display through an actor on this node. Workers
do not wait for the actor: if it is lost, the run goes on without a display.
"""

import logging
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, NodeDiedError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from atp_tune.cli.display import Display
from atp_tune.cli.worker_pool import STOP_TIMEOUT, StudyWorker, WorkerJob, supervise, work
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.events import Event, Message, TrialStarted
from atp_tune.utils.compat import ray_address

T = TypeVar("T")
ANSWER = 5  # seconds in which the cluster's address, or the actor, must answer
POLL = 0.3  # seconds between two polls of the actor


def run_on_ray(job: WorkerJob, display: Display, count: int | None, address: str) -> None:
    """Runs the study in `count` tasks of the cluster, by default one for each of its GPUs."""
    # Connects to the cluster as a driver; UserError if there is none at the address.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = ray_address(address).rpartition(":")
        socket.create_connection((host, int(port)), ANSWER).close()  # Ray itself would try for minutes
        ray.init(f"{host}:{port}", log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, ValueError, RuntimeError) as error:
        how = "start it with `ray start --head`, join it with `ray start --address HOST:6379`, here too"
        raise UserError(f"ray: no cluster at {address} ({str(error).splitlines()[0]}); {how}") from None
    signal.signal(signal.SIGTERM, terminate)  # Ray's own would exit at once
    try:
        if job.file.database is not None and len(set(_hosts().values())) > 1:
            raise UserError(_out_of_reach(job.file))
        # The resource that each worker takes one of, and how many the cluster has.
        resources, device = ray.cluster_resources(), job.file.study.device  # type: ignore[no-untyped-call]
        kind = "GPU" if device.startswith("cuda") or (device == "auto" and resources.get("GPU", 0) >= 1) else "CPU"
        there = int(resources.get(kind, 0))
        count = count or max(1, there)
        if count > there:
            display(
                Message(f"the cluster has {there} {kind}s for {count} workers: the others wait until there are more")
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        news = _NEWS.options(scheduling_strategy=here).remote()
        study = job.file.study.model_copy(update={"storage": job.file.storage_url})
        # For processes with another current folder.
        job = replace(job, file=replace(job.file, path=job.file.path.absolute(), study=study))
        workers = [RayWorker(index, display, job, kind, news) for index in range(count)]
        supervise(workers, lambda alive: _listen_to_actors(alive, workers, news))
    finally:
        ray.shutdown()


def _out_of_reach(file: StudyFile) -> str:
    return (
        f"storage {file.database}: a file of one machine, and the cluster has several; start `python tune.py serve "
        f"--study {file.name} --listen 0.0.0.0` there and add --storage grpc://HOST:13000, or use PostgreSQL"
    )


def _hosts() -> dict[str, str]:
    """Addresses of all live nodes, by id."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}


def _host() -> str:
    """Address of the node of this process."""
    return _hosts()[ray.get_runtime_context().get_node_id()]


def _listen_to_actors(alive: "Sequence[RayWorker]", workers: "Sequence[RayWorker]", news: Any) -> None:
    """Shows new events, then handles workers that have ended."""
    by_task = {worker.task: worker for worker in alive}
    ended, _ = ray.wait(list(by_task), timeout=POLL)
    events: list[tuple[int, Event]] = _answer(news.take.remote(), [])
    for index, event in events:
        workers[index].hear(event)
    for task in ended:
        by_task[task].end()


def _answer(call: Any, without: T) -> T:
    """The actor's answer, or `without` where the actor is lost; Ray restarts it."""
    try:
        return ray.get(call, timeout=ANSWER)  # type: ignore[no-any-return]
    except (RayActorError, GetTimeoutError):
        return without


class RayWorker(StudyWorker):
    """A worker that is a Ray task, on one GPU or CPU."""

    def __init__(self, index: int, display: Display, job: WorkerJob, kind: str, news: Any) -> None:
        super().__init__(index, display)
        self.task: Any = None
        self._job, self._news = job, news
        self._home = _host()
        self._needs = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}

    def launch(self) -> None:
        """Submits the task to the cluster."""
        self.task = _work.options(**self._needs).remote(self._job, self.index, self._news, self._home)

    def ask_to_stop(self) -> None:
        """Raises KeyboardInterrupt in the task, which also asks the actor: one that is only starting would lose it."""
        _answer(self._news.stop.remote(), None)
        ray.cancel(self.task, force=False)

    def wait(self) -> None:
        """Waits for the task; Ray kills it when this process ends."""
        ray.wait([self.task], timeout=STOP_TIMEOUT)

    def end(self) -> None:
        """Handles the end of the task."""
        try:
            error = ray.get(self.task)
        except RayTaskError:  # a bug, with its traceback
            self.is_alive = False
            raise
        except RayError as death:
            self.died(type(death).__name__, counts=not isinstance(death, NodeDiedError))
        else:
            self.ended(error)


class News:
    """The actor: holds events of all workers until the driver takes them, and whether workers are to stop."""

    def __init__(self) -> None:
        self._events = list[tuple[int, Event]]()
        self._is_stopping = False

    def stop(self) -> None:
        """Makes tasks end that have not begun."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._is_stopping

    def put(self, index: int, event: Event) -> None:
        """Adds an event of a worker."""
        self._events.append((index, event))

    def take(self) -> list[tuple[int, Event]]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events


_NEWS: Any = ray.remote(num_cpus=0, max_restarts=-1)(News)


@ray.remote(max_retries=0, max_calls=1, scheduling_strategy="SPREAD")
def _work(job: WorkerJob, index: int, news: Any, home: str) -> str | None:
    """The Ray task: runs the study and sends events to the actor."""
    if job.file.database is not None and _host() != home:  # a node that joined later
        return _out_of_reach(job.file)
    import atp_tune.search.runner  # noqa: F401  it takes seconds, in which Ray's interruption would be lost

    if _answer(news.is_stopping.remote(), without=False):
        return None
    sent = list[Any]()

    def tell(event: Event) -> None:
        sent[:] = [news.put.remote(index, event)]
        if isinstance(event, TrialStarted) and _answer(news.is_stopping.remote(), without=False):
            raise KeyboardInterrupt  # Ray's own was lost: code that it interrupted may have caught it

    error = work(job, index, job.file.study.device, tell)
    if sent:
        ray.wait(sent, timeout=ANSWER)  # the last event is not lost with this process
    return error
