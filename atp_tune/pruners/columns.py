"""The inner loop of SparseGPT: column after column of one block, each error carried on to the columns to the right.

W [B, out] a block's columns of the weight, each one contiguous; U upper [B, B]; G [B, out] is 1 / U_jj where a weight
goes and 0 where it stays. For j = 0 … B-1

    E_j = W_j G_j        W_k ← W_k - U_jk E_j  for all k > j

and what is wanted is the last W_j of each column, before its own error is taken off. Three ways to do so:

`plain`     as it is written, for any device; the others are compared with it.
`strips`    on the CPU. W_j - Σ U_kj E_k over k < j is one matrix product for a whole strip of columns and, within the
            strip, one product with a vector for each. E_j takes the place of W_j in the matrix, so that the sum and its
            first term are a single call, with factors -U_kj and 1. numpy's calls cost a fraction of torch's, which
            matters where a column is a few hundred numbers.
`triton`    on a GPU (`columns_triton`): one kernel for the whole block, a tile of rows of the weight in each program.
            Triton compiles at the first launch and needs a C compiler for that, which many images lack. So each
            process launches it once on zeros; where that fails, the log says so and a GPU takes `plain`.
"""

import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

STRIP = 16  # columns
ALONE = 9216  # numbers that OpenBLAS multiplies with a vector in one thread; it pays to stay below

Sweep = Callable[[Tensor, Tensor, Tensor], Tensor]

log = logging.getLogger(__name__)


def sweep(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The columns [B, out] as updated when their turn came, by the fastest way that there is; W may be overwritten."""
    if W.device.type == "cpu" and W.dtype == torch.float32:
        return strips(W, U, G)
    kernel = on_gpu(W.device) if W.device.type == "cuda" else plain
    return kernel(W, U, G)


def plain(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The columns [B, out] as updated when their turn came; W is overwritten by them.

    Where G has fewer columns than W these are the first ones, and the rest are updated by their errors.
    """
    for j, factors in enumerate(G):
        W[j + 1 :].addr_(U[j, j + 1 :], W[j] * factors, alpha=-1)
    return W


def strips(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The same on the CPU; W is overwritten by the errors E."""
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
    """The Triton kernel where it compiles and runs on the device, else `plain`, which is said once in the log."""
    if find_spec("triton") is None:
        return plain
    try:
        from atp_tune.pruners.columns_triton import tiles

        tiles(*torch.zeros(3, 128, 128, device=device))
    except Exception as error:  # of Triton, of what it calls (a compiler, ptxas, the driver), or of its import
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            raise
        reason = next(iter(str(error).splitlines()), "")
        log.warning(f"SparseGPT without its Triton kernel, column by column: {type(error).__name__}: {reason}")
        return plain
    return tiles
