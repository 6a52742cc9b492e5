"""The layout of a packed tensor: its nonzero values row by row, and a bit for each weight. Format: docs/formats.md.

Source: the layout is that of `sparse-bitmask` in compressed-tensors 0.13 and earlier, without its row offsets, which
follow from the bits.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_tune.packed.modeling_atp_sparse import (
    BITMASK,
    SCALES,
    VALUES,
    SparseLinear,
    bitmask_of,
    groups_of,
)

Kind = Literal["same", "bf16", "int8"]  # number format of the values
LARGEST = 127  # code of int8
LEAST = 0.45  # share of zeros from which a packed matrix is smaller, and no slower


def zeros_of(dense: Tensor) -> float:
    """The share of zeros; -0.0 is none, so that unpacking restores each bit."""
    return (dense.numel() - int(_kept(dense).sum())) / dense.numel() if dense.numel() else 0.0


def pack(dense: Tensor, kind: Kind, group_size: int | None = None) -> dict[str, Tensor]:
    """The tensors of a packed one [..., columns], by the ends of their names.

    `group_size`: columns that share a scale of int8 codes, where it divides the columns; None: all of a row.
    """
    kept, (*rows, columns) = _kept(dense), dense.shape
    packed = {BITMASK: bitmask_of(kept)}
    if kind != "int8":
        return {VALUES: dense[kept].to(torch.bfloat16 if kind == "bf16" else dense.dtype), **packed}
    grouped = dense.float().reshape(*rows, groups_of(columns, group_size), -1)
    scales = grouped.abs().amax(-1) / LARGEST
    codes = (grouped / scales.where(scales > 0, 1).unsqueeze(-1)).round().flatten(-2)
    return {VALUES: codes[kept].to(torch.int8), SCALES: scales, **packed}


def packed_bytes(dense: Tensor) -> int:
    """Bytes of a tensor [..., columns] in a packed folder; its own if it has too few zeros."""
    if dense.dim() < 2 or not dense.is_floating_point() or not dense.numel():
        return dense.nbytes
    rows, zeros = dense.numel() // dense.shape[-1], dense.numel() - int(_kept(dense).sum())
    return matrix_bytes(rows, dense.shape[-1], zeros, dense.element_size())


def matrix_bytes(rows: int, columns: int, zeros: int, itemsize: int) -> int:
    """Bytes of a matrix in a packed folder, its values in their own number format of `itemsize` bytes."""
    size = rows * columns
    if zeros / size < LEAST:
        return size * itemsize
    return (size - zeros) * itemsize + rows * -(-columns // 8)


def packed_linear(linear: Any, kind: Kind = "same") -> SparseLinear:
    """A packed linear with the weight and bias of an `nn.Linear` or a `Conv1D`."""
    dense = linear.weight.detach()
    parts = pack(dense.T.contiguous() if isinstance(linear, Conv1D) else dense, kind)
    made = SparseLinear(linear, len(parts[VALUES]), parts[VALUES].dtype)
    for end, part in parts.items():
        setattr(made, f"weight{end}", nn.Parameter(part, requires_grad=False))
    made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    made.check()  # a graph that is compiled next needs its offsets
    return made


def _kept(dense: Tensor) -> Tensor:
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.contiguous().view(kinds[dense.element_size()]) != 0
