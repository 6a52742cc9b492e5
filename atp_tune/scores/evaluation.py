"""Scores of a model whose weights are given block by block.

Each block is used once, in order, so a model may be larger than memory. For KL the dense model is given by its final
hidden states; its logits would need too much memory, so they are computed again.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import advance, embed, entering
from atp_tune.blocks.replay import Replay
from atp_tune.inputs import Batch
from atp_tune.scores import Score, WindowScores, joined

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name


class Passing:
    """Hidden states of groups of items, while blocks pass by.

    `states`: of each group [items, positions, width], after the last block; in a vision tower those before it, since
    the model's own code runs a tower as a whole when all of its blocks are known.
    """

    def __init__(self, replay: Replay, batch: AutoBatch, groups: Sequence[Batch]) -> None:
        self.states = [embed(replay, batch, group) for group in groups]
        self._replay = replay
        self._batch = batch
        self._groups = groups
        self._tower: list[dict[str, Tensor]] = []

    def block(self, index: int, weights: dict[str, Tensor]) -> None:
        """Runs all groups through a block."""
        if index < self._replay.in_tower:
            self._tower.append(weights)
            return
        for group, hidden in enumerate(self.states):
            entered = entering(self._replay, self._batch, index, hidden, self._groups[group], self._tower)
            self.states[group] = advance(self._replay, self._batch, index, weights, entered)


def final_states(replay: Replay, batch: AutoBatch, blocks: Iterable[Block], groups: Sequence[Batch]) -> list[Tensor]:
    """Hidden states [items, positions, width] after the last block, of each group."""
    passing = Passing(replay, batch, groups)
    for index, weights in blocks:
        passing.block(index, weights)
    return passing.states


def head_scores(
    replay: Replay, score: Score, heads: AutoBatch, items: Batch, hidden: Tensor, dense: Tensor | None = None
) -> WindowScores:
    """Scores of items, from their final hidden states [items, positions, width]."""

    def step(rows: slice) -> WindowScores:
        return score.items(replay, items[rows], hidden[rows], None if dense is None else dense[rows])

    return joined(heads.over(len(items), step))
