"""Codes of rounded weights, as they lie in a packed folder: the inverse of `modeling_atp_sparse.read_codes`.

A weight is (q - z) Δ, with the code q and the zero point z of `bits` bits each, and the scale Δ of its group, which is
stored in float16 times a power of two of the matrix. Format: docs/formats.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.packed.modeling_atp_sparse import BITMASK, CODES, GROUP, SCALES, ZEROS, bitmask_of, read_packed
from atp_tune.pruners.rounding import Grid

INT8 = range(-128, 128)
LARGEST = 15  # exponent below which the largest scale lies: float16 has full precision down to 2^-29 of it


@dataclass(frozen=True)
class Coded:
    """A coded tensor: its entry in the table of a config, its parts by the ends of their names, and whether all q - z
    fit int8.
    """

    about: dict[str, Any]
    parts: dict[str, Tensor]
    fits: bool

    def decoded(self) -> Tensor:
        """The weights, float32, as every reader computes them."""
        return read_packed(self.parts.get, "", self.about)


def encode(weight: Tensor, grid: Grid, bits: int, group_size: int, symmetric: bool, transposed: bool) -> Coded:
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
    if symmetric and not bool((grid.zero == 2 ** (bits - 1)).all()):
        raise ValueError("its zero points are not in the middle")
    codes, kept = multiples + zeros, multiples != 0
    nonzeros = int(kept.sum())
    masked = (weight.numel() - nonzeros) * bits > weight.numel()
    used = nn.functional.pad(kept, (0, -weight.shape[-1] % size)).view(*grid.scale.shape, size).any(-1)
    halves, exponent = in_16_bits(grid.scale, used)
    parts = {CODES: pack_codes(codes[kept] if masked else codes, bits), SCALES: halves}
    if not symmetric:
        parts[ZEROS] = pack_codes(grid.zero, bits)
    if masked:
        parts[BITMASK] = bitmask_of(kept)
    form = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "mask": masked, "exponent": exponent}
    shape = weight.mT.shape if transposed else weight.shape
    about = {"shape": [*shape], **({"transposed": True} if transposed else {}), "nonzeros": nonzeros, "codes": form}
    return Coded(about, parts, fits=int(multiples.min()) in INT8 and int(multiples.max()) in INT8)


def spread(groups: Tensor, size: int, columns: int) -> Tensor:
    """Spreads values of groups [..., groups] over their columns [..., columns]; the last group may be smaller."""
    return groups.repeat_interleave(size, -1)[..., :columns]


def in_16_bits(scale: Tensor, used: Tensor) -> tuple[Tensor, int]:
    """Scales as float16, and the exponent of the power of two that they are multiplied by; 0 for groups of zeros.

    used: mask of groups that have another weight than 0. Errors: ValueError if the scale of one would be 0.
    """
    largest = scale[used].max() if used.any() else torch.tensor(1.0)
    exponent = max(int(torch.frexp(largest).exponent) - LARGEST, -126)
    halves = (scale * 2.0**-exponent).where(used, 0).half()
    if not (halves[used] > 0).all():
        raise ValueError("scales of its groups are too far apart for 16 bits")
    return halves, exponent


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1 one after the other, uint8 [⌈count·bits/8⌉], the lowest bit first."""
    count, eights = codes.numel(), -(-codes.numel() // 8)
    words = nn.functional.pad(codes.flatten().to(torch.int16), (0, eights * 8 - count)).view(eights, 8)
    octets = torch.zeros(eights, bits, dtype=torch.int16)
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        word = words[:, place] << shift
        octets[:, first] |= word & 255
        if shift + bits > 8:
            octets[:, first + 1] |= word >> 8
    return octets.to(torch.uint8).flatten()[: -(-count * bits // 8)].clone()


def fits_kernel(about: dict[str, Any]) -> bool:
    """Whether the kernel of int8 values has scales for such groups."""
    size: int = about["codes"]["group_size"]
    columns: int = about["shape"][-2 if about.get("transposed") else -1]
    return size == -1 or size >= columns or (size % GROUP == 0 and columns % size == 0)
