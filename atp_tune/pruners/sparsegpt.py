"""SparseGPT: prune column by column, and let the columns to the right make up for the error.

W weight [out, in]; U upper [in, in], UᵀU the inverse of the damped Hessian; blocks of B columns. In each block the
mask is chosen over all rows, the ⌊out·B·s⌋ lowest W_ij² / U_jj². Then for each column j, from the left:

    e = (W_j - masked W_j) / U_jj        W_k ← W_k - e U_jk  for all k >= j

U_jj² is the j-th pivot of the inverse after the columns to the left are done (Frantar & Alistarh 2023, section 3.3).
The authors' code takes one weight more per block (`<=` its threshold), and cannot run at sparsity 1; here the number
is exact. Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners.selection import lowest
from atp_tune.pruners.statistics import Hessian, Statistics


@dataclass(frozen=True)
class SparseGPT:
    """Zeroes weights and updates those that stay; float32 inside, the weight's dtype outside."""

    damping: float = 0.01
    columns: int = 128

    measures: ClassVar[type[Statistics] | None] = Hessian

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `Hessian`."""
        assert isinstance(statistics, Hessian)
        W = weight.float().masked_fill(statistics.dead(), 0)
        U = statistics.inverse_factor(self.damping)
        for start in range(0, W.shape[1], self.columns):
            here = slice(start, start + self.columns)
            W[:, here], errors = _prune_columns(W[:, here], U[here, here], sparsity)
            W[:, here.stop :] -= errors @ U[here, here.stop :]
        return W.to(weight.dtype)


def _prune_columns(W: Tensor, U: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """One block of columns W [out, B] with its part U [B, B]: pruned weights, and errors [out, B] to carry on."""
    pivots = U.diagonal()
    scores = (W / pivots).square()
    mask = lowest(scores.reshape(1, -1), int(scores.numel() * sparsity)).reshape(W.shape)
    columns, gone = W.T.contiguous(), mask.T.contiguous()
    errors = torch.empty_like(columns)
    for j, pivot in enumerate(pivots.tolist()):
        torch.mul(columns[j], gone[j], out=errors[j]).div_(pivot)
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return columns.masked_fill_(gone, 0).T, errors.T
