"""Selects exactly the given number of lowest scores; ties are broken by position, as in a stable sort.

A group is M consecutive columns (inputs) of one row. M·s is rounded down with a small tolerance, so that s = N/M gives
N despite rounding; in a last, smaller group it is rounded down too.

Thresholds are found without sorting. On the CPU numpy selects in each row, in as many threads as torch uses. In a whole
matrix two order statistics of a sample enclose the threshold, which is then selected among the few scores between them
(Floyd & Rivest, "Expected time bounds for selection", 1975); the sample affects the time, not the result. Accelerators
do the same, with 4 bytes of memory per score of the matrix, or 8 with ties; a sort would take about 20.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atp_tune.errors import TrialError, UserError
from atp_tune.plugins import Checked, guarded
from atp_tune.pruners import Measures, Pruner, Statistics
from atp_tune.pruners.statistics import Hessian, InputMoments, Several, finite, precise
from atp_tune.utils.registry import Origin

SLACK = 1e-9
SAMPLE = 4096  # size of the sample; about 1 in 16 scores is between the two order statistics
LARGE_SAMPLE = 1 << 16  # the same on an accelerator; about 1 in 60
WORTH_A_THREAD = 2**17  # minimum number of scores per thread
PARTS = 4  # parts of the rows per thread
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

Floats = NDArray[np.floating[Any]]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask [rows, columns] of the `count` lowest scores in each row, the leftmost of equal scores first.

    The same mask as from the first `count` indices of a stable sort, in linear time and less memory.
    """
    if count <= 0 or count >= scores.shape[1]:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    if len(scores) > 1 and _for_numpy(scores):
        # Mask of scores up to the `count`-th lowest of each row, and that score [rows, 1].
        mask, thresholds = torch.empty_like(scores, dtype=torch.bool), torch.empty(len(scores), 1, dtype=scores.dtype)

        def select(part: Floats, mask: NDArray[np.bool_], threshold: Floats) -> None:
            threshold[:] = np.partition(part, count - 1, axis=1)[:, count - 1 : count]
            np.less_equal(part, threshold, out=mask)

        _in_threads(select, scores.numpy(force=True), mask.numpy(), thresholds.numpy())
    else:
        # The `count`-th lowest score [rows, 1] of each row; NaN is the highest.
        thresholds = (
            _threshold(scores.reshape(-1), count)[None, None]
            if len(scores) == 1
            else scores.kthvalue(count, dim=1, keepdim=True).values
        )
        mask = scores <= thresholds
    return mask if _number(mask) == count * len(scores) else _leftmost(thresholds, scores, count)


def lowest_in_rows(scores: Tensor, sparsity: float, group: int | None) -> Tensor:
    """Mask [rows, columns] of the ⌊columns·s⌋ lowest scores of each row, or the ⌊M·s⌋ lowest of each group."""
    if group is None:
        return lowest(scores, int(scores.shape[1] * sparsity))
    masks = [lowest(part, int(part.shape[1] * sparsity + SLACK)) for part in grouped(scores, group)]
    return ungrouped(masks, len(scores))


def grouped(matrix: Tensor, group: int) -> list[Tensor]:
    """The groups of a matrix [rows, columns]: all whole ones of its rows [n, M], then the smaller last ones.

    A group of -1 is all columns.
    """
    columns = matrix.shape[1]
    size = columns if group == -1 else min(group, columns)
    whole = columns - columns % size
    return [part for part in (matrix[:, :whole].reshape(-1, size), matrix[:, whole:]) if part.numel()]


def ungrouped(parts: list[Tensor], rows: int) -> Tensor:
    """A matrix of so many rows again, from its parts by `grouped`, or from a value [n, 1] for each group of them."""
    return torch.cat([part.reshape(rows, -1) for part in parts], 1)


def lowest_in_matrix(scores: Tensor, sparsity: float, group: int | None = None) -> Tensor:
    """Mask [rows, columns] of the ⌊rows·columns·s⌋ lowest scores, or the ⌊M·s⌋ lowest of each group.

    The mask has the memory layout of the scores, also for a transposed view.
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


def zeros_in_row(columns: int, sparsity: float, group: int | None) -> int:
    """The number of zeros that `lowest_in_rows` makes in each row."""
    if group is None:
        return int(columns * sparsity)
    whole, rest = divmod(columns, group)
    return whole * int(group * sparsity + SLACK) + int(rest * sparsity + SLACK)


def order_in_rows(scores: Tensor, group: int | None = None) -> Tensor:
    """The place [rows, columns] of each score in the order in which rows lose weights as the sparsity s rises.

    Places below `zeros_in_row(columns, s, group)` are `lowest_in_rows(scores, s, group)`. In groups a weight goes at
    s = (its rank in its group of M + 1) / M; those that go at one s are in the order of the whole row.
    """
    places = ranks(scores)
    if group is None:
        return places
    parts = [(ranks(part).float() + 1) / part.shape[1] for part in grouped(scores, group)]
    goes_at = ungrouped(parts, len(scores))
    order = places.long()
    return ranks(torch.empty_like(goes_at).scatter_(1, order, goes_at)).gather(1, order)


def ranks(scores: Tensor) -> Tensor:
    """The rank [rows, columns] of each score in a stable sort of its row: `ranks(s) < count` is `lowest(s, count)`.

    int16 if possible, else int32. NaNs rank last, while `lowest` selects nothing if its threshold is NaN. Costs more
    than one `lowest`, but each further mask is one comparison.
    """
    rows, columns = scores.shape
    kind = torch.int16 if columns <= 2**15 else torch.int32
    if scores.device.type != "cpu":
        order = scores.argsort(dim=1, stable=True)
        positions = torch.arange(columns, dtype=kind, device=scores.device).expand(rows, -1)
        return torch.empty_like(order, dtype=kind).scatter_(1, order, positions)
    places = torch.empty(rows, columns, dtype=kind)
    _in_threads(_rank, scores.float().numpy(force=True), places.numpy())
    return places


def zeroed(weight: Tensor, gone: Tensor) -> Tensor:
    """A copy of the weight with 0 where `gone`; 20 times as fast as `masked_fill` on a CPU."""
    if weight.device.type != "cpu":
        return weight.masked_fill(gone, 0)
    return weight.view(INTEGERS[weight.element_size()]).mul(~gone).view(weight.dtype)


def nonzeros(weight: Tensor) -> Tensor:
    """The number of nonzeros, a 0-d tensor; 15 times as fast as `count_nonzero` on a CPU."""
    if weight.device.type != "cpu":
        return weight.count_nonzero()
    return (
        weight.view(INTEGERS[weight.element_size()]).bitwise_left_shift(1).count_nonzero()
    )  # shifts out the sign, so that -0 counts as 0


def _number(mask: Tensor) -> int:
    """The number of True entries."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def _leftmost(thresholds: Tensor, scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest of each row, the leftmost of ties, given the `count`-th lowest [rows, 1]."""
    below, tied = scores < thresholds, scores == thresholds
    return below | (tied & (tied.cumsum(1, dtype=torch.int32) <= count - below.sum(1, keepdim=True)))


def _threshold(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of the scores [n], a 0-d tensor; NaN is the highest."""
    if _for_numpy(scores):
        return torch.tensor(_select(scores.numpy(force=True), count), dtype=scores.dtype)
    # The same with torch, on any device and in any dtype, with a sample of this size; a 0-d tensor.
    size = SAMPLE if scores.device.type == "cpu" else LARGE_SAMPLE
    sample = scores[:: max(1, len(scores) // size)].sort().values
    low, high = (sample[index] for index in _enclosing(len(sample), count / len(scores)))
    left = count - int((scores < low).sum())
    between = scores[(scores >= low) & (scores <= high)]
    if not 0 < left <= len(between):
        between, left = scores, count
    return between.kthvalue(left).values


def _select(scores: Floats, count: int) -> float:
    """The `count`-th lowest of the scores [n]: searched between two sample values, if it is there, else among all."""
    sample = np.sort(scores[:: max(1, len(scores) // SAMPLE)])
    low, high = (sample[index] for index in _enclosing(len(sample), count / len(scores)))
    between = scores[np.flatnonzero((scores >= low) & (scores <= high))]
    left = count - int(np.count_nonzero(scores < low))
    if not 0 < left <= len(between):
        between, left = scores, count
    return float(np.partition(between, left - 1)[left - 1])


def _enclosing(size: int, share: float) -> Iterator[int]:
    """Indices in a sorted sample of this size that very likely enclose the quantile `share` of all scores."""
    slack = 4 * (share * (1 - share) * size) ** 0.5 + 2  # 4 standard errors of an order statistic
    return (min(max(int(share * size + side * slack), 0), size - 1) for side in (-1, 1))


def _for_numpy(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype in {torch.float32, torch.float64}


def _in_threads(work: Any, *arrays: NDArray[Any]) -> None:
    """Calls `work` on parts of the rows in as many threads as torch uses, including this one; numpy releases the GIL.

    Each thread takes the next part when it is free: the others may start late, since threads of torch keep spinning on
    their cores for some milliseconds after their last product.
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
        if not other.cancel():  # it had started
            other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _rank(scores: Floats, result: NDArray[Any]) -> None:
    """Ranks each row: sorts integers made of score and column, so that an unstable sort keeps the order of ties."""
    bits = (scores + np.float32(0)).view(np.int32)  # -0 + 0 is 0
    bits = np.where(np.isnan(scores), np.int32(2**31 - 1), bits ^ ((bits >> 31) & np.int32(2**31 - 1)))
    keys = bits.astype(np.int64) << 32 | np.arange(scores.shape[1])
    keys.sort(axis=1)
    np.put_along_axis(result, keys & (2**32 - 1), np.arange(scores.shape[1], dtype=result.dtype)[None], axis=1)


# --- Structured pruning: scores of whole channels, and the refit of the linear that reads them. No gradients.
#
#     score_c = Σ_{j in c} e_j ‖W_{:,j}‖²                       what channel c carries to the outputs
#     W'_K    = W_K + W_G H_GK (H_KK + λI)⁻¹                    K columns that stay, G columns that go
#
# W weight [out, in] of the linear that reads the channels, H = 2 XᵀX/n of its inputs X [n, in], λ a ridge. e_j is
#
#     norm          ‖X_j‖² / n, as in Wanda's score |W_ij| ‖X_j‖; for a single column the order of ‖W_j‖ ‖X_j‖
#     fluctuation   the variance of X_j
#
# The refit minimises ‖W X_K'ᵀ - W Xᵀ‖² over W', with λ ‖W' - W_K‖² added. For λ → 0 it is W H_{:,K} H_KK⁻¹.
#
# Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024; An et al.,
# "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, equation 6. In the place of its
# bias, which most models have no room for, the refit spreads all that is lost over the columns that stay.

RAISES = 4  # of the ridge, tenfold each, where the system cannot be solved


class HessianAndMoments(Several):
    """The Hessian of a linear's inputs, and their moments."""

    kinds: ClassVar[Mapping[str, type[Statistics]]] = {"hessian": Hessian, "moments": InputMoments}


def channel_scores(weight: Tensor, energies: Tensor, columns: int) -> Tensor:
    """Scores [channels] of a reader's weight [out, in], from the energy [in] of each input; `columns` per channel."""
    squares = weight.float().square().sum(0) * energies
    return squares.view(-1, columns).sum(1)


def refitted(weight: Tensor, gone: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The weight [out, in] with zeros in the columns `gone` [in], and the others fitted; in the weight's dtype.

    hessian [in, in]; the ridge is `damping` times the mean of its diagonal, and ten times as much, up to four times,
    where the system cannot be solved. Computed in float64. TrialError if H is not finite.
    """
    finite(hessian, "Hessian")
    wide = precise(weight.device)
    dense, full = weight.to(wide, torch.float64), hessian.to(wide, torch.float64)
    there, lost = (~gone).to(wide).nonzero()[:, 0], gone.to(wide).nonzero()[:, 0]
    right = dense[:, lost] @ full[lost][:, there]
    system, ridge = full[there][:, there], damping * full.diagonal().mean()
    for power in range(RAISES + 1):
        damped = system.clone()
        damped.diagonal().add_(ridge * 10**power)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            break
    else:
        raise TrialError(
            f"refit of channels: Hessian not positive definite, even with damping {damping * 10**RAISES:g}"
        )
    fitted = torch.zeros_like(dense)
    fitted[:, there] = dense[:, there] + torch.cholesky_solve(right.T, lower).T
    return fitted.to(weight.device, weight.dtype)


# --- A pruner that is a plug-in, checked each time that it prunes: the dense weight stays as it is, and the result
# fits.
#
# A result has the shape, dtype and device of the weight, no NaN or infinity, and as many zeros as the sparsity
# asks for:
#
#     out · ⌊in·s⌋  <=  zeros  <=  out · ⌈in·s⌉ + zeros of the weight itself
#
# so that it may compare weights in rows or in the matrix, and round down or up. With groups of M inputs each
# group has at least ⌊M·s⌋.


class CheckedPruner(Checked):
    """The `Pruner` around a plug-in."""

    def __init__(self, plugin: Any, origin: Origin) -> None:
        super().__init__(plugin, origin)
        self.group: int | None = getattr(plugin, "group", None)
        self.measures: Measures = getattr(plugin, "measures", None)

    @classmethod
    def of(cls, kind: type[Pruner], origin: Origin, settings: dict[str, Any]) -> "CheckedPruner":
        """Makes the plug-in with its settings; UserError if they are wrong, or if it makes no groups and should."""
        fields = getattr(kind, "model_fields", {})
        if "group" not in fields and settings.get("group") is not None:
            raise UserError(f'{origin}: makes no patterns, having no field group; set prune.pattern = "unstructured"')
        with guarded(origin, "its settings"):
            return cls(kind(**{name: value for name, value in settings.items() if name in fields}), origin)

    def __repr__(self) -> str:
        """Names all that its result depends on, for the cache; the plug-in's own `repr` may leave something out."""
        return f"{self._origin.name} {vars(self._plugin)} {self._origin.sha256}"

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics only."""
        with guarded(self._origin, "prepare"):
            if hasattr(self._plugin, "prepare"):
                self._plugin.prepare(statistics)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]."""
        with guarded(self._origin, f"prune at sparsity {sparsity:g}"):
            matrix = self._plugin.prune(weight.clone(), sparsity, statistics)
        wrong = _unlike(weight, matrix) or _miscounted(weight, matrix, sparsity, self.group)
        if wrong:
            raise self.wrong("prune", wrong)
        pruned: Tensor = matrix
        return pruned


def _unlike(weight: Tensor, result: Any) -> str:
    """How a result differs in kind from the weight; "" if it does not."""
    if not isinstance(result, Tensor):
        return f"returned {type(result).__name__}, not a tensor"
    for name in ("shape", "dtype", "device"):
        own, there = getattr(result, name), getattr(weight, name)
        if own != there:
            own, there = (tuple(each) if name == "shape" else each for each in (own, there))
            return f"returned a weight of {name} {own} for one of {there}"
    return "" if result.isfinite().all() or not weight.isfinite().all() else "returned a weight with NaN or infinity"


def _miscounted(weight: Tensor, pruned: Tensor, sparsity: float, group: int | None) -> str:
    """How the number of zeros is wrong; "" if it is not."""
    rows, columns = weight.shape
    zeros = pruned == 0
    count, before = int(zeros.sum()), int((weight == 0).sum())
    at = f"at sparsity {sparsity:g}, where there must be"
    if group is None:
        low = rows * int(columns * sparsity)
        high = min(rows * columns, rows * math.ceil(columns * sparsity - SLACK) + before)
        wanted = f"{low}" if low == high else f"{low} to {high}"
        return "" if low <= count <= high else f"left {count} zeros of {rows * columns} weights {at} {wanted}"
    most = before
    for part in grouped(zeros, group):
        least = int(part.shape[1] * sparsity + SLACK)
        most += least * len(part)
        if (fewest := int(part.sum(1).min())) < least:
            return f"left {fewest} zeros in a group of {part.shape[1]} {at} {least}"
    return "" if count <= most else f"left {count} zeros {at} {most} at most"
