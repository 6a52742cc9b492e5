"""What the display's process does when a worker dies."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expect import parametrize, refused

from atp_tune.cli.display import Display
from atp_tune.cli.worker_pool import RESTARTS, ProcessWorker, StudyWorker, choose_device, run_workers
from atp_tune.errors import TrialError
from atp_tune.events import TrialStarted


class Idle(StudyWorker):
    """One that does nothing, and is told that it has died."""

    launched = 0

    def launch(self) -> None:
        self.launched += 1

    def ask_to_stop(self) -> None: ...

    def wait(self) -> None: ...


@pytest.fixture
def worker() -> Iterator[Idle]:
    with Display() as display:
        idle = Idle(1, display)
        idle.start()
        yield idle


@parametrize(
    ("name", "cards", "devices"),
    [
        ("auto", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),  # were cuda:0 to cuda:3
        ("cuda", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),  # were all on the first
        ("cuda:1", 2, ["cuda:1"] * 4),
        ("cpu", 2, ["cpu"] * 4),
        ("auto", 0, ["auto"] * 4),
        ("mps", 0, ["mps"] * 4),
    ],
)
def test_workers_take_the_cards_in_turn(
    name: str, cards: int, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert [choose_device(name, index, 4) for index in range(4)] == devices


@parametrize("names", [["cuda:0", "cuda:2"], ["cpu", "mps"]])
def test_a_device_that_is_not_there_is_told_before_any_worker_starts(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("a context was opened"))
    monkeypatch.setattr(ProcessWorker, "launch", lambda worker: pytest.fail("a worker was started"))
    job: Any = None
    with Display() as display, refused(f"^device: {names[1]} is not on this machine"):
        run_workers(job, display, names)


@parametrize("event", [None, TrialStarted("dense model", None), TrialStarted("test text: trial 3", None)])
def test_one_that_comes_to_no_trial_ends_the_run(worker: Idle, event: TrialStarted | None) -> None:
    for _ in range(RESTARTS):
        if event:
            worker.hear(event)
        worker.died("exit code -9")
    with pytest.raises(TrialError, match=r"worker 1 died \(exit code -9\) 3 times in a row"):
        worker.died("exit code -9")
    assert worker.launched == 1 + RESTARTS
