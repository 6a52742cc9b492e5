"""Wanda on statistics that stay the same from trial to trial: weights are ranked once, then a mask is a comparison.

Where the statistics are those of the dense model, so are Wanda's scores, and only the number of weights that go changes
with the plan. Selecting them anew takes a screening trial as long as the evaluation of its few windows.
"""

from collections.abc import Sequence

from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.blocks.statistics_cache import PerBlock
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.pruners import Pruner
from atp_tune.pruners.wanda import Ranks, Wanda

SHARE = 0.3  # of the free memory may be taken
BYTES = 2  # of a rank, in rows of up to 32,768 weights; twice as many beyond


class Ranked(PerBlock):
    """Statistics of all blocks: as they are when a block is asked for first, as ranks of its weights from then on.

    A plan that is pruned once has no use for ranks, which take as long to find as two or three masks.
    """

    def __init__(self, statistics: Sequence[BlockStatistics], checkpoint: Checkpoint) -> None:
        super().__init__(len(statistics))
        self._statistics = statistics
        self._checkpoint = checkpoint
        self._ranks: dict[int, BlockStatistics | None] = {}

    def of(self, index: int) -> BlockStatistics:
        """Those of a block."""
        if index not in self._ranks:
            plain = self._statistics[index]
            self._ranks[index] = None
            return plain
        found = self._ranks[index]
        if found is None:
            found = self._ranks[index] = self._ranked(index)
        return found

    def _ranked(self, index: int) -> BlockStatistics:
        found, weights = self._statistics[index], self._checkpoint.weights(index)
        linears = [linear for linear in self._checkpoint.linears[index] if linear.name in found]
        return {x.name: Ranks.of(x.matrix(weights[x.key]), found[x.name]) for x in linears}


def can_rank(pruner: Pruner, checkpoint: Checkpoint) -> bool:
    """Whether ranks say all that a pruner needs to know, and there is room for them beside the weights."""
    is_by_row = isinstance(pruner, Wanda) and pruner.compare == "row" and pruner.group is None
    needed = BYTES * sum(checkpoint.sizes)
    return is_by_row and checkpoint.residency == "device" and needed < SHARE * free_memory(checkpoint.device)
