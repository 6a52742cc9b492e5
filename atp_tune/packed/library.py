"""The library that kernel.c is compiled to, the variants in it, and what is passed to them.

It holds a variant of all loops for each instruction set; ATP_TUNE_ISA names another than the fastest. It has no threads
of its own: it runs in those of torch's OpenMP runtime, whose GOMP_parallel it gets the address of.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from atp_tune.utils import system

LIBRARY = Path(__file__).with_name("_kernel.so")
TORCH = "torch"  # ATP_TUNE_ISA: no variant
ALONE = 1 << 18  # multiplications of a product that one thread makes, in 30 µs: others would have to be woken

# The numbers are those of kernel.c; flags as in /proc/cpuinfo.
VARIANTS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512-bf16": 3, "neon": 4, "avx512-vbmi2": 5, "amx": 6}
_OTHERS = ("avx512", "avx2", "neon", "portable")
# Dot products of bfloat16 take Intel's CPUs twice as long as what `avx512-vbmi2` does.
_FASTEST_FIRST = ("amx", "avx512-vbmi2", "avx512-bf16", *_OTHERS)
_FASTEST_ON_AMD = ("avx512-bf16", "avx512-vbmi2", *_OTHERS)
_AVX2 = frozenset(("avx2", "fma", "f16c", "popcnt", "bmi1", "bmi2"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_VBMI2 = _AVX512 | {"avx512_vbmi2"}
_NEEDS = {
    "avx2": _AVX2, "avx512": _AVX512, "avx512-vbmi2": _VBMI2, "avx512-bf16": _VBMI2 | {"avx512_bf16"},
    "amx": _VBMI2 | {"amx_tile", "amx_bf16"},
}  # fmt: skip
_NO_MEMORY, _NOT_FINITE = 2, 3
_PLAIN = (Tensor, nn.Parameter, type(None))
_FOLLOWING = ~sum(  # keys but those of each thread
    torch._C.DispatchKeySet(key).raw_repr()
    for key in (torch._C.DispatchKey.BackendSelect, torch._C.DispatchKey.ADInplaceOrView)
)


class Weight(ctypes.Structure):
    """`struct matrix` of kernel.c: addresses and sizes, and which variant is to read them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "bitmask", "offsets", "scales", "bias", "parallel")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "count", "groups")),
        *((name, ctypes.c_int32) for name in ("type", "bias_type", "isa", "alone")),
    )


def kernel_name() -> str | None:
    """The variant in use, a key of VARIANTS; None without the library.

    Raises ValueError if ATP_TUNE_ISA names none that can run here.
    """
    return _chosen(os.environ.get("ATP_TUNE_ISA", ""))


@cache
def variants() -> tuple[str, ...]:
    """The variants that the library has and this CPU can run, the fastest first."""
    if library() is None:
        return ()
    flags, order = _flags(), _FASTEST_ON_AMD if system.is_amd() else _FASTEST_FIRST
    return tuple(name for name in order if _compiled() >> VARIANTS[name] & 1 and _NEEDS.get(name, frozenset()) <= flags)


@cache
def library() -> ctypes.CDLL | None:
    """The library beside this file, or None: it was not compiled, or for another machine, or from an earlier source."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        product_of_many = loaded.atp_product_of_many
    except (OSError, AttributeError):
        return None
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    loaded.atp_product.argtypes = (pointer, pointer, small, small, pointer, small)
    product_of_many.argtypes = (pointer, pointer, small, number, pointer, small)
    loaded.atp_unpack.argtypes = (pointer, number, number, pointer, small, small)
    loaded.atp_offsets.argtypes = (pointer, number, number, pointer)
    loaded.atp_offsets.restype = number
    loaded.atp_setup()
    return loaded


@cache
def parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch uses; None if it has none, as on macOS."""
    if sys.platform != "linux":
        return None
    try:
        # A symbol is looked for in the library and in those that it was linked to.
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def watched(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether anything follows a product that would not see what is read and written by addresses.

    Such as a compiler, a tracer, a transform of torch.func, a mode, a class of tensors of its own, tangents, or a
    gradient of a weight. Torch has no public word for all of them: keys of the thread say whom the dispatcher calls.
    """
    if torch.compiler.is_compiling() or has_tangents() or any(type(part) not in _PLAIN for part in (x, *weights)):
        return True
    if torch._C._dispatch_tls_local_include_set().raw_repr() & _FOLLOWING:
        return True
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in weights)


def has_tangents() -> bool:
    """Whether derivatives are computed along with values (forward mode)."""
    return forward_ad._current_level >= 0


def succeed(error: int) -> bool:
    """Whether the number that the library returned is 0; False if an input is not finite, raises what else it means."""
    if error == _NOT_FINITE:
        return False
    if error == _NO_MEMORY:
        raise MemoryError("packed weight: no memory for the product")
    if error:
        raise ValueError("packed weight: wrong argument")
    return True


@cache
def _chosen(asked: str) -> str | None:
    """The variant that is asked for, or the fastest."""
    possible = variants()
    if asked == TORCH:
        return None
    if asked and asked not in possible:
        raise ValueError(f"ATP_TUNE_ISA={asked}: possible here: {', '.join((*possible, TORCH))}")
    return asked or next(iter(possible), None)


@cache
def _compiled() -> int:
    """Bit n for each variant n in the library."""
    loaded = library()
    return 0 if loaded is None else int(loaded.atp_setup())


def _flags() -> frozenset[str]:
    """The CPU's features in the words of /proc/cpuinfo; elsewhere than on Linux as torch sees it."""
    if flags := system.cpu_flags():
        return flags
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    return {"AVX2": _AVX2, "AVX512": _AVX512}.get(torch.backends.cpu.get_cpu_capability(), frozenset())
