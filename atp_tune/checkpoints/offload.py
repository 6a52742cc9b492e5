"""The place of a model's weights: on the compute device, in host memory, or memory-mapped on disk. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu", "disk"]

FITS = 0.7  # share of free device memory for weights; the rest is for activations
HOST_FITS = 0.7  # share of free host memory for blocks; the rest is for the system and the page cache


@dataclass(frozen=True)
class Free:
    """Free bytes on the compute device and in host memory; `bounded`: False for a CPU that shares the host's memory."""

    device: int
    host: int
    bounded: bool = True


def choose(total: int, blocks: int, free: Free) -> Offload:
    """The first place that weights of `total` bytes, `blocks` of them in blocks, fit into."""
    if not free.bounded or total <= FITS * free.device:
        return "none"
    return "cpu" if blocks <= HOST_FITS * free.host else "disk"
