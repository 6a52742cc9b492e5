"""Devices: free memory, limits on it, fast number formats, and blocks that are elsewhere on their way to them."""

import ctypes
import gc
import logging
import mmap
import os
import re
import resource
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import psutil
import torch
from torch import Tensor

from atp_tune.errors import UserError
from atp_tune.utils import system
from atp_tune.utils.cache import cache_dir

GIB = 1024**3
PROCESS = Path("/proc/self")
KEPT = 256 << 20  # bytes that malloc keeps: per allocation, and at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIMIT = "ATP_TUNE_DEVICE_MEMORY"
OUT_OF_MEMORY = (  # texts in such errors, in lower case
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # a CPU
    "not enough memory",
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "allocation_failed",  # cuDNN 9
    "allocation failed",
    "cublascreate",  # cuBLAS and cuSOLVER report another error if there is no memory for a handle on its first use
    "cusolverdncreate",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device of a study's `device` key; `auto` prefers CUDA, then MPS. A CUDA device gets its index.

    UserError if the device does not exist, or if the limit on its memory is invalid.
    """
    device_limit()
    device = existing(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def existing(name: str) -> torch.device:
    """The device of a study's `device` key, on which nothing is begun; UserError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= here:
        raise UserError(f"device: {name} is not on this machine ({here} of its kind); try --device cpu or auto")
    return device


def make_current(device: torch.device) -> None:
    """Makes a CUDA device the current device.

    Pinned memory, new streams and Triton kernels belong to the current device, whatever the device of their tensors. If
    the current device stays 0, computing on another one also opens a context of about 500 MB on 0.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a study's `model.dtype` key; `auto` is bf16 if the device multiplies it fast."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 matrices multiply at least about twice as fast as float32 matrices."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and system.multiplies_bf16_fast()


def arithmetic(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The formats of numbers, for keys of the cache: kind of device, number format, and other formats of products."""
    return [device.type, str(dtype).removeprefix("torch."), *other_products(device)]


def other_products(device: torch.device) -> list[str]:
    """Number formats that the caller has set for products, such as TF32 or an autocast; none by default."""
    backends: Any = torch.backends
    own = backends.mkldnn if device.type == "cpu" else backends.cuda
    formats = [name for name in (backends.fp32_precision, own.matmul.fp32_precision) if name not in ("none", "ieee")]
    mixed = [str(torch.get_autocast_dtype(device.type))] if torch.is_autocast_enabled(device.type) else []
    return formats + mixed


def device_name(device: torch.device) -> str:
    """The name of the device, for the record of a trial; of a GPU with how it multiplies float32, if not in float32.

    NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, torch's default is float32.
    """
    if device.type == "cuda":
        in_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return torch.cuda.get_device_name(device) + (", TF32" if in_tf32 else "")
    return f"{device.type} ({torch.get_num_threads()} threads)"


def free_memory(device: torch.device) -> int:
    """Free bytes on the device now, within the limit `ATP_TUNE_DEVICE_MEMORY`.

    Memory that PyTorch's allocator keeps of freed tensors counts as free.
    """
    simulated = device_limit()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return free if simulated is None else max(0, min(free, simulated - held))
    return host_memory() if simulated is None else min(host_memory(), simulated)


def device_limit() -> int | None:
    """The limit `ATP_TUNE_DEVICE_MEMORY`, such as `2GiB`, in bytes; None without one, UserError if it is invalid.

    It simulates a small device. On a GPU it limits the memory of all tensors. A CPU has this many bytes free at any
    time and is treated as a device separate from the host: weights that do not fit stay in host memory or on disk, and
    are copied to it block by block.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text)
    if not match:
        raise UserError(f'{LIMIT}: must be a size like 2GiB or 600M, got "{text}"')
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kMGT".index(match[2] or " "))


def host_memory() -> int:
    """Available bytes of host memory now, without swapping: of the machine and of this process's control groups."""
    available, limited = int(psutil.virtual_memory().available), free_in_cgroups()
    return available if limited is None else min(available, limited)


NO_LIMIT = 1 << 62  # version 1 writes a number like this where there is no limit
# Names, in a version of control groups, of limit and usage, and of inactive files in `memory.stat`.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def free_in_cgroups(process: Path = PROCESS) -> int | None:
    """Bytes that the control groups of a process (its folder in /proc) leave; None without a limit.

    Containers, jobs of Slurm and services have such limits. A limit holds for a group and all groups below it, so all
    groups from that of the process up to the root count. Usage includes the page cache; inactive files, which the
    kernel frees first, count as free, as in Docker and Kubernetes. Both versions of control groups may be mounted, each
    controller in one of them. Source: Linux, Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst; proc(5)
    on mountinfo.
    """
    free = []
    for folder, (limit, use, inactive) in _groups(process):
        with suppress(OSError, ValueError):  # no limit ("max"), or a group without this controller
            most, used = (int((folder / name).read_text()) for name in (limit, use))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free.append(max(0, most - used + int(stat.get(inactive, 0))))
    return min(free, default=None)


def cgroup_limit(process: Path = PROCESS) -> int | None:
    """The smallest memory limit of the control groups of a process, in bytes; None without a limit."""
    limits = []
    for folder, (limit, *_) in _groups(process):
        with suppress(OSError, ValueError):
            limits.append(int((folder / limit).read_text()))
    return min((size for size in limits if size < NO_LIMIT), default=None)


def _groups(process: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the control groups of a process, from its own upwards; none without control groups."""
    try:
        paths = dict(line.split(":", 2)[1:] for line in (process / "cgroup").read_text().splitlines())
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        fields, _, kind = mount.partition(" - ")
        root, point = fields.split()[3:5]
        if kind.startswith("cgroup2 "):
            yield from ((folder, V2) for folder in _upwards(Path(point), root, paths.get("", "/")))
        elif kind.startswith("cgroup ") and "memory" in kind.split()[-1].split(","):
            path = next((path for names, path in paths.items() if "memory" in names.split(",")), "/")
            yield from ((folder, V1) for folder in _upwards(Path(point), root, path))


def _upwards(point: Path, root: str, path: str) -> Iterator[Path]:
    """The folders of the group `path` and the groups above it, in a mount at `point` that shows `root`.

    A group outside `root`, which a container may see, has the limits of the mount itself.
    """
    inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) and ".." not in path else Path()
    yield from (point / part for part in (inside, *inside.parents))


def release_memory() -> None:
    """Runs the garbage collector and empties the caches of the GPUs' allocators."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if CUDA was not used
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of tensors on a CUDA device, on MPS what Metal has taken, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Resets the peak of a CUDA device; the peak of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reuse_freed_memory() -> bool:
    """Makes the C library keep up to `KEPT` freed bytes for the next tensor; returns whether it does.

    By default glibc returns blocks of some megabytes to the system at once, and new blocks are pages that the kernel
    must zero, which takes a quarter of a trial's time on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT) and mallopt(M_TRIM_THRESHOLD, KEPT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


@contextmanager
def oom_as_user_error(what: str) -> Iterator[None]:
    """Turns out-of-memory errors outside trials into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{what}: out of memory; what is stored is safe, and the same command goes on: free some, or take a larger "
            "device with --device"
        ) from None


# --- Memory for blocks that are not on the compute device: pinned, plain, or a mapped file.
#
# transformers memory-maps safetensors of the requested dtype. Tensors that it converts or combines (experts) are in
# plain memory after loading.

ALIGNED = 512  # bytes, alignment of tensors in a buffer

Buffer = Callable[[int], Tensor]  # from a number of bytes to memory, uint8

log = logging.getLogger(__name__)
_say_once = cache(log.warning)


def move_into(buffer: Buffer, tensors: Sequence[Tensor]) -> None:
    """Moves contiguous tensors, in place, into one new buffer; values and strides stay the same."""
    dense = [tensor for tensor in tensors if tensor.is_contiguous()]
    ends = list(accumulate(_padded(tensor) for tensor in dense))
    if not dense or not ends[-1]:
        return
    memory = buffer(ends[-1])
    for tensor, end in zip(dense, ends, strict=True):
        start = end - _padded(tensor)
        target = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = target.copy_(tensor.detach())


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
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failure = int(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
    if failure:
        # Clears the error of a failed CUDA call, which the next kernel would report as its own.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        _say_once(f"host memory cannot be pinned (CUDA error {failure}): blocks are copied more slowly")
    else:
        weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory


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


def mapped_files() -> Callable[[Tensor], bool]:
    """Whether a tensor starts in a file that this process has mapped now; in none if the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        lines = []
    fields = [line.split(maxsplit=5) for line in lines]
    texts = [row[0].split("-") for row in fields if len(row) == 6 and row[5].startswith("/")]
    ranges = sorted((int(start, 16), int(end, 16)) for start, end in texts)
    starts = [start for start, _ in ranges]

    def is_mapped(tensor: Tensor) -> bool:
        index = bisect_right(starts, tensor.data_ptr()) - 1
        return index >= 0 and tensor.data_ptr() < ranges[index][1]

    return is_mapped


# --- Streams blocks to the compute device: the next block is copied while the current block computes.
#
# A thread copies the blocks; on CUDA it uses its own stream. Trials request blocks in the order 0 … L-1, 0, …,
# gradients in the order 0 … L-1, L-1, L-1, L-2, L-2, … 0, 0: after block i was delivered the thread copies block i+1,
# or i-1 if i+1 came before it, if at most one copy is in use. A copy counts until most of its bytes are freed, since
# a consumer may keep some tensors; the last one is kept until another block is requested. Delivered tensors are never
# written to again.
#
# On CUDA, memory is freed when Python deletes the tensor, while kernels may still read it. So an event is recorded in
# the consumer's stream, and the thread waits for the event before it allocates memory for another block.

Tensors = dict[str, Tensor]
Mark = Any  # a torch.cuda.Event; None on devices where calls are synchronous
AHEAD = ("cuda", "cpu")  # devices on which a second thread may copy while the first computes


@dataclass(frozen=True)
class Wanted:
    """A request for a block, to be used in `stream` (None except on CUDA)."""

    index: int
    stream: Any
    answer: "Future[Tensors]" = field(default_factory=Future)


@dataclass(frozen=True)
class Freed:
    """A tensor of a copy was deleted; kernels that read it have finished when `mark` has."""

    copy: int
    bytes: int
    mark: Mark


@dataclass(frozen=True)
class Copied:
    """A copy on the device, complete when `ready` is; or the error of copying."""

    index: int
    tensors: Tensors
    ready: Mark = None
    error: BaseException | None = None


Requests = SimpleQueue[Wanted | Freed | None]  # its `put` is reentrant, as needed in finalizers


class Stream:
    """Delivers blocks as copies on a device; with `ahead` = False each is copied on request only."""

    def __init__(self, blocks: Sequence[Tensors], device: torch.device, ahead: bool = True) -> None:
        self._device = device
        self._requests: Requests = SimpleQueue()
        copier = Copier(blocks, device, ahead and device.type in AHEAD, self._requests)
        thread = Thread(target=copier.run, name="atp_tune blocks", daemon=True)  # holds no reference to self
        thread.start()
        weakref.finalize(self, _end, self._requests, thread)

    def get(self, index: int) -> Tensors:
        """The tensors of a block on the device, by name; raises the errors of the thread."""
        wanted = Wanted(index, torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None)
        self._requests.put(wanted)
        return wanted.answer.result()


def _end(requests: Requests, thread: Thread) -> None:
    requests.put(None)
    if thread is not current_thread():  # the garbage collector may run in the thread itself
        thread.join()


@dataclass(eq=False)
class Copier:
    """The copying thread; it shares no state, and gets messages by the queue."""

    blocks: Sequence[Tensors]
    device: torch.device
    ahead: bool
    requests: Requests

    def __post_init__(self) -> None:
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: int | None = None
        self._waiting: Copied | None = None
        self._last: tuple[Copied, Any] | None = None  # what was delivered, and to be used in which stream
        self._held = dict[int, tuple[int, int]]()  # live and total bytes of each delivered copy
        self._marks = list[Mark]()
        self._copies = 0

    def run(self) -> None:
        """Handles messages until None arrives."""
        make_current(self.device)  # of a new thread it is the first, on which a context would be opened
        while self._serve(self.requests.get()):  # no variable for messages, which would keep a block alive
            if self.ahead and self._next is not None and len(self._held) <= 1:
                self._waiting, self._next = self._copy(self._next), None

    def _serve(self, message: Wanted | Freed | None) -> bool:
        if message is None:
            return False
        if isinstance(message, Freed):
            if message.mark is not None:
                self._marks.append(message.mark)
            if message.copy in self._held:
                alive, whole = self._held.pop(message.copy)
                if 2 * (alive - message.bytes) > whole:
                    self._held[message.copy] = alive - message.bytes, whole
        else:
            self._answer(message)
        return True

    def _answer(self, wanted: Wanted) -> None:
        """Delivers the last or the waiting copy if it is the requested block, else makes a copy now."""
        before = -1 if self._last is None else self._last[0].index
        if self._last is not None and (before, self._last[1]) == (wanted.index, wanted.stream):
            wanted.answer.set_result(self._last[0].tensors)
            return
        self._last = None
        ready, self._waiting, self._next = self._waiting, None, None
        if ready is None or ready.index != wanted.index:
            ready = None  # frees the unused copy before the next is made
            ready = self._copy(wanted.index)
        if ready.error is not None:
            wanted.answer.set_exception(ready.error)
            return
        if wanted.stream is not None:
            wanted.stream.wait_event(ready.ready)
        self._copies += 1
        for tensor in ready.tensors.values():
            if wanted.stream is not None:
                tensor.record_stream(wanted.stream)
            weakref.finalize(
                tensor.untyped_storage(), _freed, self.requests, self._copies, tensor.nbytes, wanted.stream
            ).atexit = False
        whole = sum(tensor.nbytes for tensor in ready.tensors.values())
        self._held[self._copies] = whole, whole
        self._last = ready, wanted.stream
        step = -1 if 0 < wanted.index == before - 1 else 1
        self._next = (wanted.index + step) % len(self.blocks)
        wanted.answer.set_result(ready.tensors)

    def _copy(self, index: int) -> Copied:
        try:
            while self._marks:
                self._marks.pop().synchronize()
            with nullcontext() if self._side is None else torch.cuda.stream(self._side):
                tensors = {name: copy_to(self.device, tensor) for name, tensor in self.blocks[index].items()}
            return Copied(index, tensors, self._side and self._side.record_event())
        except BaseException as error:  # raised in the consumer; this thread goes on
            return Copied(index, {}, error=error)


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides; asynchronous from pinned memory to CUDA."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=device.type == "cuda")


def _freed(requests: Requests, copy: int, size: int, stream: Any) -> None:
    requests.put(Freed(copy, size, stream and stream.record_event()))
