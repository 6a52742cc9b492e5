"""Choosing the lowest scores, exactly as many as asked, ties broken by position as a stable sort would.

M is a group: so many consecutive columns (inputs) of one row. In groups the product M·s is rounded down with a little
slack, so that a share N/M gives N whatever the floats make of it; a last, smaller group is rounded down too.
"""

import torch
from torch import Tensor

SLACK = 1e-9


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask [rows, columns] of the `count` lowest scores in each row; among equals the leftmost are taken.

    The same mask as the first `count` indices of a stable sort, in linear time and without its index tensor.
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    mask = scores <= threshold
    if int(mask.sum()) != count * scores.shape[0]:
        below, tied = scores < threshold, scores == threshold
        mask = below | (tied & (tied.cumsum(1) <= count - below.sum(1, keepdim=True)))
    return mask


def lowest_in_rows(scores: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """Mask [rows, columns] of the ⌊columns·s⌋ lowest scores of each row, or of the ⌊M·s⌋ lowest of each group."""
    if group is None:
        return lowest(scores, int(scores.shape[1] * sparsity))
    rows, columns = scores.shape
    whole = columns - columns % group
    parts = [scores[:, :whole].reshape(-1, group), scores[:, whole:]]
    masks = [lowest(part, int(part.shape[1] * sparsity + SLACK)) for part in parts if part.numel()]
    return torch.cat([mask.reshape(rows, -1) for mask in masks], 1)


def lowest_in_matrix(scores: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """Mask [rows, columns] of the ⌊rows·columns·s⌋ lowest scores of all, or of the ⌊M·s⌋ lowest of each group."""
    if group is not None:
        return lowest_in_rows(scores, sparsity, group)
    return lowest(scores.reshape(1, -1), int(scores.numel() * sparsity)).reshape(scores.shape)
