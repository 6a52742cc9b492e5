"""SparseGPT: prune column by column, and let the columns to the right make up for the error.

W weight [out, in]; U upper [in, in], UᵀU the inverse of the damped Hessian; blocks of B columns. In each block the
mask is chosen over all rows, the ⌊out·B·s⌋ lowest W_ij² / U_jj². Then for each column j, from the left:

    e = (W_j - masked W_j) / U_jj        W_k ← W_k - e U_jk  for all k >= j

U_jj² is the j-th pivot of the inverse after the columns to the left are done (Frantar & Alistarh 2023, section 3.3).
The authors' code takes one weight more per block (`<=` its threshold), and cannot run at sparsity 1; here the number
is exact. In groups of M columns the ⌊M·s⌋ lowest of each row go, chosen when the group's turn comes, with the weights
as updated so far; B is then rounded down to whole groups.

Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, algorithm 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners.selection import lowest_in_matrix, lowest_in_rows
from atp_tune.pruners.statistics import Hessian, Statistics


@dataclass(frozen=True)
class SparseGPT:
    """Zeroes weights and updates those that stay; float32 inside, the weight's dtype outside."""

    damping: float = 0.01
    columns: int = 128
    group: int | None = None

    measures: ClassVar[type[Statistics] | None] = Hessian

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `Hessian`."""
        assert isinstance(statistics, Hessian)
        W = weight.float().masked_fill(statistics.dead(), 0)
        U = statistics.inverse_factor(self.damping)
        width = self.columns if self.group is None else max(self.columns // self.group, 1) * self.group
        for start in range(0, W.shape[1], width):
            here = slice(start, start + width)
            W[:, here], errors = _prune_columns(W[:, here], U[here, here], sparsity, self.group)
            W[:, here.stop :] -= errors @ U[here, here.stop :]
        return W.to(weight.dtype)


def _prune_columns(W: Tensor, U: Tensor, sparsity: float, group: int | None) -> tuple[Tensor, Tensor]:
    """One block of columns W [out, B] with its part U [B, B]: pruned weights, and errors [out, B] to carry on."""
    pivots = U.diagonal()
    columns = W.T.contiguous()
    gone = torch.empty_like(columns, dtype=torch.bool)
    if group is None:
        gone[:] = lowest_in_matrix((W / pivots).square(), sparsity).T
    errors = torch.empty_like(columns)
    for j, pivot in enumerate(pivots.tolist()):
        if group is not None and j % group == 0:
            here = slice(j, j + group)
            gone[here] = lowest_in_rows((columns[here].T / pivots[here]).square(), sparsity, group).T
        torch.mul(columns[j], gone[j], out=errors[j]).div_(pivot)
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return columns.masked_fill_(gone, 0).T, errors.T
