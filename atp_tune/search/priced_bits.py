"""Bits by prices: the widths of linears that cost least, by costs that are measured once and kept in the cache."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from atp_tune.allocations import LinearSparsities, Shape
from atp_tune.allocations.bits import bits_of, cheapest, share_of
from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.bit_pricing import BitPricing
from atp_tune.blocks.gradients import ACTIVATIONS, BlockGradients
from atp_tune.cache import sha256_of_json
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.events import EventHandler, Message, Step, TrialStarted
from atp_tune.inputs import InputKind, Items
from atp_tune.quantizers.rtn import RTN
from atp_tune.scores import Score
from atp_tune.search.priced import kept
from atp_tune.spec.quantize import QuantizeConfig
from atp_tune.storage.process_identity import versions

TOKENS, ITEMS = 12288, 16  # that costs are measured on: so many tokens, but at least so many windows or images

Costs = Sequence[Sequence[Sequence[float]]]


class BitCosts:
    """Measures the costs of bits for one checkpoint and calibration text; `pool`: the items that are drawn from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: InputKind[Items],
        score: Score,
        pool: Items,
        heads: AutoBatch,
        watch: EventHandler,
    ) -> None:
        self._checkpoint = checkpoint
        self._score = score
        self._pool = pool
        self._watch = watch
        needed = ACTIVATIONS * block_bytes(checkpoint)
        self._batch = AutoBatch(checkpoint.device, pool.positions, needed, lambda text: watch(Message(text)))
        self._gradients = BlockGradients(checkpoint, inputs, score.gradient, self._batch, heads)
        self._heads = heads

    def of(self, quantize: QuantizeConfig, measured: str) -> Costs:
        """The costs of each linear at each width, from the cache if possible.

        `measured`: SHA-256 of all that determines the dense model and the calibration windows.
        """
        settings = [quantize.group_size, quantize.symmetric, list(quantize.widths), TOKENS, ITEMS]
        batches = self._batch.windows, self._heads.windows
        score = getattr(self._score, "content", type(self._score).__name__)
        key = sha256_of_json([measured, self._pool.content, score, settings, *batches, versions()])
        found: Costs = kept(key, lambda: self._measure(quantize), self._watch)
        return found

    def _measure(self, quantize: QuantizeConfig) -> Costs:
        items = self._pool.batch(self._checkpoint.device)
        many = min(len(items), items_of_costs(self._pool.positions))
        chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:many]
        nearest, blocks = RTN(quantize.group_size, quantize.symmetric), len(self._checkpoint.blocks)
        self._watch(TrialStarted("prices", None))

        def rounded(weight: Tensor, bits: int) -> Tensor:
            return nearest.quantize(weight, bits, None)

        pricing = BitPricing(self._gradients, rounded, quantize.widths)
        drawn = items[chosen.to(self._checkpoint.device)]
        return pricing.costs(drawn, lambda done: self._watch(Step("block", done, blocks)))


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
