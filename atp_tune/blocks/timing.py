"""Timing of phases on asynchronous devices."""

from time import perf_counter

import torch


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its work; on CUDA that of the current stream.

    So it does not wait for the copy of the next block, which has a stream of its own.
    """
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


class Timer:
    """Sums the seconds of named phases; a phase ends with its last kernel on the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap to a phase."""
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        wait_for(self._device)
        return perf_counter()
