"""Choosing the lowest scores, exactly as many as asked, ties broken by position as a stable sort would."""

import torch
from torch import Tensor


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
