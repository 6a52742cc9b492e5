"""GPTQ: rounds column by column and updates the columns to the right to compensate for the error.

W weight [out, in]; U upper triangular [in, in] with UᵀU the inverse of the damped Hessian H. For each column j, from
the left:

    e = (W_j - Ŵ_j) / U_jj        W_k ← W_k - e U_jk  for all k > j

Ŵ_j are the values of the grid nearest to W_j as updated. Each group's grid is that of the dense weights, as RTN's and
llm-compressor's; the authors' `static_groups` zero weights on dead inputs first. Weights on inputs that were always
zero become 0. With `act_order` the columns go by the sums of squares of their inputs, the largest first, so that those
which matter most are rounded while the most others can make up for them; a group stays consecutive inputs.

As in `pruners.sparsegpt` H is not inverted: R = U⁻¹ comes from one Cholesky factorisation, and a block of columns is
updated by all blocks to its left at once. Within a block the loop goes column by column: `plain` on any device,
`strips` on the CPU.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
algorithm 1; act-order is from their code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.pruners.columns import ALONE, STRIP
from atp_tune.pruners.statistics import Hessian
from atp_tune.quantizers.grid import Grid, parts_of
from atp_tune.quantizers.rtn import RTN

COLUMNS = 128  # in a block; any number gives the same weights, but for rounding


@dataclass(frozen=True)
class GPTQ(RTN):
    """Rounds weights and updates the others; computes in float32, returns the dtype of the weight."""

    measures: ClassVar[type[Statistics] | None] = Hessian

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
        W = torch.empty_like(weight.T, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(weight.T)
        grids = self._grids(W, bits)
        W[statistics.dead()] = 0  # W is [in, out], so that columns are contiguous
        order = statistics.order() if self.act_order else None
        if order is not None:
            W, grids = W[order], [grids[j] for j in order.tolist()]
            zeros = None if zeros is None else zeros[:, order]
        changes = torch.empty_like(W)  # W - Ŵ of finished blocks
        for a in range(0, len(W), COLUMNS):
            here = slice(a, a + COLUMNS)
            U = torch.linalg.solve_triangular(R[here, here], _eye(R[here, here]), upper=True)
            updated = torch.addmm(W[here], U.T, R[:a, here].T @ changes[:a])
            rounded = _round_block(updated, U, grids[here], None if zeros is None else zeros.T[here])
            torch.sub(W[here], rounded, out=changes[here])
            W[here] = rounded
        if order is not None:
            W = torch.empty_like(W).index_copy_(0, order, W)
        return W.to(weight.dtype).T

    def _grids(self, W: Tensor, bits: int) -> list[Grid]:
        """The grid of each column of W [in, out], with scales and zero points [out]."""
        found: list[Grid] = []
        for columns, size in parts_of(len(W), self.group_size):
            for group in torch.split(W[columns], size):
                grid = Grid.of(group.T, bits, self.symmetric)
                found += [Grid(grid.scale[:, 0], grid.zero[:, 0], grid.top)] * size
        return found


def _eye(R: Tensor) -> Tensor:
    return torch.eye(len(R), dtype=R.dtype, device=R.device)


def _round_block(W: Tensor, U: Tensor, grids: Sequence[Grid], zeros: Tensor | None) -> Tensor:
    """Rounds the columns W [B, out] of a block with its part U [B, B]; overwrites W."""
    if W.device.type == "cpu" and W.dtype == torch.float32:
        return strips(W, U, grids, zeros)
    return plain(W, U, grids, zeros)


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
    """The same on the CPU; overwrites W with the errors E.

    W_j - Σ U_kj E_k over k < j is one matrix product for a strip of columns, plus one product with a vector per column,
    as in `pruners.columns`.
    """
    rounded, A = torch.empty_like(W), (-U.T).contiguous().fill_diagonal_(1)
    width = min(STRIP, max(4, ALONE // W.shape[1]))
    terms, rows, results = A.numpy(), W.numpy(), rounded.numpy()
    pivots = U.diagonal().numpy()
    masks = None if zeros is None else zeros.numpy()
    updated = np.empty(W.shape[1], dtype=np.float32)
    for start in range(0, len(W), width):
        stop = min(start + width, len(W))
        W[start:stop].addmm_(A[start:stop, :start], W[:start])
        for j in range(start, stop):
            np.dot(terms[j, start : j + 1], rows[start : j + 1], out=updated)
            scale, zero, q = grids[j].scale.numpy(), grids[j].zero.numpy(), results[j]
            np.rint(np.divide(updated, scale, out=q), out=q)
            np.clip(np.add(q, zero, out=q), 0, grids[j].top, out=q)
            np.multiply(np.subtract(q, zero, out=q), scale, out=q)
            if masks is not None:
                q[masks[j]] = 0
            np.divide(np.subtract(updated, q, out=rows[j]), pivots[j], out=rows[j])
    return rounded
