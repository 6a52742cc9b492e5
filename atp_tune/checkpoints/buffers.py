"""Memory that blocks lie in while they are not on the compute device: pinned, plain, or a mapped file.

Safetensors are memory-mapped by transformers where the file has the number format that is asked for. What it had to
convert, or to put together (a mixture's experts), lies in plain memory after loading.
"""

import logging
import mmap
import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.cache import cache_dir
from atp_tune.errors import UserError

ALIGNED = 512  # bytes: where a tensor may begin in a buffer

Buffer = Callable[[int], Tensor]  # a number of bytes → that much memory, uint8

log = logging.getLogger(__name__)


def move_into(buffer: Buffer, tensors: Sequence[Tensor]) -> None:
    """Makes tensors lie side by side in one new buffer, in place; they have the same values and strides as before."""
    dense = [tensor for tensor in tensors if tensor.is_contiguous()]
    ends = list(accumulate(_padded(tensor) for tensor in dense))
    if not dense or not ends[-1]:
        return
    memory = buffer(ends[-1])
    for tensor, end in zip(dense, ends, strict=True):
        start = end - _padded(tensor)
        place = memory[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.detach())


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED


def plain(size: int) -> Tensor:
    """Memory of whole pages, which go back to the system when the last tensor in it does."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def pinned(size: int) -> Tensor:
    """Plain memory that CUDA copies from without a detour; said in the log where the system does not let it.

    Not torch's own pinned memory: that takes the next power of two.
    """
    memory = plain(size)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failure = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    if failure:
        _forget_last_error()
        _say_once(f"host memory cannot be pinned (CUDA error {failure}): blocks are copied more slowly")
    else:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory


def _forget_last_error() -> None:
    """Lets a kernel that does nothing raise the error of a failed call, which the next one would take for its own.

    PyTorch does not expose `cudaGetLastError`; the check after the launch of a kernel calls it. An error that the
    device does not recover from is raised by all later calls too.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def on_disk(size: int) -> Tensor:
    """A mapped file in the cache, without a name, so that it goes when the process does; UserError if it is too large.

    Room is taken beforehand: a full disk would otherwise kill the process where it first writes.
    """
    folder = cache_dir("blocks")
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            reserve = getattr(os, "posix_fallocate", None)
            reserve(file.fileno(), 0, size) if reserve else file.truncate(size)
        except OSError as error:
            reason = f"{error.strerror}; {size / 1024**3:.1f} GiB are wanted"
            raise UserError(f"model.offload: blocks cannot be kept in {folder}: {reason}") from None
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)


def mapped_files() -> "Mapped":
    """The parts of this process's memory that are files, as they are now; none where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return Mapped(())
    fields = [line.split(maxsplit=5) for line in lines]
    return Mapped(tuple(sorted(_ends(row[0]) for row in fields if len(row) == 6 and row[5].startswith("/"))))


def _ends(text: str) -> tuple[int, int]:
    start, end = text.split("-")
    return int(start, 16), int(end, 16)


class Mapped:
    """Ranges of addresses."""

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self._ranges = ranges
        self._starts = [start for start, _ in ranges]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor begins in one of the ranges."""
        place = bisect_right(self._starts, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() < self._ranges[place][1]

    def bytes_beside(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the tensors that lie in none of the ranges."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not self.holds(tensor))
