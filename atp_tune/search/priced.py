"""Sparsities by prices: the descent of `allocations.prices` on the calibration text, once per path and score.

The result is kept in the cache by everything that determines it, so that later runs and other studies need no descent.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from atp_tune.allocations import LinearSparsities
from atp_tune.allocations.budget import Score as RankedBy
from atp_tune.allocations.prices import (
    AT_LOWEST,
    FIRST,
    FURTHER,
    KEPT,
    LARGEST,
    LAST,
    LIMITS,
    STEPS,
    Prices,
    descend,
    steps_along,
)
from atp_tune.blocks.pricing import BAND, Pricing
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.checkpoints.linears import Linear
from atp_tune.events import Step, TrialStarted
from atp_tune.pruners.selection import order_in_rows
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.search.calibration_gradients import CalibrationGradients

POOL = 32768  # tokens of the calibration text that the windows of all steps are drawn from
TOKENS, WINDOWS = 2048, 4  # of a step: so many tokens, but at least so many windows
ALONG = 2  # times as few of both along a path of several targets, whose steps are twice as many
PASSES = 4  # forward passes that a gradient costs: one to keep the states, one again in each block, two backward
CONSTANTS = (STEPS, AT_LOWEST, FURTHER, KEPT, LARGEST, FIRST, LAST, LIMITS, BAND, POOL, TOKENS, ALONG, WINDOWS)

Ends = tuple[LinearSparsities, ...]


class Descent:
    """Descends by prices, whose steps draw their items from the pool of the gradients.

    `statistics`: of a block's inputs in the dense model, as norms or ranks; `group`: of the pattern.
    """

    def __init__(
        self,
        gradients: CalibrationGradients,
        statistics: Callable[[int], BlockStatistics],
        group: int | None = None,
    ) -> None:
        self._gradients = gradients
        self._statistics = statistics
        self._group = group

    def ends(self, targets: Sequence[float], score: RankedBy, measured: str) -> Ends:
        """The end of the descent at each of these ascending targets, from the cache if possible.

        `measured`: SHA-256 of all that determines the statistics, such as model and calibration windows.
        """
        own = [list(targets), score, *([] if self._group is None else [self._group])]
        found = self._gradients.kept(measured, own, [list(CONSTANTS)], lambda: self._descend(targets, score))
        return tuple(tuple(tuple(row) for row in end) for end in found)

    def _descend(self, targets: Sequence[float], score: RankedBy) -> Ends:
        gradients, watch = self._gradients, self._gradients.watch
        pricing = Pricing(gradients.of_blocks, self._by_wanda if score == "wanda" else self._by_magnitude)
        drawn = gradients.drawing(windows_of_step(gradients.pool.positions, targets))
        watch(TrialStarted("prices", None))

        def prices_at(step: int, sparsities: LinearSparsities) -> Prices:
            watch(Step("step", step + 1, steps_along(targets)))
            return pricing.prices(sparsities, drawn())

        return descend(gradients.checkpoint.shapes, targets, prices_at)

    def _by_wanda(self, index: int, linear: Linear, weight: Tensor) -> Tensor:
        known = self._statistics(index).get(linear.name)
        if isinstance(known, Ranks):
            return known.places
        if known is None:
            return self._by_magnitude(index, linear, weight)
        return order_in_rows(Wanda.scores(weight, known), self._group)

    def _by_magnitude(self, index: int, linear: Linear, weight: Tensor) -> Tensor:
        return by_magnitude(weight, self._group)


def windows_of_step(positions: int, targets: Sequence[float]) -> int:
    """Number of items of a step, of so many positions each."""
    share = ALONG if len(targets) > 1 else 1
    return max(WINDOWS // share, TOKENS // share // positions)


def by_magnitude(weight: Tensor, group: int | None = None) -> Tensor:
    """Places [out, in] of the magnitudes of a weight in the order in which its rows lose weights."""
    return order_in_rows(weight.abs().float(), group)
