"""How long phases take on a device that goes on computing after a call has returned."""

from time import perf_counter

import torch


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given; a CPU always has.

    On CUDA that is the work of the current stream. A copy of the next block, in a stream of its own, is not waited for:
    it is to go on while the current block computes.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


class Timer:
    """Adds up the seconds of named phases, each to the end of its last kernel on the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap for this phase."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        wait_for(self._device)
        return perf_counter()
