"""The values that a group of weights may have: integers q from 0 to 2^b - 1, a scale and a zero point.

    ŵ = (q - z) Δ        q = clamp(round(w / Δ) + z, 0, 2^b - 1)

    asymmetric    Δ = (max(w, 0) - min(w, 0)) / (2^b - 1)        z = round(-min(w, 0) / Δ)
    symmetric     Δ = 2 max |w| / (2^b - 1)                      z = 2^(b-1)

max and min over the group: consecutive inputs of one row, the last group may be smaller. z is an integer, so that 0 is
one of the values in both. A group of zeros stays zero. `round` rounds halves to the even neighbour.

As compressed-tensors, which llm-compressor uses. Source: Frantar et al., "GPTQ", ICLR 2023, and their code (quant.py),
where the Δ of a symmetric group whose weights have one sign is half of this.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Scale Δ and zero point z of each group, float32 of equal shapes; `top` is 2^b - 1."""

    scale: Tensor
    zero: Tensor
    top: float

    @classmethod
    def of(cls, groups: Tensor, bits: int, symmetric: bool) -> "Grid":
        """The grid of each group of weights [..., group], float32; scale and zero are [..., 1]."""
        top = float(2**bits - 1)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = (high - low) / top
        scale = torch.where(scale == 0, 1, scale)
        zero = torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else (-low / scale).round()
        return cls(scale, zero, top)

    def nearest(self, weights: Tensor) -> Tensor:
        """The values nearest to weights, whose shape matches that of the scales."""
        q = (weights / self.scale).round_().add_(self.zero).clamp_(0, self.top)
        return q.sub_(self.zero).mul_(self.scale)


def parts_of(columns: int, group_size: int) -> list[tuple[slice, int]]:
    """The groups of that many columns: all whole ones together, then the smaller last one, each with its size.

    A group size of -1 is one group for all columns.
    """
    size = columns if group_size == -1 else min(group_size, columns)
    whole = columns - columns % size
    parts = [(slice(0, whole), size), (slice(whole, columns), columns - whole)]
    return [(part, size) for part, size in parts if size]
