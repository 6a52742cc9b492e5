"""What /proc/cpuinfo says of the CPU."""

import platform
from pathlib import Path


def cpu_flags() -> frozenset[str]:
    """Flags of the CPU in Linux, such as avx2 and avx512f; empty if unknown."""
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    """The model name of the CPU, and whether it has AMX: virtual machines give one name to CPUs with and without."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    return f"{name} with AMX" if "amx_bf16" in cpu_flags() else name


def is_amd() -> bool:
    """Whether AMD made the CPU, as far as is known."""
    return _cpuinfo("vendor_id") == "AuthenticAMD"


def multiplies_bf16_fast() -> bool:
    """Whether torch multiplies bf16 matrices at least about twice as fast as float32 matrices.

    By AMX, or AVX-512 BF16 of an AMD CPU; an Intel CPU without AMX multiplies them half as fast (docs/log.md).
    """
    flags = cpu_flags()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and is_amd())


def _cpuinfo(field: str) -> str:
    """A field of the first CPU; empty if it has none, and elsewhere than on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
