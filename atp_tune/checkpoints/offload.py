"""The place of a model's weights: on the compute device, in host memory, or memory-mapped on disk. Loads no torch."""

from dataclasses import dataclass
from typing import Literal

Offload = Literal["none", "cpu", "disk"]

FITS = 0.7  # share of free device memory for weights; the rest is for activations
FULL = 0.9  # the same for weights and what is known to lie beside them
HOST_FITS, HOST_ROOM = 0.7, 16 * 10**9  # blocks leave a part of free host memory to the system, at most so many bytes
MATRICES = 3  # of float32, as large as a Hessian, while its factor is computed


@dataclass(frozen=True)
class Free:
    """Free bytes on the compute device and in host memory; `bounded`: False for a CPU that shares the host's memory."""

    device: int
    host: int
    bounded: bool = True


def choose(total: int, blocks: int, free: Free, work: int = 0) -> Offload:
    """The first place that weights of `total` bytes, `blocks` of them in blocks, fit into, with `work` bytes beside."""
    if not free.bounded or (total <= FITS * free.device and total + work <= FULL * free.device):
        return "none"
    return "cpu" if blocks <= max(HOST_FITS * free.host, free.host - HOST_ROOM) else "disk"


def states(calibration: int, validation: int, within: int = 0) -> int:
    """Peak bytes of hidden states, by those of the texts: calibration's exist twice for a moment, beside validation's.

    `within`: of all calibration windows within a block, where linears are pruned in order.
    """
    return max(validation + 2 * calibration + within, 2 * validation)


def hessian_bytes(inputs: int) -> int:
    """Peak bytes of a Hessian of so many inputs."""
    return 4 * MATRICES * inputs**2
