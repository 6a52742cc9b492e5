"""Prices: sparsities that descend along the loss of the pruned model; linears whose weights cost little get sparser.

    s_l = S + κ (s*_l - S)                                                        l a linear of a block

S target, κ (`kappa`) the distance from uniform: 0 is uniform, 1 the end s* of the descent. Values that leave [0, 1] are
clipped and all are shifted by one number, such that the mean weighted by size is S.

The price p_l of a linear is the loss in nats that one further pruned weight costs (`blocks/gradients.py`). The descent
begins at uniform and takes T = 20 steps, each on other windows of the calibration text:

    v_l ← 0.7 v_l + 0.3 p_l
    u_l = (v_l - v̄) / sqrt(mean (v - v̄)²), clipped to ±3                          means weighted by size
    s_l ← level(s_l - η_t u_l, S) in [0.02, 0.98], η_t = 0.03 (1 - t/T) + 0.003

No window of the validation or test text is used. A step costs three to four forward passes.

Over an interval of targets the descent goes on along a path: S_0 is the lowest target, S_1 … S_m follow at equal
distances of at most 0.1, the last is the highest. It takes the last 4 of the T steps at S_0. From each end at S_k-1
it begins at S_k with all s_l shifted by S_k - S_k-1 and v kept, and takes the last 8 of the T steps. Between two
targets of the path s* is linear.

Where weights are rounded to fewer bits, s* has no descent: it is the share between the most and the fewest bits of the
plan that costs least, by what rounding each linear to each number of bits costs (`blocks/gradients.py`).

Reason: formulas of a few numbers (`atp`, `curve`, `owl`) lack most of what a model wants, which differs from linear to
linear; a gradient at the *pruned* model tells it for all of them at once. Taylor expansions at the dense model are
biased at the distance of pruning. For pruners that change the kept weights a descent by Wanda's masks goes too far;
κ = 0.6 is the second point of a search, and `prune.gradient_at = "own"` descends by what the pruner makes
(`blocks.gradients`).
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from atp_tune.allocations.bits import SLACK, bits_at, cheapest, share_at
from atp_tune.allocations.budget import (
    ROUNDING,
    Bounds,
    Budget,
    Costs,
    Formula,
    LinearSparsities,
    Points,
    Shape,
    Sparsities,
    by_block,
    level,
)
from atp_tune.allocations.rows import RowOffsets, RowSparsities

FARTHEST = 1.5  # highest κ
OF_SIZE = 0.5  # target of the one descent where the size is given: its end is shifted to other shares of zeros
HIGHEST = 0.6  # share of zeros there
SHARES = 0.5, 0.4, 0.0  # of zeros, where the search of such a study begins
OF_TYPES = {"omega": (-2.0, 3.0)}  # interval of ω: costs of embedding and head count 2^ω times
STEPS = 20
AT_LOWEST = 4  # steps at the lowest target of a path, where few zeros hardly need an allocation
FURTHER = 8  # steps at each further target of a path
APART = 0.1  # highest distance of two targets of a path
KEPT = 0.7  # share of the former prices in their moving mean
LARGEST = 3.0  # of a price, in standard deviations
FIRST, LAST = 0.03, 0.003  # distances of the steps
DISTANCE = 0.004  # η, the distance of each step of a row
LIMITS = 0.02, 0.98  # of a sparsity during the descent

Prices = Sequence[Sequence[float]]  # one per linear of each block


class Gradient(Formula):
    """Sparsities that descend along the loss of the pruned model: linears whose weights cost little get sparser.

    The head of this file has the descent. Where the size is given, the share of `zeros` is a parameter too.
    """

    contains = ("uniform",)
    measures_inputs = True
    name = "gradient"

    def bounds(self, budget: Budget) -> Bounds:
        """The intervals of `kappa`, of the share of `zeros` where the size is given, of types of ggml of `omega`."""
        more = {} if budget.size is None else {"zeros": (0.0, budget.target)}
        return {"kappa": (0.0, FARTHEST), **(OF_TYPES if budget.outer else more)}

    def initial_points(self, budget: Budget) -> Points:
        """The end of the descent, and a point on the way to it; where the size is given, ends at some shares."""
        if budget.size is not None:
            return [{"kappa": 1.0, "zeros": zeros} for zeros in SHARES]
        if budget.outer:
            return [{"kappa": 1.0, "omega": 0.0}, {"kappa": 1.0, "omega": 1.0}]
        return [{"kappa": 1.0}, {"kappa": 0.6}]

    def end(self, budget: Budget) -> RowSparsities:
        """The end of the descent, with offsets of rows if they differ; where bits are shared out the cheapest plan."""
        metrics = budget.require_dense_metrics(self.name)
        if budget.widths:
            return RowSparsities(cheapest_shares(metrics.width_costs(), budget))
        return metrics.by_prices(budget.target, budget.pruner, self.name != "gradient")

    def sparsities(self, budget: Budget, kappa: float = 1.0) -> Sparsities:
        """One sparsity per linear, or per block if κ = 0; ValueError outside the bounds."""
        budget.check(self.bounds(budget), kappa=kappa)
        if kappa == 0:
            return (budget.target,) * len(budget.sizes)
        sizes = _sizes(budget.linears)
        wanted = [budget.target + kappa * (s - budget.target) for s in chain.from_iterable(self.end(budget).linears)]
        if abs(_mean(wanted, sizes) - budget.target) > 1e3 * SLACK:  # the end of a descent at another target
            wanted = _levelled(wanted, sizes, budget.target, 0.0, 1.0)
        return by_block(level(wanted, sizes, budget.target), budget.linears)


class GradientRows(Gradient):
    """Sparsities of `gradient`, and of single rows (outputs) within their linear too.

        s_l = S + κ (s*_l - S),    k_lr = n_l (s_l + κ d_lr)                           l a linear, r one of its rows

    S target, n inputs, k the number of zeros of a row; κ (`kappa`), the descent and s* as in `Gradient`, but that its
    loss is the mean of NLL and KL from the dense model, that of distillation (Hinton et al., 2015). d is the offset of
    a row, 0 in the mean of its linear. It descends with s*, by the same gradients G:

        p_lr  the mean of - G_ij W_ij over the weights of the row that go next and went last (`blocks/gradients.py`)
        v_lr ← 0.7 v_lr + 0.3 p_lr
        u_lr = (v_lr - v̄_l) / sqrt(mean (v - v̄_l)²), clipped to ±3                   means over the rows of the linear
        d_lr ← d_lr - η u_lr

    Where a pruner does not take the lowest scores of each row (SparseGPT, ALPS, magnitude, patterns), the plan is that
    of `Gradient`.

    Reason: Wanda's rule is the same number of zeros in each row, since scores of two rows do not compare: each is about
    its own output. What an output is worth to the model, the gradient of the loss tells. Small steps at ever new masks
    matter: of one large step most rows are wrong at its end (docs/log.md). Offsets are so many numbers that by the NLL
    alone they learn the calibration text as training does; with KL they keep what the dense model predicts of other
    texts too.
    """

    name = "gradient-rows"

    def row_offsets(self, budget: Budget, kappa: float = 1.0) -> RowOffsets | None:
        """The offsets of rows; None where rows do not differ within their linear."""
        offsets = self.end(budget).offsets if kappa else None
        return offsets and offsets.scaled(kappa)


by_linear, by_row = Gradient(), GradientRows()


def cheapest_shares(costs: Costs, budget: Budget) -> LinearSparsities:
    """The shares between most and fewest bits of the cheapest widths, whose mean is at least the target."""
    sizes, widths = _sizes(budget.linears), budget.widths
    room = bits_at(budget.target, widths) * sum(sizes)
    chosen = cheapest([*chain.from_iterable(costs)], [[width * size for width in widths] for size in sizes], room)
    return by_block([share_at(-widths[index], widths) for index in chosen], budget.linears)


def path(low: float, high: float) -> tuple[float, ...]:
    """The targets of the path over an interval, ascending."""
    parts = max(1, math.ceil((high - low) / APART - ROUNDING))
    return tuple(low + (high - low) * k / parts for k in range(parts + 1))


def steps_along(targets: Sequence[float]) -> int:
    """Number of steps of a descent along these targets."""
    return sum(_steps(targets, index) for index in range(len(targets)))


def _steps(targets: Sequence[float], index: int) -> int:
    """Number of steps at one of these targets."""
    if len(targets) == 1:
        return STEPS
    return FURTHER if index else AT_LOWEST


def descend(
    linears: Sequence[Sequence[Shape]], targets: Sequence[float], prices_at: Callable[[int, LinearSparsities], Prices]
) -> Iterator[LinearSparsities]:
    """The end of the descent at each of these ascending targets, as it is reached; the first begins at uniform.

    `prices_at(step, sparsities)` measures prices, in nats per weight.
    """
    sizes, done = _sizes(linears), 0
    sparsities, smooth = [targets[0]] * len(sizes), [0.0] * len(sizes)
    for index, target in enumerate(targets):
        low, high = min(LIMITS[0], target), max(LIMITS[1], target)
        sparsities = _levelled(sparsities, sizes, target, low, high) if index else sparsities
        for step in range(STEPS - _steps(targets, index), STEPS):
            prices = chain.from_iterable(prices_at(done, by_block(sparsities, linears)))
            smooth = [KEPT * v + (1 - KEPT) * p for v, p in zip(smooth, prices, strict=True)]
            distance = FIRST * (1 - step / STEPS) + LAST
            wanted = [s - distance * u for s, u in zip(sparsities, _standardised(smooth, sizes), strict=True)]
            sparsities = _levelled(wanted, sizes, target, low, high)
            done += 1
        yield by_block(sparsities, linears)


def between(targets: Sequence[float], ends: Sequence[RowSparsities], target: float) -> RowSparsities:
    """The end of the descent at a target within a path, linear between the two ends beside it."""
    after = min(max(1, bisect_left(targets, target)), len(targets) - 1)
    if after == 0 or target >= targets[after]:
        return ends[after]
    before = after - 1
    return ends[before].towards(ends[after], max(0.0, (target - targets[before]) / (targets[after] - targets[before])))


def _levelled(values: Sequence[float], sizes: Sequence[int], target: float, low: float, high: float) -> list[float]:
    """Values shifted such that their mean is the target, within limits."""
    excess = _mean(values, sizes) - target
    return list(level([value - excess for value in values], sizes, target, low, high))


def _standardised(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Values minus their mean, in standard deviations, at most `LARGEST`; all 0 if they are equal."""
    mean = _mean(values, sizes)
    deviation = math.sqrt(_mean([(value - mean) ** 2 for value in values], sizes))
    if deviation == 0:
        return [0.0] * len(values)
    return [min(LARGEST, max(-LARGEST, (value - mean) / deviation)) for value in values]


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _sizes(linears: Sequence[Sequence[Shape]]) -> list[int]:
    return [shape.size for shape in chain.from_iterable(linears)]
