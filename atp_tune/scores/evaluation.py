"""Scores of a model that is given as weights per block.

Blocks are met once, in order, so they may come one at a time, as a model larger than memory does. The dense model,
where it is compared with, is its final hidden states: its logits would fit into no memory, so they are computed again
beside the others.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import advance, embed
from atp_tune.blocks.replay import Replay
from atp_tune.inputs import Batch
from atp_tune.scores import Score, WindowScores

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
    """Scores of the items of each group, after all groups went through the blocks together.

    `batch` sizes the batches of the blocks, `heads` those of the head. `dense`: final states of the dense model for
    each group, if it is to be compared with.
    """
    states = final_states(replay, batch, blocks, groups)
    for index, (group, hidden) in enumerate(zip(groups, states, strict=True)):
        yield head_scores(replay, score, heads, group, hidden, dense[index] if dense else None)


def final_states(replay: Replay, batch: AutoBatch, blocks: Iterable[Block], groups: Sequence[Batch]) -> list[Tensor]:
    """Hidden states [items, positions, width] that leave the last block, of each group of items."""
    states = [embed(replay, batch, group) for group in groups]
    for index, weights in blocks:
        for hidden in states:
            advance(replay, batch, index, weights, hidden)
    return states


def head_scores(
    replay: Replay, score: Score, heads: AutoBatch, items: Batch, hidden: Tensor, dense: Tensor | None = None
) -> WindowScores:
    """Scores of each item, from final hidden states [items, positions, width]."""
    found = WindowScores([], [])
    while len(found.nlls) < len(items):
        start = len(found.nlls)

        def step(count: int, start: int = start) -> WindowScores:
            rows = slice(start, start + count)
            return score.items(replay, items[rows], hidden[rows], None if dense is None else dense[rows])

        for scores, more in zip(found, heads.run(step), strict=True):
            scores.extend(more)
    return found
