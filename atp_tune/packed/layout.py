"""The layout of a packed tensor: its nonzero values row by row, and a bit for each weight. Format: docs/formats.md.

Source: the layout is that of `sparse-bitmask` in compressed-tensors 0.13 and earlier, without its row offsets, which
follow from the bits.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_tune.packed.modeling_atp_sparse import (
    BITMASK,
    CODES,
    GROUP,
    LEAST,
    SCALES,
    VALUES,
    ZEROS,
    SparseLinear,
    Table,
    bitmask_of,
    groups_of,
    read_packed,
)
from atp_tune.pruners.rounding import Grid
from atp_tune.pruners.selection import INTEGERS

Kind = Literal["same", "bf16", "int8"]  # number format of the values
LARGEST = 127  # code of int8


def zero_share(dense: Tensor) -> float:
    """The share of zeros; -0.0 is none, so that unpacking restores each bit."""
    return (dense.numel() - int(_kept(dense).sum())) / dense.numel() if dense.numel() else 0.0


def pack(dense: Tensor, kind: Kind, group_size: int | None = None) -> dict[str, Tensor]:
    """The tensors of a packed one [..., columns], by the ends of their names.

    `group_size`: columns that share a scale of int8 codes, where it divides the columns; None: all of a row.
    """
    kept, (*rows, columns) = _kept(dense), dense.shape
    packed = {BITMASK: bitmask_of(kept)}
    if kind != "int8":
        return {VALUES: dense[kept].to(torch.bfloat16 if kind == "bf16" else dense.dtype), **packed}
    grouped = dense.float().reshape(*rows, groups_of(columns, group_size), -1)
    scales = grouped.abs().amax(-1) / LARGEST
    codes = (grouped / scales.where(scales > 0, 1).unsqueeze(-1)).round().flatten(-2)
    return {VALUES: codes[kept].to(torch.int8), SCALES: scales, **packed}


def packed_bytes(dense: Tensor) -> int:
    """Bytes of a tensor [..., columns] in a packed folder; its own if it has too few zeros."""
    if dense.dim() < 2 or not dense.is_floating_point() or not dense.numel():
        return dense.nbytes
    rows, zeros = dense.numel() // dense.shape[-1], dense.numel() - int(_kept(dense).sum())
    return matrix_bytes(rows, dense.shape[-1], zeros, dense.element_size())


def matrix_bytes(rows: int, columns: int, zeros: int, itemsize: int) -> int:
    """Bytes of a matrix in a packed folder, its values in their own number format of `itemsize` bytes."""
    size = rows * columns
    if zeros / size < LEAST:
        return size * itemsize
    return (size - zeros) * itemsize + rows * -(-columns // 8)


def packed_linear(linear: Any, kind: Kind = "same") -> SparseLinear:
    """A packed linear with the weight and bias of an `nn.Linear` or a `Conv1D`."""
    dense = linear.weight.detach()
    parts = pack(dense.T.contiguous() if isinstance(linear, Conv1D) else dense, kind)
    packed = SparseLinear(linear, len(parts[VALUES]), parts[VALUES].dtype)
    for end, part in parts.items():
        setattr(packed, f"weight{end}", nn.Parameter(part, requires_grad=False))
    packed.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    packed.check()  # a graph that is compiled next needs its offsets
    return packed


def _kept(dense: Tensor) -> Tensor:
    return dense.contiguous().view(INTEGERS[dense.element_size()]) != 0


# --- Codes of rounded weights, as they lie in a packed folder: the inverse of `modeling_atp_sparse.read_codes`.
#
# A weight is (q - z) Δ, with the code q and the zero point z of `bits` bits each, and the scale Δ of its group, which
# is stored in float16 times a power of two of the matrix. Format: docs/formats.md.

INT8 = range(-128, 128)
EXPONENT = 15  # exponent below which the largest scale lies: float16 has full precision down to 2^-29 of it


@dataclass(frozen=True)
class Coded:
    """A coded tensor: its entry in the table of a config, its parts by the ends of their names, and whether all q - z
    fit int8.
    """

    about: Table
    parts: dict[str, Tensor]
    fits: bool

    def decoded(self) -> Tensor:
        """The weights, float32, as every reader computes them."""
        return read_packed(self.parts.get, "", self.about)

    def scaled(self, factors: Tensor) -> "Coded":
        """The tensor with each group's scale multiplied by its factor.

        `factors`: shaped as the dense tensor, equal within a group.
        """
        form, ordered = self.about["codes"], factors.mT if self.about.get("transposed") else factors
        size = ordered.shape[-1] if form["group_size"] == -1 else form["group_size"]
        scales = self.parts[SCALES].float() * 2.0 ** form["exponent"] * ordered[..., ::size]
        halves, exponent = in_16_bits(scales, scales != 0)
        about = {**self.about, "codes": {**form, "exponent": exponent}}
        return replace(self, about=about, parts={**self.parts, SCALES: halves})


def encode(weight: Tensor, grid: Grid, code_bits: int, group_size: int, symmetric: bool, transposed: bool) -> Coded:
    """The codes of rounded weights [..., rows, columns] on a grid with scales and zero points [..., rows, groups].

    group_size: consecutive columns of a group, -1: all; transposed: the dense tensor has the last two sides exchanged.
    Zeros are left out, and a bit for each weight is stored, where that takes less.
    Errors: ValueError for a weight that is not on the grid, bit for bit, and for scales that 16 bits cannot hold.
    """
    size = weight.shape[-1] if group_size == -1 else group_size
    scales, zeros = (spread(part, size, weight.shape[-1]) for part in (grid.scale, grid.zero))
    # Integers whose products with the scales are the weights, bit for bit, in their dtype. In bfloat16 two products
    # above 128 may be the same weight; either is right.
    nearest, low, high = (weight.float() / scales).round(), -zeros, grid.top - zeros
    multiples, *others = ((nearest + step).clamp(low, high) for step in (0, 1, -1))
    for other in others:
        wrong = (multiples * scales).to(weight.dtype) != weight
        multiples = multiples.where(~wrong, other) if bool(wrong.any()) else multiples
    if not torch.equal((multiples * scales).to(weight.dtype), weight):
        raise ValueError("a weight is not on the grid of its quantizer")
    if symmetric and not bool((grid.zero == 2 ** (code_bits - 1)).all()):
        raise ValueError("its zero points are not in the middle")
    codes, kept = multiples + zeros, multiples != 0
    nonzeros = int(kept.sum())
    masked = (weight.numel() - nonzeros) * code_bits > weight.numel()
    used = nn.functional.pad(kept, (0, -weight.shape[-1] % size)).view(*grid.scale.shape, size).any(-1)
    halves, exponent = in_16_bits(grid.scale, used)
    parts = {CODES: pack_codes(codes[kept] if masked else codes, code_bits), SCALES: halves}
    if not symmetric:
        parts[ZEROS] = pack_codes(grid.zero, code_bits)
    if masked:
        parts[BITMASK] = bitmask_of(kept)
    form = {"bits": code_bits, "group_size": group_size, "symmetric": symmetric, "mask": masked, "exponent": exponent}
    shape = weight.mT.shape if transposed else weight.shape
    about = {"shape": [*shape], **({"transposed": True} if transposed else {}), "nonzeros": nonzeros, "codes": form}
    return Coded(about, parts, fits=all(int(end) in INT8 for end in multiples.aminmax()))


def spread(groups: Tensor, size: int, columns: int) -> Tensor:
    """Spreads values of groups [..., groups] over their columns [..., columns]; the last group may be smaller."""
    return groups.repeat_interleave(size, -1)[..., :columns]


def in_16_bits(scale: Tensor, used: Tensor) -> tuple[Tensor, int]:
    """Scales as float16, and the exponent of the power of two that they are multiplied by; 0 for groups of zeros.

    used: mask of groups that have another weight than 0. Errors: ValueError if the scale of one would be 0.
    """
    largest = scale[used].max() if used.any() else torch.tensor(1.0)
    exponent = max(int(torch.frexp(largest).exponent) - EXPONENT, -126)
    halves = (scale * 2.0**-exponent).where(used, 0).half()
    if not (halves[used] > 0).all() or not halves.isfinite().all():
        raise ValueError("scales of its groups are too far apart for 16 bits")
    return halves, exponent


def pack_codes(codes: Tensor, code_bits: int) -> Tensor:
    """Integers from 0 to 2^code_bits - 1 one after the other, uint8 [⌈count·code_bits/8⌉], the lowest bit first."""
    count = codes.numel()
    words = nn.functional.pad(codes.flatten().to(torch.int16), (0, -count % 8)).view(-1, 8)
    octets = torch.zeros(len(words), code_bits, dtype=torch.int16)
    for index in range(8):
        first, shift = divmod(index * code_bits, 8)
        word = words[:, index] << shift
        octets[:, first] |= word & 255
        if shift + code_bits > 8:
            octets[:, first + 1] |= word >> 8
    return octets.to(torch.uint8).flatten()[: -(-count * code_bits // 8)].clone()


def fits_kernel(about: Table) -> bool:
    """Whether the kernel of int8 values has scales for such groups."""
    size: int = about["codes"]["group_size"]
    columns: int = about["shape"][-2 if about.get("transposed") else -1]
    return size == -1 or size >= columns or (size % GROUP == 0 and columns % size == 0)
