"""What a device is, how much memory it has free, and in which number format it multiplies fast."""

import ctypes
import gc
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from atp_tune.checkpoints.cgroups import free_in_cgroups
from atp_tune.errors import UserError

GIB = 1024**3
KEPT = 256 << 20  # bytes, of one block and of what is free at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIMIT = "ATP_TUNE_DEVICE_MEMORY"
OUT_OF_MEMORY = (  # what such an error says, in small letters
    "out of memory",  # CUDA, HIP, MPS
    "can't allocate memory",  # a CPU
    "not enough memory",
    "alloc_failed",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "allocation_failed",  # cuDNN 9
    "allocation failed",
    "cublascreate",  # cuBLAS and cuSOLVER say "not initialized" or "internal error" where a handle finds no memory, and
    "cusolverdncreate",  # make it when it is first needed
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device of a study's `device` key; `auto` takes CUDA, then MPS, then the CPU. One of CUDA has its index.

    UserError if it is not here, or if the limit on its memory is no size.
    """
    device_limit()
    device = torch.device(_fastest() if name == "auto" else name)
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[device.type]
    if (device.index or 0) >= here:
        raise UserError(f"device: {name} is not on this machine ({here} of its kind); try --device cpu or auto")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fastest() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_current(device: torch.device) -> None:
    """Makes a CUDA device the one that this process works on.

    Pinned memory, new streams and Triton's kernels belong to the current device, whichever their tensors lie on: a
    process that leaves it at 0 and computes on another opens a context of some 500 MB on 0 too.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format of a study's `model.dtype` key; `auto` is bf16 where the device multiplies it fast."""
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if multiplies_bf16_fast(device) else torch.float32


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bf16 matrices multiply about twice as fast as float32 ones or better."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return {"avx512_bf16", "amx_bf16"} & cpu_flags() != set()
    return False


def cpu_flags() -> set[str]:
    """What the CPU can do, as Linux calls it: avx2, avx512f, …; empty where that is not known."""
    return set(_cpuinfo("flags").split())


def cpu_name() -> str:
    """What the CPU calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def device_name(device: torch.device) -> str:
    """What the device calls itself, for the record of a trial."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device now, within the limit of `ATP_TUNE_DEVICE_MEMORY` if there is one.

    What PyTorch's allocator keeps of freed tensors is free, though the driver counts it as taken.
    """
    limit = device_limit()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - held
        return free if limit is None else max(0, min(free, limit - held))
    return host_memory() if limit is None else min(host_memory(), limit)


def device_limit() -> int | None:
    """Bytes that `ATP_TUNE_DEVICE_MEMORY`, such as `2GiB`, leaves of the compute device; UserError if it is no size.

    It makes any device look like a small one. A GPU is believed to have so much in all, what tensors hold included. A
    CPU is believed to have so much free at any moment, and to be a device apart from the host: weights that do not fit
    are kept in host memory or on disk, and come to it block by block.
    """
    text = os.environ.get(LIMIT, "").strip()
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", text)
    if not found:
        raise UserError(f'{LIMIT}: must be a size like 2GiB or 600M, got "{text}"')
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " kMGT".index(found[2] or " "))


def host_memory() -> int:
    """Bytes of host memory that can be had now without driving anything out but the page cache: of the machine, and
    of the control groups that this process is in.
    """
    available, limited = int(psutil.virtual_memory().available), free_in_cgroups()
    return available if limited is None else min(available, limited)


def release_memory() -> None:
    """Frees what nothing holds any more: what waits for the garbage collector, and what the CUDA allocator keeps."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA was not used


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a CUDA device, by the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Starts counting the peak anew where the device can; a process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reuse_freed_memory() -> bool:
    """Lets the C library keep what is freed, up to `KEPT`, for the next tensor; whether it does.

    glibc gives blocks of some megabytes back to the system at once, and gets each new one as pages that must be zeroed:
    a quarter of a trial's time on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc: macOS, Windows, musl
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT) and mallopt(M_TRIM_THRESHOLD, KEPT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on whichever device."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    )


@contextmanager
def oom_as_user_error(what: str) -> Iterator[None]:
    """UserError in one line where memory runs out in what is no trial."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{what}: out of memory; what is stored is safe, and the same command goes on: free some, or take a larger "
            "device with --device"
        ) from None
