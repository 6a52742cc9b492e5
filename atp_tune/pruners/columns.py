"""The inner loop of SparseGPT: goes through the columns of a block and adds the error of each to those to the right.

W [B, out] the columns of the weight in a block, each contiguous; U upper triangular [B, B]; G [B, out] is 1 / U_jj for
weights to zero and 0 for the others. For j = 0 … B-1

    E_j = W_j G_j        W_k ← W_k - U_jk E_j  for all k > j

The result is each column W_j when the loop reaches it. There are three implementations:

`plain`     this loop, on any device; the reference for the others.
`strips`    on the CPU. W_j - Σ U_kj E_k over k < j is one matrix product for a strip of columns, plus one product with
            a vector per column of the strip. E_j replaces W_j in the matrix, so that the sum and its first term are a
            single call, with factors -U_kj and 1. It uses numpy, whose calls have less overhead than torch's.
`triton`    on a GPU (`columns_triton`): one kernel for the block; each program handles a tile of rows of the weight.
            Each process launches it once on zeros; if that fails, it logs a warning and uses `plain`.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from atp_tune.system import launches

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
    """The same on the CPU; overwrites W with the errors E."""
    updated, A = torch.empty_like(W), (-U.T).contiguous().fill_diagonal_(1)
    width = min(STRIP, max(4, ALONE // W.shape[1]))
    terms, rows, factors, results = A.numpy(), W.numpy(), G.contiguous().numpy(), updated.numpy()
    for start in range(0, len(W), width):
        stop = min(start + width, len(W))
        W[start:stop].addmm_(A[start:stop, :start], W[:start])
        for j in range(start, stop):
            np.dot(terms[j, start : j + 1], rows[start : j + 1], out=results[j])
            np.multiply(results[j], factors[j], out=rows[j])
    return updated


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
