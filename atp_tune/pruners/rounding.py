"""The values that a group of weights may have: integers q from 0 to 2^b - 1, a scale and a zero point.

    ŵ = (q - z) Δ        q = clamp(round(w / Δ) + z, 0, 2^b - 1)

    asymmetric    Δ = (max(w, 0) - min(w, 0)) / (2^b - 1)        z = round(-min(w, 0) / Δ)
    symmetric     Δ = 2 max |w| / (2^b - 1)                      z = 2^(b-1)

max and min over the group: consecutive inputs of one row, the last group may be smaller. z is an integer, so that 0 is
one of the values in both. A group of zeros stays zero. `round` rounds halves to the even neighbour.

As compressed-tensors, which llm-compressor uses. Source: Frantar et al., "GPTQ", ICLR 2023, and their code (quant.py),
where the Δ of a symmetric group whose weights have one sign is half of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atp_tune.pruners import Measures, Statistics, Unprepared
from atp_tune.pruners.selection import grouped, ungrouped
from atp_tune.pruners.sparsegpt import change_by_blocks, through_strips
from atp_tune.pruners.statistics import Hessian


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
        return cls(scale, torch.full_like(scale, 2.0 ** (bits - 1)) if symmetric else (-low / scale).round(), top)

    def nearest(self, weights: Tensor) -> Tensor:
        """The values nearest to weights, whose shape matches that of the scales."""
        return (weights / self.scale).round_().add_(self.zero).clamp_(0, self.top).sub_(self.zero).mul_(self.scale)


# --- RTN: rounds each weight to the nearest value of its group; needs no inputs.


@dataclass(frozen=True)
class RTN(Unprepared):
    """Rounds to nearest, in groups of `group_size` inputs of a row (-1: the whole row); computes in float32."""

    group_size: int
    symmetric: bool
    damping: float = 0.01  # of GPTQ
    act_order: bool = False  # of GPTQ

    measures: ClassVar[Measures] = None

    def quantize(self, weight: Tensor, bits: int, statistics: Statistics | None, zeros: Tensor | None = None) -> Tensor:
        """A copy of weight [out, in] with at most 2^bits values in each group; 0 stays 0."""
        groups = [part.float() for part in grouped(weight, self.group_size)]
        rounded = [Grid.of(part, bits, self.symmetric).nearest(part) for part in groups]
        return ungrouped(rounded, len(weight)).to(weight.dtype)

    def grid(self, weight: Tensor, bits: int) -> Grid:
        """The scale and zero point [out, groups] of each group of weight [out, in]; GPTQ's are the same."""
        grids = [Grid.of(part.float(), bits, self.symmetric) for part in grouped(weight, self.group_size)]
        scales = ungrouped([one.scale for one in grids], len(weight))
        return Grid(scales, ungrouped([one.zero for one in grids], len(weight)), grids[0].top)


# --- GPTQ: rounds column by column and updates the columns to the right to compensate for the error.
#
# W weight [out, in]; U upper triangular [in, in] with UᵀU the inverse of the damped Hessian H. For each column j, from
# the left:
#
#     e = (W_j - Ŵ_j) / U_jj        W_k ← W_k - e U_jk  for all k > j
#
# Ŵ_j are the values of the grid nearest to W_j as updated. Each group's grid is that of the dense weights, as RTN's
# and llm-compressor's; the authors' `static_groups` zero weights on dead inputs first. Weights on inputs that were
# always zero become 0. With `act_order` the columns go by the sums of squares of their inputs, the largest first, so
# that those which matter most are rounded while the most others can make up for them; a group stays consecutive
# inputs.
#
# As in `pruners.sparsegpt` H is not inverted: R = U⁻¹ comes from one Cholesky factorisation, and a block of columns is
# updated by all blocks to its left at once. Within a block the loop goes column by column: `plain` on any device,
# `strips` on the CPU.
#
# Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
# 2023, algorithm 1; act-order is from their code.

COLUMNS = 128  # in a block; any number gives the same weights, but for rounding


@dataclass(frozen=True)
class GPTQ(RTN):
    """Rounds weights and updates the others; computes in float32, returns the dtype of the weight."""

    measures: ClassVar[Measures] = Hessian

    def prepare(self, statistics: Statistics) -> None:
        """Factorises the Hessian."""
        assert isinstance(statistics, Hessian)
        statistics.factor(self.damping, self.act_order)

    def quantize(self, weight: Tensor, bits: int, statistics: Statistics | None, zeros: Tensor | None = None) -> Tensor:
        """A copy of weight [out, in] with at most 2^bits values in each group; statistics are the inputs' `Hessian`.

        `zeros`: mask [out, in] of weights that are 0 and stay 0; the others make up for them too.
        """
        assert isinstance(statistics, Hessian)
        R = statistics.factor(self.damping, self.act_order)
        W = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        # The grid of each column of W [in, out], with scales and zero points [out].
        grids = list[Grid]()
        for group in torch.split(W, len(W) if self.group_size == -1 else self.group_size):
            grid = Grid.of(group.T, bits, self.symmetric)
            grids += [Grid(grid.scale[:, 0], grid.zero[:, 0], grid.top)] * len(group)
        W[statistics.dead()] = 0  # W is [in, out], so that columns are contiguous
        order = statistics.order() if self.act_order else None
        if order is not None:
            W, grids = W[order], [grids[j] for j in order.tolist()]
            zeros = None if zeros is None else zeros[:, order]
        by = strips if W.device.type == "cpu" else plain

        def rounded(updated: Tensor, U: Tensor, here: slice) -> Tensor:
            return by(updated, U, grids[here], None if zeros is None else zeros.T[here])

        change_by_blocks(W, R, COLUMNS, rounded)
        if order is not None:
            W = torch.empty_like(W).index_copy_(0, order, W)
        return W.to(weight.dtype).T


def plain(W: Tensor, U: Tensor, grids: Sequence[Grid], zeros: Tensor | None = None) -> Tensor:
    """The rounded columns [B, out]; overwrites W. The reference for `strips`."""
    rounded = torch.empty_like(W)
    for j, grid in enumerate(grids):
        rounded[j] = grid.nearest(W[j])
        if zeros is not None:
            rounded[j].masked_fill_(zeros[j], 0)
        W[j + 1 :].addr_(U[j, j + 1 :], (W[j] - rounded[j]) / U[j, j], alpha=-1)
    return rounded


def strips(W: Tensor, U: Tensor, grids: Sequence[Grid], zeros: Tensor | None = None) -> Tensor:
    """Rounds strips of columns on the CPU; overwrites W with the errors E.

    W_j - Σ U_kj E_k over k < j is one matrix product for a strip of columns, plus one product with a vector per column,
    as in `pruners.sparsegpt`.
    """
    rounded, pivots = torch.empty_like(W), U.diagonal().numpy()
    rows, results = W.numpy(), rounded.numpy()
    masks = None if zeros is None else zeros.numpy()
    updated = np.empty(W.shape[1], dtype=np.float32)
    for j in through_strips(W, U, [updated] * len(W)):
        scale, zero, q = grids[j].scale.numpy(), grids[j].zero.numpy(), results[j]
        np.rint(np.divide(updated, scale, out=q), out=q)
        np.clip(np.add(q, zero, out=q), 0, grids[j].top, out=q)
        np.multiply(np.subtract(q, zero, out=q), scale, out=q)
        if masks is not None:
            q[masks[j]] = 0
        np.divide(np.subtract(updated, q, out=rows[j]), pivots[j], out=rows[j])
    return rounded
