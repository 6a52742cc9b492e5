"""The layout of a packed tensor: its nonzero values row by row, and a bit for each weight. Format: docs/formats.md.

Source: the layout is that of `sparse-bitmask` in compressed-tensors 0.13 and earlier, without its row offsets, which
follow from the bits.
"""

from typing import TYPE_CHECKING, Literal

from atp_tune.packed.modeling_atp_sparse import BITMASK, SCALES, VALUES, groups_of

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["same", "bf16", "int8"]  # number format of the values
LARGEST = 127  # code of int8


def zeros_of(dense: "Tensor") -> float:
    """The share of zeros; -0.0 is none, so that unpacking restores each bit."""
    return 1 - float(_kept(dense).float().mean()) if dense.numel() else 0.0


def pack(dense: "Tensor", kind: Kind, group_size: int | None = None) -> dict[str, "Tensor"]:
    """The tensors of a packed one [..., columns], by the ends of their names.

    `group_size`: columns that share a scale of int8 codes, where it divides the columns; None: all of a row.
    """
    import torch

    kept, (*rows, columns) = _kept(dense), dense.shape
    bits = torch.nn.functional.pad(kept, (0, -columns % 8)).view(*rows, -1, 8)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    packed = {BITMASK: (bits * powers).sum(-1, dtype=torch.uint8)}
    if kind != "int8":
        return {VALUES: dense[kept].to(torch.bfloat16 if kind == "bf16" else dense.dtype), **packed}
    grouped = dense.float().reshape(*rows, groups_of(columns, group_size), -1)
    scales = grouped.abs().amax(-1) / LARGEST
    codes = (grouped / scales.where(scales > 0, 1).unsqueeze(-1)).round().flatten(-2)
    return {VALUES: codes[kept].to(torch.int8), SCALES: scales, **packed}


def _kept(dense: "Tensor") -> "Tensor":
    import torch

    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.contiguous().view(kinds[dense.element_size()]) != 0
