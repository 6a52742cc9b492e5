"""The inner loop of SparseGPT as a Triton kernel for a block of columns; see `sparsegpt` for the equations.

Rows of the weight are independent. A program keeps ROWS of them with all B columns, a tile [B, ROWS], in registers. For
each column it selects W_j by a masked sum, multiplies it by G_j, and subtracts U_jk E_j from the columns k > j. All
sums are in float32, and each weight is read and written once.

Not run on a GPU so far: the tests compile it for several GPUs, and run it in Triton's interpreter, which accepts more
than the compiler.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements in the registers of a program


def tiles(W: Tensor, U: Tensor, G: Tensor) -> Tensor:
    """The columns [B, out] as updated when the loop reaches them; overwrites W if W is contiguous."""
    W, U, G = W.contiguous(), U.contiguous(), G.contiguous()
    columns, out = W.shape
    padded = max(triton.next_power_of_2(columns), 16)
    rows = max(TILE // padded, 16)
    with torch.cuda.device(W.device) if W.is_cuda else nullcontext():
        _sweep[(triton.cdiv(out, rows),)](W, U, G, out, columns, padded, rows)
    return W


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(
    w_at: tl.tensor, u_at: tl.tensor, g_at: tl.tensor, out: int,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, PADDED)
    inside = row < out
    at = k[:, None] * out + row[None, :]
    tile = tl.load(w_at + at, mask=(k < COLUMNS)[:, None] & inside[None, :], other=0.0)
    for j in range(0, COLUMNS):
        w = tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)
        e = w * tl.load(g_at + j * out + row, mask=inside, other=0.0)
        u = tl.load(u_at + j * COLUMNS + k, mask=(k > j) & (k < COLUMNS), other=0.0)
        tile -= u[:, None] * e[None, :]
    tl.store(w_at + at, tile, mask=(k < COLUMNS)[:, None] & inside[None, :])
