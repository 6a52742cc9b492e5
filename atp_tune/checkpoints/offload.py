"""Where a model's weights lie while it is tuned: on the compute device, in host memory, or memory-mapped on disk.

A file of its own, since `plan` asks it without loading torch.
"""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu", "disk"]

FITS = 0.7  # of the free device memory may be weights; the rest is for activations
HOST_FITS = 0.7  # of the free host memory may be blocks; the system and the page cache want the rest


@dataclass(frozen=True)
class Free:
    """Free bytes: on the compute device, and in host memory. `bounded`: the device is a small one, or
    pretends to be; a CPU that is not bounded has no memory apart from the host's, and keeps weights where they are.
    """

    device: int
    host: int
    bounded: bool = True


def choose(total: int, blocks: int, free: Free) -> Offload:
    """Where weights of `total` bytes, `blocks` of them in blocks, should lie: the first place where they fit."""
    if not free.bounded or total <= FITS * free.device:
        return "none"
    return "cpu" if blocks <= HOST_FITS * free.host else "disk"
