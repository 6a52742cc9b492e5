"""What the display's process does when a worker dies."""

from collections.abc import Iterator

import pytest

from atp_tune.cli.display import Display
from atp_tune.cli.worker_pool import RESTARTS, StudyWorker
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
        idle.start_once()
        yield idle


@pytest.mark.parametrize("event", [None, TrialStarted("dense model", None), TrialStarted("test text: trial 3", None)])
def test_one_that_comes_to_no_trial_ends_the_run(worker: Idle, event: TrialStarted | None) -> None:
    for _ in range(RESTARTS):
        if event:
            worker.hear(event)
        worker.died("exit code -9")
    with pytest.raises(TrialError, match=r"worker 1 died \(exit code -9\) 3 times in a row"):
        worker.died("exit code -9")
    assert worker.launched == 1 + RESTARTS


def test_one_that_dies_in_trials_is_started_again(worker: Idle) -> None:
    """Such a trial is given up in the end, and a machine that takes its workers away gives them back."""
    for number in range(10):
        worker.hear(TrialStarted(f"trial {number}", None, number))
        worker.died("exit code -9")
    assert worker.launched == 11
