"""SparseGPT: prunes column by column and updates the columns to the right to compensate for the error.

W weight [out, in]; U upper triangular [in, in] with UᵀU the inverse of the damped Hessian H; blocks of B columns. The
mask of a block zeroes its ⌊out·B·s⌋ lowest W_ij² / U_jj² over all rows. Then for each column j, from the left:

    e = (W_j - masked W_j) / U_jj        W_k ← W_k - e U_jk  for all k >= j

U_jj² is the j-th pivot of the inverse after the columns to the left are eliminated (Frantar & Alistarh 2023, section
3.3). The authors' code zeroes one weight more per block (`<=` its threshold) and cannot run at sparsity 1; here the
number is exact. In groups of M columns the ⌊M·s⌋ lowest of each row are zeroed, chosen from the updated weights when
the group is reached; B is rounded down to whole groups.

H is not inverted. With R = U⁻¹, upper triangular and R Rᵀ = H, the errors E [out, in] of all columns satisfy
W - Ŵ = E U with Ŵ the pruned weight, so E = (W - Ŵ) R. The update of block [a, b) by the blocks to its left is

    - E[:, :a] U[:a, a:b] = (W - Ŵ)[:, :a] R[:a, a:b] U[a:b, a:b]        since (R U)[:a, a:b] = 0

and U[a:b, a:b] = R[a:b, a:b]⁻¹ has only B columns. R costs one Cholesky factorisation (`Hessian.factor`), a quarter of
the operations of U, and each weight is written once, not once per block.

Source: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023, algorithm 1.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from atp_tune.pruners import Measures, Statistics
from atp_tune.pruners.selection import lowest_in_matrix, lowest_in_rows, zeroed
from atp_tune.pruners.settings import SparseGPTSettings
from atp_tune.pruners.statistics import Hessian
from atp_tune.utils.system import launches

# --- The inner loop of SparseGPT: goes through the columns of a block and adds the error of each to those to the right.
#
# W [B, out] the columns of the weight in a block, each contiguous; U upper triangular [B, B]; G [B, out] is 1 / U_jj
# for weights to zero and 0 for the others. For j = 0 … B-1
#
#     E_j = W_j G_j        W_k ← W_k - U_jk E_j  for all k > j
#
# The result is each column W_j when the loop reaches it. There are three implementations:
#
# `plain`     this loop, on any device; the reference for the others.
# `strips`    on the CPU. W_j - Σ U_kj E_k over k < j is one matrix product for a strip of columns, plus one product
#             with a vector per column of the strip. E_j replaces W_j in the matrix, so that the sum and its first term
#             are a single call, with factors -U_kj and 1. It uses numpy, whose calls have less overhead than torch's.
# `triton`    on a GPU (`columns_triton`): one kernel for the block; each program handles a tile of rows of the weight.
#             Each process launches it once on zeros; if that fails, it logs a warning and uses `plain`.

STRIP = 16  # columns
ALONE = 9216  # matrix elements up to which OpenBLAS multiplies by a vector in one thread, which is faster

Sweep = Callable[[Tensor, Tensor, Tensor], Tensor]


def sweep(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The columns [B, out] as updated when the loop reaches them, by the fastest implementation; may overwrite W."""
    if W.device.type == "cpu" and W.dtype == torch.float32:
        return strips(W, U, G)
    kernel = on_gpu(W.device) if W.device.type == "cuda" else plain
    return kernel(W, U, G)


def plain(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The columns [B, out] as updated when the loop reaches them; overwrites W.

    If G has fewer rows than W, the loop goes through the first columns only; the others are updated by their errors.
    """
    for j, factors in enumerate(G):
        W[j + 1 :].addr_(U[j, j + 1 :], W[j] * factors, alpha=-1)
    return W


def strips(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """Prunes strips of columns on the CPU; overwrites W with the errors E."""
    updated = torch.empty_like(W)
    rows, factors, sums = W.numpy(), G.contiguous().numpy(), updated.numpy()
    for j in through_strips(W, U, sums):
        np.multiply(sums[j], factors[j], out=rows[j])
    return updated


def through_strips(W: Tensor, U: Tensor, sums: Any) -> Iterator[int]:
    """Yields each column j once `sums[j]` is W_j - Σ U_kj E_k over k < j; the caller then writes E_j to W_j."""
    A, width = (-U.T).contiguous().fill_diagonal_(1), min(STRIP, max(4, ALONE // W.shape[1]))
    terms, rows = A.numpy(), W.numpy()
    for start in range(0, len(W), width):
        stop = min(start + width, len(W))
        W[start:stop].addmm_(A[start:stop, :start], W[:start])
        for j in range(start, stop):
            np.dot(terms[j, start : j + 1], rows[start : j + 1], out=sums[j])
            yield j


@cache
def on_gpu(device: torch.device) -> Sweep:
    """The Triton kernel if it compiles and runs on the device, else `plain`, with a warning in the log."""

    def launch() -> None:
        from atp_tune.pruners.columns_triton import tiles

        tiles(*torch.zeros(3, 128, 128, device=device))

    if not launches(launch, "SparseGPT without its Triton kernel, column by column"):
        return plain
    from atp_tune.pruners.columns_triton import tiles

    return tiles


class SparseGPT(SparseGPTSettings):
    """Zeroes weights and updates the others; computes in float32, returns the dtype of the weight."""

    group: int | None = None

    measures: ClassVar[Measures] = Hessian

    def prepare(self, statistics: Statistics) -> None:
        """Factorises the Hessian."""
        assert isinstance(statistics, Hessian)
        statistics.factor(self.damping)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are the `Hessian` of its inputs."""
        assert isinstance(statistics, Hessian)
        R = statistics.factor(self.damping)
        W = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        W[statistics.dead()] = 0  # W is [in, out], so that columns are contiguous
        width = self.columns if self.group is None else max(self.columns // self.group, 1) * self.group
        change_by_blocks(W, R, width, lambda updated, U, here: _prune_block(updated, U, sparsity, self.group))
        return W.to(weight.dtype).T


def change_by_blocks(W: Tensor, R: Tensor, width: int, change: Callable[[Tensor, Tensor, slice], Tensor]) -> None:
    """Overwrites the columns W [in, out] with Ŵ, block by block.

    `change` gets those of a block as updated by the blocks to its left, which it may overwrite, its part of U, and its
    place.
    """
    changes = torch.empty_like(W)  # W - Ŵ of finished blocks
    for a in range(0, len(W), width):
        here = slice(a, a + width)
        own = R[here, here]
        U = torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=R.dtype, device=R.device), upper=True)
        changed = change(torch.addmm(W[here], U.T, R[:a, here].T @ changes[:a]), U, here)
        torch.sub(W[here], changed, out=changes[here])
        W[here] = changed


def _prune_block(W: Tensor, U: Tensor, sparsity: float, group: int | None) -> Tensor:
    """Prunes the columns W [B, out] of a block with its part U [B, B]; overwrites W."""
    pivots = U.diagonal()[:, None]
    if group is not None:
        gone = torch.empty_like(W, dtype=torch.bool)
        for start in range(0, len(W), group):
            here = slice(start, start + group)
            gone[here] = lowest_in_rows((W[here] / pivots[here]).square_().T, sparsity, group).T
            plain(W[start:], U[start:, start:], gone[here] / pivots[here])
        return zeroed(W, gone)
    gone = lowest_in_matrix((W / pivots).square_().T, sparsity).T
    return zeroed(sweep(W, U, gone / pivots), gone)
