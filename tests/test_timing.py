"""Phases on a device whose kernels run on after the call that started them: an imitation whose time is counted here."""

import pytest
import torch
from families import CPU, bench_of, tiny
from plans import planned

from atp_tune.blocks import prune_pass
from atp_tune.blocks.prune_pass import Timer
from atp_tune.cost import probe

CUDA = torch.device("cuda:1")


class Device:
    """A clock of whole seconds, and work that is done only when somebody waits for it."""

    def __init__(self) -> None:
        self.now = self.queued = 0.0
        self.waits = 0

    def launch(self, seconds: float) -> None:
        """Returns after one second, whatever the work takes."""
        self.now += 1
        self.queued += seconds

    def current_stream(self, device: torch.device) -> "Device":
        assert device == CUDA
        return self

    def synchronize(self) -> None:
        self.waits += 1
        self.now, self.queued = self.now + self.queued, 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waits for the copy of the next block too"))
    monkeypatch.setattr(prune_pass, "perf_counter", made.perf_counter)
    monkeypatch.setattr(probe, "perf_counter", made.perf_counter)
    return made


def test_a_kernel_counts_for_the_phase_that_started_it(device: Device) -> None:
    device.launch(100)  # before the timer begins
    timer = Timer(CUDA)
    device.launch(20)
    timer.lap("calibrate")
    device.launch(3)
    timer.lap("prune")
    device.launch(5)
    timer.lap("calibrate")
    assert timer.seconds == {"calibrate": 21 + 6, "prune": 4}
    assert device.now == 101 + sum(timer.seconds.values())
    assert device.waits == 4


def test_the_pass_times_the_device_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(prune_pass, "wait_for", waited.append)
    (*_,) = bench_of(tiny("llama")).prune(planned("wanda", "uniform", (0.5,) * 4))
    assert waited == [CPU] * 4 * 4  # blocks; the start and three laps of each
