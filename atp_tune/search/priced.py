"""Sparsities by prices: the descent of `allocations.prices` on the calibration text, once per path and levels.

The result is kept in the cache by everything that determines it, so that later runs and other studies need no descent.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from atp_tune.allocations import LinearSparsities
from atp_tune.allocations.budget import Score
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
from atp_tune.blocks.levels import BAND, GRID, ByPlaces, ByPruner, Levels
from atp_tune.blocks.pricing import Pricing
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.checkpoints.devices import host_memory
from atp_tune.checkpoints.linears import Linear
from atp_tune.events import Step, TrialStarted
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import order_in_rows
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.search.calibration_gradients import CalibrationGradients

POOL = 32768  # tokens of the calibration text that the windows of all steps are drawn from
TOKENS, WINDOWS = 2048, 4  # of a step: so many tokens, but at least so many windows
ALONG = 2  # times as few of both along a path of several targets, whose steps are twice as many
LEVEL_SHARE = 0.3  # maximum share of the free host memory for what a pruner made of the weights
PASSES = 4  # forward passes that a gradient costs: one to keep the states, one again in each block, two backward
CONSTANTS = (STEPS, AT_LOWEST, FURTHER, KEPT, LARGEST, FIRST, LAST, LIMITS, BAND, POOL, TOKENS, ALONG, WINDOWS)

Ends = tuple[LinearSparsities, ...]


class Descent:
    """Descends by prices, whose steps draw their items from the pool of the gradients.

    `levels`: what is made of the dense weights at each sparsity; `own`: what that depends on beside the dense model and
    the calibration windows, as JSON.
    """

    def __init__(self, gradients: CalibrationGradients, levels: Levels, own: Sequence[Any]) -> None:
        self._gradients = gradients
        self._levels = levels
        self._own = own

    def ends(self, targets: Sequence[float], measured: str) -> Ends:
        """The end of the descent at each of these ascending targets, from the cache if possible.

        `measured`: SHA-256 of all that determines the statistics, such as model and calibration windows.
        """
        own = [list(targets), *self._own]
        found = self._gradients.kept(measured, own, [list(CONSTANTS)], lambda: self._descend(targets))
        return tuple(tuple(tuple(row) for row in end) for end in found)

    def _descend(self, targets: Sequence[float]) -> Ends:
        gradients, watch = self._gradients, self._gradients.watch
        pricing = Pricing(gradients.of_blocks, self._levels)
        drawn = gradients.drawing(windows_of_step(gradients.pool.positions, targets))
        watch(TrialStarted("prices", None))

        def prices_at(step: int, sparsities: LinearSparsities) -> Prices:
            watch(Step("step", step + 1, steps_along(targets)))
            return pricing.prices(sparsities, drawn())

        return descend(gradients.checkpoint.shapes, targets, prices_at)


def by_score(
    gradients: CalibrationGradients, score: Score, statistics: Callable[[int], BlockStatistics], group: int | None
) -> Descent:
    """The descent by masks of the lowest scores of each row, or group.

    `statistics`: of a block's inputs in the dense model, as norms or ranks.
    """

    def by_wanda(index: int, linear: Linear, weight: Tensor) -> Tensor:
        known = statistics(index).get(linear.name)
        if isinstance(known, Ranks):
            return known.places
        if known is None:
            return by_magnitude(weight, group)
        return order_in_rows(Wanda.scores(weight, known), group)

    places = by_wanda if score == "wanda" else lambda index, linear, weight: by_magnitude(weight, group)
    return Descent(gradients, ByPlaces(places), [score, *([] if group is None else [group])])


def by_pruner(gradients: CalibrationGradients, pruner: Pruner, statistics: Callable[[int], BlockStatistics]) -> Descent:
    """The descent by what a pruner makes of the weights; `statistics`: as it has prepared them."""
    levels = ByPruner(pruner, statistics, int(LEVEL_SHARE * host_memory()))
    return Descent(gradients, levels, [repr(pruner), GRID])


def windows_of_step(positions: int, targets: Sequence[float]) -> int:
    """Number of items of a step, of so many positions each."""
    share = ALONG if len(targets) > 1 else 1
    return max(WINDOWS // share, TOKENS // share // positions)


def by_magnitude(weight: Tensor, group: int | None = None) -> Tensor:
    """Places [out, in] of the magnitudes of a weight in the order in which its rows lose weights."""
    return order_in_rows(weight.abs().float(), group)
