"""Sparsities by prices: the descent of `allocations.prices` on the calibration text, once per path and levels.

The result is kept in the cache by everything that determines it, so that later runs and other studies need no descent;
so are the steps of a descent until its end, so that an interrupted one goes on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

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
from atp_tune.allocations.row_prices import DISTANCE
from atp_tune.allocations.rows import RowOffsets, RowSparsities
from atp_tune.blocks.gradients import Sample
from atp_tune.blocks.levels import BAND, GRID, ByPlaces, ByPruner, Levels, Places
from atp_tune.blocks.pricing import Pricing
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.blocks.row_pricing import RowPricing
from atp_tune.checkpoints.devices import host_memory
from atp_tune.checkpoints.linears import Linear
from atp_tune.events import Message, Step, TrialStarted
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import order_in_rows
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.search.calibration_gradients import CalibrationGradients
from atp_tune.search.descent_steps import DescentSteps
from atp_tune.spec.recover import NLL_SHARES, Loss

POOL = 32768  # tokens of the calibration text that the windows of all steps are drawn from
TOKENS, WINDOWS = 2048, 4  # of a step: so many tokens, but at least so many windows
FEWER = 2  # times as few of both along a path of several targets, whose steps are twice as many, and below
FEW_ZEROS = 0.45  # zeros, of which half the tokens find nearly the same plan (docs/log.md)
LEVEL_SHARE = 0.3  # maximum share of the free host memory for what a pruner made of the weights
OF_STEPS = STEPS, AT_LOWEST, FURTHER, KEPT, LARGEST, FIRST, LAST, LIMITS
CONSTANTS = (*OF_STEPS, BAND, POOL, TOKENS, FEWER, FEW_ZEROS, WINDOWS)

Ends = tuple[RowSparsities, ...]


class PricingProtocol(Protocol):
    """Measures prices, for a descent."""

    def prices(self, sparsities: LinearSparsities, sample: Sample) -> Prices:
        """Price of each linear of each block at these sparsities, for the mean loss of the sample."""

    def state(self) -> dict[str, Tensor]:
        """What the next prices depend on beside sparsities and sample."""

    def resume(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state."""


class Descent:
    """Descends by prices, whose steps draw their items from the pool of the gradients.

    `pricing`: makes what measures them; `levels`: what its weights are pruned by, as JSON.
    """

    share = 1.0  # of the NLL in the loss; the rest is KL from the dense model

    def __init__(
        self, gradients: CalibrationGradients, pricing: Callable[[], PricingProtocol], levels: Sequence[Any]
    ) -> None:
        self._gradients = gradients
        self._pricing = pricing
        self._levels = levels

    def ends(self, targets: Sequence[float], measured: str) -> Ends:
        """The end of the descent at each of these ascending targets, from the cache if possible.

        `measured`: SHA-256 of all that determines the statistics, such as model and calibration windows.
        """
        own = {"targets": list(targets), "levels": self._levels, "constants": list(CONSTANTS)}
        found = self._gradients.kept(lambda place: self._descend(targets, place), dense=measured, **own)
        return tuple(self._read(end) for end in found)

    def _read(self, end: Any) -> RowSparsities:
        """An end as `_descend` returns it, read from JSON."""
        return RowSparsities(tuple(map(tuple, end)))

    def _end(self, pricing: PricingProtocol, end: LinearSparsities) -> Any:
        """An end that was just reached, as JSON."""
        return end

    def _descend(self, targets: Sequence[float], place: Path) -> list[Any]:
        """The ends, by way of the steps that an interrupted run has left at `place`."""
        gradients, watch = self._gradients, self._gradients.watch
        pricing, steps = self._pricing(), DescentSteps(place)
        windows, total = windows_of_step(gradients.pool.positions, targets), steps_along(targets)
        samples = gradients.samples(windows, total, self.share)
        watch(TrialStarted("prices", None))
        if before := len(steps.prices):
            watch(Message(f"prices: goes on after step {before} of {total}"))
            pricing.resume(steps.state)

        def prices_at(step: int, sparsities: LinearSparsities) -> Prices:
            sample = next(samples)
            if step >= before:
                watch(Step("step", step + 1, total))
                steps.add(pricing.prices(sparsities, sample), pricing.state())
            return steps.prices[step]

        for number, end in enumerate(descend(gradients.checkpoint.shapes, targets, prices_at)):
            if number == len(steps.ends):
                steps.ends.append(self._end(pricing, end))
        return steps.ends


class RowDescent(Descent):
    """The descent whose rows move too, by masks `places` of the lowest scores of each row."""

    def __init__(self, gradients: CalibrationGradients, places: Places, score: Score, loss: Loss) -> None:
        super().__init__(gradients, lambda: RowPricing(gradients.of_blocks, places), [score, "rows", DISTANCE, loss])
        self.share = NLL_SHARES[loss]

    def _read(self, end: Any) -> RowSparsities:
        linears, offsets = end
        return RowSparsities(tuple(map(tuple, linears)), RowOffsets.read(offsets, self._gradients.checkpoint.shapes))

    def _end(self, pricing: PricingProtocol, end: LinearSparsities) -> Any:
        assert isinstance(pricing, RowPricing)
        return end, pricing.offsets().stored()


def by_score(
    gradients: CalibrationGradients,
    score: Score,
    statistics: Callable[[int], BlockStatistics],
    group: int | None,
    rows: Loss | None = None,
) -> Descent:
    """The descent by masks of the lowest scores of each row, or group.

    `statistics`: of a block's inputs in the dense model, as norms or ranks; `rows`: rows move too, by this loss.
    """

    def by_wanda(index: int, linear: Linear, weight: Tensor) -> Tensor:
        known = statistics(index).get(linear.name)
        if isinstance(known, Ranks):
            return known.places
        if known is None:
            return by_magnitude(weight, group)
        return order_in_rows(Wanda.scores(weight, known), group)

    places = by_wanda if score == "wanda" else lambda index, linear, weight: by_magnitude(weight, group)
    if rows:
        return RowDescent(gradients, places, score, rows)
    levels = ByPlaces(places)
    return _descent(gradients, levels, [score, *([] if group is None else [group])])


def by_pruner(gradients: CalibrationGradients, pruner: Pruner, statistics: Callable[[int], BlockStatistics]) -> Descent:
    """The descent by what a pruner makes of the weights; `statistics`: as it has prepared them."""
    levels = ByPruner(pruner, statistics, int(LEVEL_SHARE * host_memory()))
    return _descent(gradients, levels, [repr(pruner), GRID])


def _descent(gradients: CalibrationGradients, levels: Levels, own: Sequence[Any]) -> Descent:
    return Descent(gradients, lambda: Pricing(gradients.of_blocks, levels), own)


def windows_of_step(positions: int, targets: Sequence[float]) -> int:
    """Number of items of a step, of so many positions each."""
    share = FEWER if len(targets) > 1 or targets[-1] < FEW_ZEROS else 1
    return max(WINDOWS // share, TOKENS // share // positions)


def by_magnitude(weight: Tensor, group: int | None = None) -> Tensor:
    """Places [out, in] of the magnitudes of a weight in the order in which its rows lose weights."""
    return order_in_rows(weight.abs().float(), group)
