"""Products with a packed weight on a GPU, as Triton kernels; `kernel` says what a packed weight is.

A program takes ROWS rows and goes along them BYTES bytes of the bitmask at a time. A running sum of the bits that are
set tells each byte where its values start. Then, bit by bit, the lanes fetch the value of their byte's column where its
bit is set, and 0 elsewhere, so that an input that is not finite gives what it gives with the dense weight.

One token is multiplied in float32, lane by lane. Up to 16 tokens are multiplied by the tensor cores: for each bit a
tile of weights [ROWS, BYTES], rounded to the type of x, with the inputs [BYTES, 16] of the same columns, summed in
float32.

Of a row's width the code has only the largest power of 2 up to WHOLE that divides it: as a factor, it tells Triton how
addresses are aligned. So almost all widths share their code; one of a multiple of WHOLE has no masks.

Not run on a GPU so far: the tests compile the kernels for several GPUs, and run them in Triton's interpreter.
"""

from contextlib import nullcontext
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

BATCH = 16  # tokens at most
WHOLE = 256  # columns that a program takes at a time, at most


def product(
    x: Tensor, values: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The product y [M, R] of x [M, C], M at most BATCH, and the packed weight's transpose, plus the bias."""
    x = x.contiguous()
    tokens, columns = x.shape
    rows, length = bitmask.shape
    y = x.new_empty(tokens, rows)
    many = tokens > 1
    height, width = (32, max(16, _width(length))) if many else (8, _width(length))
    kind = tl.float32 if INTERPRETED else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
    with _on(x):
        _multiply[(triton.cdiv(rows, height),)](
            x, values, bitmask, offsets, scales, bias, y, tokens, rows, *_units(columns),
            _bytes_of_group(scales, columns), BATCH if many else 1, height, width, kind,
        )  # fmt: skip
    return y


def unpacked(
    values: Tensor, bitmask: Tensor, offsets: Tensor, scales: Tensor | None, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight with its zeros, [R, C], of a float type."""
    rows, length = bitmask.shape
    out = values.new_empty(rows, columns, dtype=dtype)
    with _on(values):
        _unpack[(triton.cdiv(rows, 4),)](
            values, bitmask, offsets, scales, out, rows, *_units(columns),
            _bytes_of_group(scales, columns), 4, _width(length),
        )  # fmt: skip
    return out


def _units(columns: int) -> tuple[int, int]:
    """A number of columns as a product, of which the second number alone is a constant of the code: few have many."""
    unit = gcd(columns, WHOLE)
    return columns // unit, unit


def _bytes_of_group(scales: Tensor | None, columns: int) -> int:
    """Bytes of the bitmask that share a scale; 0 without scales, -1 for one scale of a whole row."""
    if scales is None:
        return 0
    return -1 if scales.shape[1] == 1 else -(-columns // 8) // scales.shape[1]


def _width(length: int) -> int:
    """Bytes of the bitmask that a program takes at a time."""
    return min(WHOLE // 8, int(triton.next_power_of_2(length)))


def _on(tensor: Tensor) -> torch.cuda.device | nullcontext[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["tokens", "rows", "units"])  # type: ignore[untyped-decorator]
def _multiply(
    x_at: tl.tensor, values_at: tl.tensor, bitmask_at: tl.tensor, offsets_at: tl.tensor, scales_at: tl.tensor,
    bias_at: tl.tensor, y_at: tl.tensor, tokens: int, rows: int, units: int,
    UNIT: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    KIND: tl.constexpr,
) -> None:  # fmt: skip
    columns, length = units * UNIT, tl.cdiv(units * UNIT, 8) if UNIT % 8 else units * (UNIT // 8)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    inside = row < rows
    first = tl.load(offsets_at + row, mask=inside, other=0).to(tl.uint32)
    sums = tl.zeros((ROWS, BYTES if TOKENS == 1 else TOKENS), tl.float32)
    for step in range(0, length, BYTES):
        byte, there, bits, start, low, high, first = _bits(
            values_at, bitmask_at, row, inside, step, length, first, UNIT, BYTES
        )
        for bit in tl.static_range(8):
            # Addresses grow along a row: the hint keeps lanes along it too. Without it Triton 3.6 puts rows first,
            # converts a tile of pointers for each bit, and touches twice as many lines of the cache.
            before = ((low if bit < 4 else high) >> (8 * (bit % 4))) & 0xFF
            address = tl.max_contiguous(start + before, (1, 2))
            weight = tl.load(address, mask=(bits & (1 << bit)) != 0, other=0).to(tl.float32)
            if GROUP:
                weight *= _scales(scales_at, row, inside, byte, there, length, GROUP)
            column = 8 * byte + bit
            within = column < columns if UNIT % 8 else there  # a byte without a column too many
            if TOKENS == 1:
                x = tl.load(x_at + column, mask=within, other=0.0)
                sums += weight * x.to(tl.float32)[None, :]
            else:
                fits = within[:, None] & (token < tokens)[None, :]
                x = tl.load(x_at + token[None, :] * columns + column[:, None], mask=fits, other=0.0)
                sums = tl.dot(weight.to(x.dtype).to(KIND), x.to(KIND), sums)
    if TOKENS == 1:
        sums = tl.sum(sums, axis=1)[:, None]
    if bias_at is not None:
        sums += tl.load(bias_at + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    at = token[None, :] * rows + row[:, None]
    tl.store(y_at + at, sums.to(y_at.dtype.element_ty), mask=inside[:, None] & (token < tokens)[None, :])


@triton.jit(do_not_specialize=["rows", "units"])  # type: ignore[untyped-decorator]
def _unpack(
    values_at: tl.tensor, bitmask_at: tl.tensor, offsets_at: tl.tensor, scales_at: tl.tensor, out_at: tl.tensor,
    rows: int, units: int, UNIT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
) -> None:  # fmt: skip
    columns, length = units * UNIT, tl.cdiv(units * UNIT, 8) if UNIT % 8 else units * (UNIT // 8)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    first = tl.load(offsets_at + row, mask=inside, other=0).to(tl.uint32)
    for step in range(0, length, BYTES):
        byte, there, bits, start, low, high, first = _bits(
            values_at, bitmask_at, row, inside, step, length, first, UNIT, BYTES
        )
        # All bits at once: a store for each of them would write 2 bytes of each 16, and a sector of the cache 8 times.
        bit = tl.arange(0, 8)[None, None, :]
        before = (tl.where(bit < 4, low[:, :, None], high[:, :, None]) >> (8 * (bit % 4))) & 0xFF
        weight = tl.load(start[:, :, None] + before, mask=(bits[:, :, None] & (1 << bit)) != 0, other=0).to(tl.float32)
        if GROUP:
            weight *= _scales(scales_at, row, inside, byte, there, length, GROUP)[:, :, None]
        column = 8 * byte[None, :, None] + bit
        within = column < columns if UNIT % 8 else there[None, :, None]
        at = row.to(tl.int64)[:, None, None] * columns + column
        tl.store(out_at + at, weight.to(out_at.dtype.element_ty), mask=inside[:, None, None] & within)


@triton.jit  # type: ignore[untyped-decorator]
def _bits(
    values_at: tl.tensor, bitmask_at: tl.tensor, row: tl.tensor, inside: tl.tensor, step: tl.tensor,
    length: tl.tensor, first: tl.tensor, UNIT: tl.constexpr, BYTES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Reads bytes [ROWS, BYTES] of the bitmask.

    Returns their places in a row, which of these are there, the bytes, where the values of each start, how many values
    each bit of a half has before it in its byte, and where the values after all of them start, [ROWS].

    A factor puts the four bits of a half into the four bytes of a word; another adds to each byte those below it.
    """
    byte = step + tl.arange(0, BYTES)
    there = byte < length if UNIT % (8 * BYTES) else tl.full((BYTES,), True, tl.int1)  # then without masks
    at = row.to(tl.int64)[:, None] * length + byte[None, :]
    bits = tl.load(bitmask_at + at, mask=inside[:, None] & there[None, :], other=0).to(tl.uint32)
    low = ((bits & 0xF) * 0x204081) & 0x1010101
    high = ((bits >> 4) * 0x204081) & 0x1010101
    up_to_low = low * 0x1010101
    up_to_high = (high + (up_to_low >> 24)) * 0x1010101
    ones = up_to_high >> 24
    start = values_at + (first[:, None] + (tl.cumsum(ones, axis=1) - ones))
    return byte, there, bits, start, up_to_low - low, up_to_high - high, first + tl.sum(ones, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _scales(
    scales_at: tl.tensor, row: tl.tensor, inside: tl.tensor, byte: tl.tensor, there: tl.tensor, length: tl.tensor,
    GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The scale of each byte [ROWS, BYTES]."""
    if GROUP < 0:
        group = row[:, None] + tl.minimum(byte, 0)[None, :]
    else:
        group = row[:, None] * (length // GROUP) + byte[None, :] // GROUP
    return tl.load(scales_at + group, mask=inside[:, None] & there[None, :], other=0.0)


INTERPRETED = not isinstance(_multiply, triton.JITFunction)  # whose products of bfloat16 are wrong: it has float32's
