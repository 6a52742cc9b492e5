"""Memory for blocks that are not on the compute device: pinned, plain, or a mapped file.

transformers memory-maps safetensors of the requested dtype. Tensors that it converts or combines (experts) are in plain
memory after loading.
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

ALIGNED = 512  # bytes, alignment of tensors in a buffer

Buffer = Callable[[int], Tensor]  # from a number of bytes to memory, uint8

log = logging.getLogger(__name__)


def move_into(buffer: Buffer, tensors: Sequence[Tensor]) -> None:
    """Moves contiguous tensors, in place, into one new buffer; values and strides stay the same."""
    dense = [tensor for tensor in tensors if tensor.is_contiguous()]
    ends = list(accumulate(_padded(tensor) for tensor in dense))
    if not dense or not ends[-1]:
        return
    memory = buffer(ends[-1])
    for tensor, end in zip(dense, ends, strict=True):
        start = end - _padded(tensor)
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.detach())


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNED) * ALIGNED


def plain(size: int) -> Tensor:
    """Anonymous pages, which are returned to the system with the last tensor in them; large ones, if it has such.

    With pages of 4 KiB, 140 GB are 34 million that are zeroed, and registered for CUDA, one by one.
    """
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # Linux alone has them, and may be built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def pinned(size: int) -> Tensor:
    """Plain memory that is pinned for CUDA; logs a warning if the system refuses.

    torch's own pinned memory is not used, since it rounds sizes up to a power of two.
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
    """Clears the error of a failed CUDA call, which the next kernel would report as its own.

    PyTorch does not expose `cudaGetLastError`, but calls it after a kernel. An unrecoverable error is raised by all
    later calls too.
    """
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def on_disk(size: int) -> Tensor:
    """A mapped, unnamed file in the cache, which ends with the process; UserError if it does not fit.

    Space is reserved first: else a full disk would kill the process at its first write.
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
    """The address ranges of this process that are mapped files now; none if the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return Mapped(())
    fields = [line.split(maxsplit=5) for line in lines]
    ranges = [row[0].split("-") for row in fields if len(row) == 6 and row[5].startswith("/")]
    return Mapped(tuple(sorted((int(start, 16), int(end, 16)) for start, end in ranges)))


class Mapped:
    """Address ranges of mapped files."""

    def __init__(self, ranges: tuple[tuple[int, int], ...]) -> None:
        self._ranges = ranges
        self._starts = [start for start, _ in ranges]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor starts in one of the ranges."""
        place = bisect_right(self._starts, tensor.data_ptr()) - 1
        return place >= 0 and tensor.data_ptr() < self._ranges[place][1]

    def bytes_beside(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the tensors outside the ranges."""
        return sum(tensor.nbytes for tensor in tensors if not self.holds(tensor))
