"""Bits by prices: the widths of linears that cost least, by costs that are measured once and kept in the cache."""

from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from atp_tune.allocations import LinearSparsities, Shape
from atp_tune.allocations.bits import bits_of, cheapest, share_of
from atp_tune.blocks.bit_pricing import BitPricing
from atp_tune.events import Step, TrialStarted
from atp_tune.quantizers.rtn import RTN
from atp_tune.search.calibration_gradients import CalibrationGradients
from atp_tune.spec.quantize import QuantizeConfig

TOKENS, ITEMS = 12288, 16  # that costs are measured on: so many tokens, but at least so many windows or images

Costs = Sequence[Sequence[Sequence[float]]]


def bit_costs(gradients: CalibrationGradients, quantize: QuantizeConfig, measured: str) -> Costs:
    """The costs of each linear at each width, from the cache if possible.

    `measured`: SHA-256 of all that determines the dense model and the calibration windows.
    """
    levels = [quantize.group_size, quantize.symmetric, list(quantize.widths)]
    own = {"dense": measured, "targets": [], "levels": levels, "constants": [TOKENS, ITEMS]}
    found: Costs = gradients.kept(lambda _: _measure(gradients, quantize), **own)
    return found


def _measure(gradients: CalibrationGradients, quantize: QuantizeConfig) -> Costs:
    nearest, watch = RTN(quantize.group_size, quantize.symmetric), gradients.watch
    sample = next(gradients.samples(items_of_costs(gradients.pool.positions), 1))
    watch(TrialStarted("prices", None))

    def rounded(weight: Tensor, bits: int) -> Tensor:
        return nearest.quantize(weight, bits, None)

    pricing, blocks = BitPricing(gradients.of_blocks, rounded, quantize.widths), len(gradients.checkpoint.blocks)
    return pricing.costs(sample.items, lambda done: watch(Step("block", done, blocks)))


def items_of_costs(positions: int) -> int:
    """Number of items that costs are measured on, of so many positions each."""
    return max(ITEMS, TOKENS // positions)


def priced_shares(
    costs: Costs, linears: Sequence[Sequence[Shape]], widths: Sequence[int], target: float
) -> LinearSparsities:
    """The shares between most and fewest bits of the cheapest widths, whose mean is at least the target.

    `costs`: by block, linear and width, see `BitPricing`.
    """
    sizes = [shape.size for row in linears for shape in row]
    found = iter(cheapest(list(chain.from_iterable(costs)), sizes, widths, bits_of(target, widths)))
    return tuple(tuple(share_of(next(found), widths) for _ in row) for row in costs)
