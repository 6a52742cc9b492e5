"""Products with a packed weight on the CPU; `gpu` has those on a GPU.

A packed weight [R, C] is

`values` [count]            the nonzero weights, row by row: bfloat16, float16, float32 or int8
`bitmask` [R, ceil(C / 8)]  uint8; bit k % 8 of byte k // 8 says whether column k is among them; bits after C are 0
`scales` [R, G]             float32, of int8 values: a weight is value * scale of its group; each of the G groups has
                            C / G columns, a multiple of 32 unless G = 1
`offsets` [R + 1]           int64, never stored: where each row's values start, and at the end their count

All sums are in float32. The same input gives the same bits at every run, with any number of threads, and whatever
tokens are beside it, up to BATCH in all (of a variant in FEW: up to its number, but where `by_tiles`), or more. Tiles
multiply by the weights in bfloat16: those of int8 values with scales of groups are rounded to it. Without the library,
or with ATP_TUNE_ISA=torch, torch's own operations compute the same, slowly.
"""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from atp_tune.utils import system

# --- The library that kernel.c is compiled to, the variants in it, and what is passed to them.
#
# It holds a variant of all loops for each instruction set; ATP_TUNE_ISA names another than the fastest. It has no
# threads of its own: it runs in those of torch's OpenMP runtime, whose GOMP_parallel it gets the address of.

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
_CODES = _VBMI2 | {"avx512vbmi", "avx512_vnni"}
_NEEDS = {
    "avx2": _AVX2, "avx512": _AVX512, "avx512-vbmi2": _VBMI2, "avx512-bf16": _VBMI2 | {"avx512_bf16"},
    "amx": _VBMI2 | {"amx_tile", "amx_bf16"},
}  # fmt: skip
_WITH_CODES = ("amx", "avx512-vbmi2", "avx512-bf16")  # variants beside which there are products with codes
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
        ("zeros", ctypes.c_void_p), ("unit", ctypes.c_float), ("bits", ctypes.c_int32),
    )  # fmt: skip


def address(part: Tensor | None) -> int | None:
    """Where a tensor lies, for the library; it has a null pointer for none."""
    return None if part is None else part.data_ptr()


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
        product_of_many, unpack_codes, decode = loaded.atp_product_of_many, loaded.atp_codes_unpack, loaded.atp_decode
    except (OSError, AttributeError):
        return None
    pointer, number, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    product_of_many.argtypes = (pointer, pointer, small, number, pointer, small)
    for unpack, multiply in ((loaded.atp_unpack, loaded.atp_product), (unpack_codes, loaded.atp_codes_product)):
        unpack.argtypes = (pointer, number, number, pointer, small, small)
        multiply.argtypes = (pointer, pointer, small, small, pointer, small)
    decode.argtypes = (*(pointer,) * 5, number, small, pointer, small)
    loaded.atp_offsets.argtypes = (pointer, number, number, pointer)
    loaded.atp_offsets.restype = number
    loaded.atp_setup()
    return loaded


@cache
def parallel(name: str = "GOMP_parallel") -> int | None:
    """The address of a function of the OpenMP runtime that torch uses; None if it has none, as on macOS."""
    if sys.platform != "linux":
        return None
    try:
        # A symbol is looked for in the library and in those that it was linked to.
        function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")), name)
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
def _chosen(isa: str) -> str | None:
    """The variant that is asked for, or the fastest."""
    possible = variants()
    if isa == TORCH:
        return None
    if isa and isa not in possible:
        raise ValueError(f"ATP_TUNE_ISA={isa}: possible here: {', '.join((*possible, TORCH))}")
    return isa or next(iter(possible), None)


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


INTERFACE = 8  # of what modeling_atp_sparse.py calls; a copy of it lies in each packed folder, perhaps an older one
BATCH = 8  # tokens up to which each weight is expanded to a vector
FLOATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # the numbers are those of kernel.c
# Tokens up to which they go BATCH by BATCH, as in kernel.c.
FEW = dict.fromkeys((*_WITH_CODES, "avx512"), 32)
FASTER = (*FEW, "avx2")  # variants whose loops for dense weights were measured to be faster than torch's
FOR_MANY = (*FASTER, "neon")  # variants with a loop for more tokens
INT8, GROUPED_INT8 = 3, 4

Parts = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # values, bitmask, offsets, scales, bias


def check_interface(version: int) -> None:
    """ImportError unless the file of a packed folder, perhaps of another version of atp_tune, fits this one."""
    if version not in (6, 7, INTERFACE):  # 7 adds codes, 8 decoders
        raise ImportError(
            f"the file of the packed folder wants interface {version} of the kernel, this is {INTERFACE}; "
            "pack the folder again"
        )


class PackedParts:
    """The parts of a packed weight [R, C], checked once.

    Raises ValueError if the tensors are no packed weight: another type, shape or device, or a bitmask that does not
    fit the values.
    """

    device: str | None = "cpu"  # the kind of device that the parts lie on; None: that of the bitmask

    def __init__(
        self,
        values: Tensor,
        bitmask: Tensor,
        columns: int,
        scales: Tensor | None = None,
        bias: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> None:
        """`bias` [R] of a float type.

        `offsets`, as from `row_offsets`, if they are known: then a variant does not compare bitmask and values.
        """
        parts, device = (values, bitmask, scales, bias, offsets), self.device or bitmask.device.type
        if any(part is not None and part.device.type != device for part in parts):
            places = " and ".join(sorted({part.device.type for part in parts if part is not None}))
            raise ValueError(f"packed weight: lies on {places}; needed: {device}")
        _check_bitmask(bitmask, columns)
        rows = len(bitmask)
        if offsets is not None and (
            offsets.dtype != torch.int64 or offsets.shape != (rows + 1,) or not offsets.is_contiguous()
        ):
            raise ValueError(f"packed weight: offsets are {_words(offsets)}; needed: [{rows + 1}] int64")
        if values.dim() != 1 or values.dtype not in (*FLOATS, torch.int8) or not values.is_contiguous():
            raise ValueError(f"packed weight: values are {_words(values)}; needed: [count] of a float type or int8")
        if (values.dtype == torch.int8) != (scales is not None):
            raise ValueError("packed weight: int8 values need scales, others have none")
        if scales is not None:
            groups = scales.shape[1] if scales.dim() == 2 else 0
            fits = groups == 1 or (groups > 1 and columns % groups == 0 and columns // groups % 32 == 0)
            if not fits or len(scales) != rows or scales.dtype != torch.float32 or not scales.is_contiguous():
                needed = f"[{rows}, groups of a multiple of 32 columns] float32"
                raise ValueError(f"packed weight: scales are {_words(scales)}; needed: {needed}")
        if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATS or not bias.is_contiguous()):
            raise ValueError(f"packed weight: bias is {_words(bias)}; needed: [{rows}] of a float type")
        known = offsets if self.device is None or kernel_name() else None  # torch on a CPU looks at the bits itself
        self.offsets = row_offsets(bitmask, columns, len(values)) if known is None else known
        self.shape = (rows, columns)
        self.values, self.bitmask, self.scales, self.bias = values, bitmask, scales, bias
        self._begin()

    def _begin(self) -> None:
        """Prepares for products, once the parts are checked."""


class PackedMatrix(PackedParts):
    """A packed weight [R, C], checked once, and the product with it."""

    def _begin(self) -> None:
        self._name = name = kernel_name()
        self._library = None if name is None else library()
        if name is not None:
            parts = (self.values, self.bitmask, self.offsets, self.scales, self.bias)
            groups = 1 if self.scales is None else self.scales.shape[1]
            self.weight = Weight(
                *map(address, parts), parallel(), *self.shape, len(self.values), groups,
                FLOATS.get(self.values.dtype, INT8 if groups == 1 else GROUPED_INT8),
                0 if self.bias is None else FLOATS[self.bias.dtype], VARIANTS[name], ALONE,
            )  # fmt: skip
            self._at = ctypes.addressof(self.weight)

    def product(self, x: Tensor) -> Tensor | None:
        """The product y [M, R] of x [M, C] and the weight's transpose, plus the bias.

        x is bfloat16, float16 or float32, and so is y. None if the product with the unpacked weight (`rows`) is faster,
        or gives what this would not: of more than BATCH tokens, where the variant has no loop or one is not finite.
        """
        kind, shape = FLOATS.get(x.dtype), x.shape
        if kind is None or len(shape) != 2 or shape[1] != self.shape[1] or not x.is_cpu:
            needed = f"[tokens, {self.shape[1]}] of a float type on the CPU"
            raise ValueError(f"packed weight: x is {_words(x)}; needed: {needed}")
        if not multiplies(self._name, x.dtype, shape[0], self.values.dtype):
            return None
        if self._library is not None:
            return product(self._library, self._at, x, kind, self.shape[0])
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(x.float(), self._plain_rows(0, self.shape[0]).float(), bias).to(x.dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows `first` to `last` with their zeros, [last - first, C], of the values' type.

        int8 values times their scales are float32; `dtype` asks for another float type.
        """
        dtype = dtype or (torch.float32 if self.values.dtype == torch.int8 else self.values.dtype)
        if not 0 <= first <= last <= self.shape[0] or dtype not in FLOATS:
            raise ValueError(f"packed weight: has {self.shape[0]} rows of a float type, not {first} to {last}, {dtype}")
        if self._library is None:
            return self._plain_rows(first, last).to(dtype)
        out = torch.empty(last - first, self.shape[1], dtype=dtype)
        succeed(self._library.atp_unpack(self._at, first, last, out.data_ptr(), FLOATS[dtype], torch.get_num_threads()))
        return out

    def _plain_rows(self, first: int, last: int) -> Tensor:
        """The rows by torch; float32 if they have scales."""
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        scales = None if self.scales is None else self.scales[first:last]
        return _unpacked(self.values[start:stop], self.bitmask[first:last], self.shape[1], scales)


def row_offsets(bitmask: Tensor, columns: int, count: int | None = None) -> Tensor:
    """Where each row's values start, and at the end how many there are: int64 [R + 1], on the bitmask's device.

    Raises ValueError if a bit after the last column is set, or if there are not `count` of them.
    """
    _check_bitmask(bitmask, columns)
    offsets = torch.zeros(len(bitmask) + 1, dtype=torch.int64, device=bitmask.device)
    loaded = library() if bitmask.is_cpu and kernel_name() is not None else None
    if loaded is not None:
        row = int(loaded.atp_offsets(bitmask.data_ptr(), len(bitmask), columns, offsets.data_ptr()))
    else:
        # How many bits of each byte are set, by sums of bits, pairs and fours beside each other.
        pairs = bitmask - (bitmask >> 1 & 0x55)
        fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
        offsets[1:] = (fours + (fours >> 4) & 0x0F).sum(dim=1, dtype=torch.int64).cumsum(dim=0)
        after = (bitmask[:, -1].int() >> (columns - 1) % 8 + 1).nonzero()
        row = int(after[0]) if len(after) else -1
    if row >= 0:
        raise ValueError(f"packed weight: row {row} of the bitmask has a bit after its {columns} columns")
    if count is not None and int(offsets[-1]) != count:
        raise ValueError(f"packed weight: {count} values, but the bitmask has {int(offsets[-1])} bits")
    return offsets


def followed(x: Tensor, *parts: *Parts) -> Tensor:
    """The operator atp_sparse::linear: x [..., C] to [..., R]; `offsets` as from `row_offsets`.

    The kernel's `product`, but where a gradient or a tangent is asked for it consists of torch's own operations.
    """
    values, bitmask, _, scales, bias = parts
    floats = [part for part in (x, values, scales, bias) if part is not None]
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in floats)
    duals = (forward_ad.unpack_dual(part, level=0) for part in floats)  # type: ignore[no-untyped-call]
    if learns or any(dual.tangent is not None for dual in duals):
        weight = _unpacked(values, bitmask, x.shape[-1], scales).to(x.dtype)
        return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return cast("Tensor", torch.ops.atp_sparse.product(x, *parts))


def linear(x: Tensor, *parts: *Parts, kind: Any = PackedMatrix) -> Tensor:
    """The operator atp_sparse::product: `followed` without its question; `kind`: the class of the weight.

    Where `PackedMatrix.product` has none, x is multiplied by the unpacked weight, in its own type.
    """
    values, bitmask, offsets, scales, bias = parts
    return multiplied(kind(values, bitmask, x.shape[-1], scales, bias, offsets), x, bias)


def multiplied(matrix: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Multiplies x [..., C] to [..., R] by a matrix, or by its unpacked weight where it has no product."""
    flat, (rows, _) = x.reshape(-1, x.shape[-1]), matrix.shape
    y: Tensor | None = matrix.product(flat)
    if y is None:
        y = functional.linear(flat, matrix.rows(0, rows, x.dtype), None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], rows)


def multiplies(name: str | None, dtype: torch.dtype, tokens: int, values: torch.dtype) -> bool:
    """Whether a variant multiplies so many tokens of a type; more than a few bfloat16 ones only where torch is slow.

    By tiles it does: those are faster than torch's own, which first puts the unpacked weight into another order.
    """
    if tokens <= BATCH or by_tiles(name, dtype, values):
        return True
    slower = dtype == torch.bfloat16 and torch_multiplies_bf16_fast()
    return name in FOR_MANY and (tokens <= FEW.get(name, 0) or not slower)


def by_tiles(name: str | None, dtype: torch.dtype, values: torch.dtype) -> bool:
    """Whether many tokens are multiplied by the tiles of AMX, in bfloat16."""
    return name == "amx" and dtype == torch.bfloat16 and values in (torch.bfloat16, torch.int8)


torch_multiplies_bf16_fast = cache(system.multiplies_bf16_fast)


def product(loaded: ctypes.CDLL, weight: int, x: Tensor, kind: int, rows: int) -> Tensor | None:
    """The product [M, R] of x, whose shape fits, by the weight at an address; None if many tokens are not finite."""
    x = x.contiguous()
    y = x.new_empty((x.shape[0], rows))
    call = loaded.atp_product if x.shape[0] <= BATCH else loaded.atp_product_of_many
    done = succeed(call(weight, x.data_ptr(), kind, x.shape[0], y.data_ptr(), torch.get_num_threads()))
    return y if done else None


def _check_bitmask(bitmask: Tensor, columns: int) -> None:
    """ValueError unless it is one for so many columns."""
    length = (columns + 7) // 8
    fits = bitmask.dim() == 2 and columns >= 1 and bitmask.shape[1] == length
    if not fits or bitmask.dtype != torch.uint8 or not bitmask.is_contiguous():
        needed = f"[rows, {length}] uint8 for {columns} columns"
        raise ValueError(f"packed weight: bitmask is {_words(bitmask)}; needed: {needed}")


def _words(tensor: Tensor) -> str:
    """Shape, type and place, for messages."""
    order = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}{order}"


def _bits(bitmask: Tensor) -> Tensor:
    """The bits of each row as a mask."""
    return (bitmask[..., None] >> torch.arange(8, dtype=torch.uint8, device=bitmask.device) & 1).flatten(1).bool()


def _unpacked(values: Tensor, bitmask: Tensor, columns: int, scales: Tensor | None) -> Tensor:
    """The weight by torch's operations; float32 if it has scales."""
    kept = _bits(bitmask)[:, :columns]
    weight = values.new_zeros(kept.shape).masked_scatter(kept, values)
    return weight if scales is None else weight * scales.repeat_interleave(columns // scales.shape[1], dim=1)


# --- Products with codes of rounded weights, as they lie in a packed folder (docs/formats.md).
#
# Up to FEW_CODED tokens are rounded to 16 bits, each BLOCK of them by its largest number, and multiplied as integers.
# More are multiplied in their own format by the weights, which are unpacked some rows at a time.

FEW_CODED = 3 * BATCH
# Codes, bitmask, offsets of rows, scales and zero points of blocks, bias.
CodedParts = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]


def multiplies_codes(columns: int, group_size: int) -> bool:
    """Whether this CPU multiplies by codes of so many columns, in groups of so many (-1: all)."""
    size = columns if group_size == -1 else group_size
    return columns % BLOCK == 0 and size % BLOCK == 0 and columns % size == 0 and _of_codes(kernel_name()) is not None


@cache
def _of_codes(name: str | None) -> int | None:
    """The number of the variant that has products with codes where another has the rest; None if none has."""
    if name in _WITH_CODES and _flags() >= _CODES:
        return VARIANTS["avx512-vbmi2"]
    # AMD's CPUs before Zen 3, which have no VAES either, take hundreds of clocks to deposit bits.
    return VARIANTS["avx2"] if name in FASTER and ("vaes" in _flags() or not system.is_amd()) else None


class CheckedCodes:
    """A weight [R, C] of codes (q - z) s, whose parts were checked, and the product with it."""

    def __init__(self, columns: int, unit: Tensor, bits: int, *parts: *CodedParts) -> None:
        codes, bitmask, self.offsets, scales, zeros, bias = self.parts = parts
        self.shape, self.unit = (len(scales), columns), unit
        self.weight = Weight(
            *map(address, (codes, bitmask, self.offsets, scales, bias)), parallel(), *self.shape, len(codes),
            scales.shape[1], 0, 0 if bias is None else FLOATS[bias.dtype], _of_codes(kernel_name()) or 0, ALONE,
            zeros.data_ptr(), float(unit), bits,
        )  # fmt: skip
        self._at = ctypes.addressof(self.weight)

    def product(self, x: Tensor) -> Tensor | None:
        """The product y [M, R] of x [M, C] and the weight's transpose, plus the bias.

        None for more than FEW_CODED tokens, or if one is not finite.
        """
        loaded, (rows, columns) = library(), self.shape
        if loaded is None or x.dtype not in FLOATS or x.dim() != 2 or x.shape[1] != columns or not x.is_cpu:
            raise ValueError(f"packed weight: x is {_words(x)}; needed: [tokens, {columns}] of a float type")
        if len(x) > FEW_CODED:
            return None
        x, y, done = x.contiguous(), x.new_empty((len(x), rows)), True
        for few, into in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            words = few.data_ptr(), FLOATS[x.dtype], len(few), into.data_ptr(), torch.get_num_threads()
            done &= succeed(loaded.atp_codes_product(self._at, *words))
        return y if done else None

    def rows(self, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows `first` to `last` with their zeros, [last - first, C]."""
        out = torch.empty(last - first, self.shape[1], dtype=dtype)
        self._unpack(first, last, out.data_ptr(), dtype)
        return out

    def constant(self) -> Tensor:
        """The weight [R, C], float32, as a constant of a graph that is traced."""
        out = bytearray(4 * self.shape[0] * self.shape[1])
        self._unpack(0, self.shape[0], ctypes.addressof(ctypes.c_char.from_buffer(out)), torch.float32)
        return torch.frombuffer(out, dtype=torch.float32).view(self.shape)

    def _unpack(self, first: int, last: int, place: int, dtype: torch.dtype) -> None:
        loaded = library()
        assert loaded is not None
        succeed(loaded.atp_codes_unpack(self._at, first, last, place, FLOATS[dtype], torch.get_num_threads()))

    def nonzeros(self) -> int:
        """The number of weights that are not 0."""
        rows, step = self.shape[0], max(1, (1 << 20) // self.shape[1])
        return sum(int(self.rows(a, min(a + step, rows)).count_nonzero()) for a in range(0, rows, step))


class CodedMatrix(CheckedCodes):
    """A weight of codes, for sizes that `multiplies_codes`.

    Raises ValueError if the tensors are none.
    """

    def __init__(
        self, codes: Tensor, bits: int, scales: Tensor, zeros: Tensor, exponent: int, columns: int,
        bitmask: Tensor | None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        """codes: uint8 [⌈count·bits/8⌉], the lowest bit first, of all weights or of those in the bitmask.

        scales: float16 [R, groups], times two to the exponent; zeros: z, uint8 [R, groups].
        """
        parts = codes, bitmask, scales, zeros, bias
        (rows, groups), offsets = scales.shape if scales.dim() == 2 else (0, 0), torch.empty(0)
        fits = (
            groups > 0
            and columns % groups == 0
            and multiplies_codes(columns, columns // groups)
            and all(part is None or (part.is_cpu and part.is_contiguous()) for part in parts)
            and codes.dtype == zeros.dtype == torch.uint8
            and scales.dtype == torch.float16
            and scales.shape == zeros.shape
            and (bitmask is None or len(bitmask) == rows)
            and (bias is None or (bias.shape == (rows,) and bias.dtype in FLOATS))
        )
        count = rows * columns
        if fits and bitmask is not None:
            offsets = row_offsets(bitmask, columns)
            count = int(offsets[-1])
        if not fits or codes.shape != (-(-count * bits // 8),):
            raise ValueError(f"packed weight: {_words(codes)} are no codes of {count} weights in {_words(scales)}")
        # What each block of columns has; of groups of one block the scales themselves.
        if (many := columns // BLOCK // groups) > 1:
            scales, zeros = (part.repeat_interleave(many, 1) for part in (scales, zeros))
        super().__init__(columns, torch.tensor(2.0**exponent), bits, codes, bitmask, offsets, scales, zeros, bias)


def coded_linear(x: Tensor, unit: Tensor, bits: int, *parts: *CodedParts) -> Tensor:
    """The operator atp_sparse::coded: x [..., C] to [..., R]; `unit` and parts as of a `CodedMatrix`."""
    return multiplied(CheckedCodes(BLOCK * parts[3].shape[1], unit, bits, *parts), x, parts[-1])


OPERATORS = torch.library.Library("atp_sparse", "DEF")  # type: ignore[no-untyped-call]
for name in ("linear", "product"):
    OPERATORS.define(  # type: ignore[no-untyped-call]
        f"{name}(Tensor x, Tensor values, Tensor bitmask, Tensor offsets, Tensor? scales, Tensor? bias) -> Tensor"
    )
OPERATORS.define(  # type: ignore[no-untyped-call]
    "coded(Tensor x, Tensor unit, int bits, Tensor codes, Tensor? bitmask, Tensor offsets, Tensor scales, "
    "Tensor zeros, Tensor? bias) -> Tensor"
)
OPERATORS.impl("coded", coded_linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "atp_sparse::coded", lambda x, unit, bits, *parts: x.new_empty((*x.shape[:-1], len(parts[3]))), lib=OPERATORS
)
OPERATORS.impl("linear", followed, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
OPERATORS.impl("product", linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "atp_sparse::product", lambda x, *parts: x.new_empty((*x.shape[:-1], parts[1].shape[0])), lib=OPERATORS
)


# --- Products with a weight that is not packed, by the loops of the kernel, as of the head of a packed model.
#
# Up to BATCH tokens read each weight once, so that bytes are time, and these loops read them faster than torch's.

DENSE = {torch.bfloat16: 5, torch.float32: 6}  # the numbers are those of kernel.c
BLOCK = 64  # columns that it reads at once; a row of another length would be multiplied with what follows it


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The product y [..., R] of x [..., C] and the transpose of a weight [R, C], plus the bias, all of one type.

    Sums are in float32; the same input gives the same bits. None where the loops are not for it: by another variant
    than those in FASTER, for more than BATCH tokens, on another device, of another type than bfloat16 or float32, where
    autocast or anything else follows the operations or a gradient is wanted, or if C is no multiple of BLOCK.
    """
    learns = torch.is_grad_enabled() and x.requires_grad
    if watched(x, weight, bias) or learns or torch.is_autocast_enabled("cpu"):
        return None
    rows, columns = weight.shape
    if x.shape[-1] != columns or not 1 <= x.numel() // columns <= BATCH or not x.is_cpu:
        return None
    fields, loaded = dense_weight(weight, bias, x.dtype), library()
    if fields is None or loaded is None:
        return None
    y = product(loaded, ctypes.addressof(fields), x.reshape(-1, columns), FLOATS[x.dtype], rows)
    assert y is not None  # few tokens have no other way
    return y.view(*x.shape[:-1], rows)


def dense_weight(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Weight | None:
    """The arguments of the library for a weight [R, C] that is not packed; None where the loops are not for it."""
    parts, name = [weight] if bias is None else [weight, bias], kernel_name()
    fits = all(part.is_cpu and part.dtype == dtype and part.is_contiguous() for part in parts) and dtype in DENSE
    if not fits or weight.shape[1] % BLOCK or name not in FASTER:
        return None
    return Weight(
        weight.data_ptr(), None, None, None, address(bias), parallel(), *weight.shape, weight.numel(), 1,
        DENSE[dtype], FLOATS[dtype], VARIANTS[name], ALONE,
    )  # fmt: skip
