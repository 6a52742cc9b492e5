"""Scores of a model whose weights are given block by block.

Each block is used once, in order, so a model may be larger than memory. For KL the dense model is given by its final
hidden states; its logits would need too much memory, so they are computed again.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import advance, embed, entering
from atp_tune.blocks.replay import Replay
from atp_tune.inputs import Batch
from atp_tune.scores import Score, WindowScores, joined

Block = tuple[int, dict[str, Tensor]]  # index, tensors by name


def group_scores(
    replay: Replay,
    score: Score,
    batch: AutoBatch,
    heads: AutoBatch,
    blocks: Iterable[Block],
    groups: Sequence[Batch],
    dense: Sequence[Tensor] = (),
) -> Iterator[WindowScores]:
    """Scores of each group of items; all groups go through each block before the next block.

    `batch` sets the batch size in blocks, `heads` that in the head. `dense`: final hidden states of the dense model for
    each group, for KL.
    """
    yield from final_scores(replay, score, heads, groups, final_states(replay, batch, blocks, groups), dense)


def final_scores(
    replay: Replay,
    score: Score,
    heads: AutoBatch,
    groups: Sequence[Batch],
    states: Sequence[Tensor],
    dense: Sequence[Tensor],
) -> Iterator[WindowScores]:
    """Scores of each group of items from its final hidden states; `dense` as in `group_scores`."""
    for index, (group, hidden) in enumerate(zip(groups, states, strict=True)):
        yield head_scores(replay, score, heads, group, hidden, dense[index] if dense else None)


def final_states(replay: Replay, batch: AutoBatch, blocks: Iterable[Block], groups: Sequence[Batch]) -> list[Tensor]:
    """Hidden states [items, positions, width] after the last block, of each group."""
    states = [embed(replay, batch, group) for group in groups]
    for _ in passing(replay, batch, blocks, states, groups):
        pass
    return states


def passing(
    replay: Replay, batch: AutoBatch, blocks: Iterable[Block], states: list[Tensor], groups: Sequence[Batch]
) -> Iterator[Block]:
    """Yields the blocks after hidden states [items, positions, width] of several groups have gone through them.

    `states` then holds those after the block; in a vision tower those before it, since the model's own code runs a
    tower as a whole when all of its blocks are known.
    """
    tower: list[dict[str, Tensor]] = []
    for index, weights in blocks:
        if index < replay.in_tower:
            tower.append(weights)
            yield index, weights
            continue
        for group, hidden in enumerate(states):
            entered = entering(replay, batch, index, hidden, groups[group], tower)
            states[group] = advance(replay, batch, index, weights, entered)
        yield index, weights


def head_scores(
    replay: Replay, score: Score, heads: AutoBatch, items: Batch, hidden: Tensor, dense: Tensor | None = None
) -> WindowScores:
    """Scores of items, from their final hidden states [items, positions, width]."""

    def step(rows: slice) -> WindowScores:
        return score.items(replay, items[rows], hidden[rows], None if dense is None else dense[rows])

    return joined(heads.over(len(items), step))
