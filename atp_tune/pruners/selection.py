"""Choosing the lowest scores, exactly as many as asked, ties broken by position as a stable sort would.

M is a group: so many consecutive columns (inputs) of one row. In groups the product M·s is rounded down with a little
slack, so that a share N/M gives N whatever the floats make of it; a last, smaller group is rounded down too.

Nothing is sorted to find a threshold. On the CPU numpy selects in each row, in as many threads as torch uses. In a
whole matrix the threshold is first enclosed between two order statistics of a sample, then selected among the few
scores between them (Floyd & Rivest, "Expected time bounds for selection", 1975); which sample it is decides the time
and never the answer. An accelerator does the same: it has one row to select in, which leaves most of it idle, but a
short one, and 4 bytes are taken for each score of the matrix, or 8 where scores tie; a sort takes some 20.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLACK = 1e-9
SAMPLE = 4096  # scores that enclose the threshold of a matrix, with one in 16 between
LARGE_SAMPLE = 1 << 16  # the same on an accelerator, with one in 60 between
WORTH_A_THREAD = 2**17  # scores
PARTS = 4  # of the rows for each thread
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

Floats = NDArray[np.floating[Any]]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask [rows, columns] of the `count` lowest scores in each row; among equals the leftmost are taken.

    The same mask as the first `count` indices of a stable sort, in linear time and without its index tensor.
    """
    if count <= 0 or count >= scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if len(scores) > 1 and _for_numpy(scores):
        mask, thresholds = _up_to_by_numpy(scores, count)
    else:
        thresholds = _thresholds(scores, count)
        mask = scores <= thresholds
    return mask if _number(mask) == count * len(scores) else _leftmost(thresholds, scores, count)


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
    """Mask [rows, columns] of the ⌊rows·columns·s⌋ lowest scores of all, or of the ⌊M·s⌋ lowest of each group.

    The mask lies in memory as the scores do, also where they are a transposed view.
    """
    if group is not None:
        return lowest_in_rows(scores, sparsity, group)
    count = int(scores.numel() * sparsity)
    if count <= 0 or count >= scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    stored = scores.T if scores.T.is_contiguous() else scores
    threshold = _threshold(stored.reshape(-1), count)
    mask = scores <= threshold
    if _number(mask) == count:
        return mask
    return _leftmost(threshold[None, None], scores.reshape(1, -1), count).reshape(scores.shape)


def ranks(scores: Tensor) -> Tensor:
    """Each score's place [rows, columns] in a stable sort of its row: `ranks(s) < count` is `lowest(s, count)`.

    int16 where that is enough, else int32. A row with NaN differs: here they come last, as in a sort, while `lowest`
    takes nothing if its threshold is NaN. Costs more than one `lowest`, and each further mask is one comparison.
    """
    rows, columns = scores.shape
    kind = torch.int16 if columns <= 2**15 else torch.int32
    if scores.device.type != "cpu":
        order = scores.argsort(dim=1, stable=True)
        places = torch.arange(columns, dtype=kind, device=scores.device).expand(rows, -1)
        return torch.empty_like(order, dtype=kind).scatter_(1, order, places)
    found = np.empty((rows, columns), dtype=np.int16 if kind == torch.int16 else np.int32)
    _in_threads(_rank, scores.float().numpy(force=True), found)
    return torch.from_numpy(found)


def zeroed(weight: Tensor, gone: Tensor) -> Tensor:
    """Copy of the weight with 0 where `gone`, as `masked_fill` makes, whose CPU kernel takes 20 times as long."""
    if weight.device.type != "cpu":
        return weight.masked_fill(gone, 0)
    bits = weight.view(INTEGERS[weight.element_size()])
    return bits.mul(~gone).view(weight.dtype)


def nonzeros(weight: Tensor) -> Tensor:
    """How many numbers are not 0, a tensor without dimensions; torch's own takes 15 times as long on a CPU."""
    if weight.device.type != "cpu":
        return weight.count_nonzero()
    return weight.view(INTEGERS[weight.element_size()]).bitwise_left_shift(1).count_nonzero()  # the sign is shifted out


def _number(mask: Tensor) -> int:
    """How many are True."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _leftmost(thresholds: Tensor, scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest of each row, given the `count`-th lowest [rows, 1]: of equals the leftmost."""
    below, tied = scores < thresholds, scores == thresholds
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= count - below.sum(1, keepdim=True)))


def _up_to_by_numpy(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mask of all up to the `count`-th lowest of each row, and that one [rows, 1]; while the row is in the cache."""
    mask, thresholds = torch.empty_like(scores, dtype=torch.bool), torch.empty(len(scores), 1, dtype=scores.dtype)

    def select(part: Floats, mask: NDArray[np.bool_], threshold: Floats) -> None:
        threshold[:] = np.partition(part, count - 1, axis=1)[:, count - 1 : count]
        np.less_equal(part, threshold, out=mask)

    _in_threads(select, scores.numpy(force=True), mask.numpy(), thresholds.numpy())
    return mask, thresholds


def _thresholds(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest score [rows, 1] of each row; NaN is the highest."""
    if len(scores) == 1:
        return _threshold(scores.reshape(-1), count)[None, None]
    return scores.kthvalue(count, dim=1, keepdim=True).values


def _threshold(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of the scores [n], a tensor without dimensions; NaN is the highest."""
    if _for_numpy(scores):
        return torch.tensor(_select(scores.numpy(force=True), count), dtype=scores.dtype)
    return _select_by_torch(scores, count, SAMPLE if scores.device.type == "cpu" else LARGE_SAMPLE)


def _select(scores: Floats, count: int) -> float:
    """The `count`-th lowest of the scores [n], among those that a sample encloses; else among all."""
    sample = np.sort(scores[:: max(1, len(scores) // SAMPLE)])
    low, high = (sample[place] for place in _enclosing(len(sample), count / len(scores)))
    between = scores[np.flatnonzero((scores >= low) & (scores <= high))]
    left = count - int(np.count_nonzero(scores < low))
    if not 0 < left <= len(between):
        between, left = scores, count
    return float(np.partition(between, left - 1)[left - 1])


def _select_by_torch(scores: Tensor, count: int, size: int) -> Tensor:
    """The same by torch, on any device and in any format, from a sample of this size; a tensor without dimensions."""
    sample = scores[:: max(1, len(scores) // size)].sort().values
    low, high = (sample[place] for place in _enclosing(len(sample), count / len(scores)))
    left = count - int((scores < low).sum())
    between = scores[(scores >= low) & (scores <= high)]
    if not 0 < left <= len(between):
        between, left = scores, count
    return between.kthvalue(left).values


def _enclosing(size: int, share: float) -> Iterator[int]:
    """Places, in a sorted sample of so many, between which the score with this share of all below it lies as a rule."""
    slack = 4 * (share * (1 - share) * size) ** 0.5 + 2  # standard errors of a sample's order statistic
    return (min(max(int(share * size + side * slack), 0), size - 1) for side in (-1, 1))


def _for_numpy(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype in {torch.float32, torch.float64}


def _in_threads(work: Any, *arrays: NDArray[Any]) -> None:
    """Calls work(…) on parts of the rows, in this thread and in as many others as torch has more; numpy lets them run.

    Each takes the next part when it is done with one: for some milliseconds after their last product torch's own
    threads wait for more work without leaving their cores, and until then those here may not get any.
    """
    threads = min(torch.get_num_threads(), arrays[0].size // WORTH_A_THREAD, len(arrays[0]))
    if threads <= 1:
        work(*arrays)
        return
    pieces = min(PARTS * threads, len(arrays[0]))
    parts = iter(list(zip(*(np.array_split(array, pieces) for array in arrays), strict=True)))

    def run() -> None:
        for part in parts:
            work(*part)

    others = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    run()
    for other in others:
        if not other.cancel():  # it had begun
            other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _rank(scores: Floats, result: NDArray[Any]) -> None:
    """Ranks of each row: sorts one integer of score and column, so that equals keep their order in an unstable sort."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0 + 0 is 0
    bits = np.where(np.isnan(scores), np.int32(2**31 - 1), bits ^ ((bits >> 31) & np.int32(2**31 - 1)))
    keys = bits.astype(np.int64) << 32 | np.arange(scores.shape[1])
    keys.sort(axis=1)
    columns = keys & (2**32 - 1)
    np.put_along_axis(result, columns, np.arange(scores.shape[1], dtype=result.dtype)[None], axis=1)
