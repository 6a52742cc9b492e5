"""Scores of dense and pruned models on the items of one role, part by part."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import embed
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.events import EventHandler, Step
from atp_tune.inputs import Batch
from atp_tune.run.dense_model import dense_blocks
from atp_tune.scores import Score, WindowScores, joined
from atp_tune.scores.evaluation import Block, final_scores, final_states, group_scores, passing

GROUPS = 8  # groups of validation windows; a stopper may end a trial between two groups


class RoleScorer:
    """Scores models on the items of one role; `batch` and `heads` size the batches of blocks and head."""

    def __init__(
        self, replay: Replay, score: Score, items: Batch, batch: AutoBatch, heads: AutoBatch, watch: EventHandler
    ) -> None:
        self.items = items
        self.batch = batch
        self._replay = replay
        self._score = score
        self._heads = heads
        self._watch = watch
        self._dense_states: list[Tensor] = []

    def scores(self, blocks: Iterable[Block], one_by_one: bool, kl: bool) -> Iterator[WindowScores]:
        """Scores of a model, given as blocks, on at most `GROUPS` parts of the items.

        `one_by_one`: compute a part only when the caller requests it, if all blocks fit into memory. `kl`: also the KL
        from the dense model.
        """
        parts = self.parts()
        dense = self._dense_final_states(parts) if kl else []
        if not one_by_one or not can_keep(self._replay.checkpoint):
            yield from self._group_scores(blocks, parts, dense)
            return
        kept = list(blocks)
        for index, part in enumerate(parts):
            yield from self._group_scores(kept, [part], dense[index : index + 1])

    def alongside(self, kl: bool) -> "Alongside":
        """What scores a model on the items while its blocks pass by for another role; `kl` as in `scores`."""
        parts = self.parts()
        dense = self._dense_final_states(parts) if kl else []
        return Alongside(self._replay, self._score, self.batch, self._heads, parts, dense)

    def parts(self) -> list[Batch]:
        """The items in parts whose lengths differ by at most one, none smaller than a batch."""
        size, more = divmod(len(self.items), count := min(GROUPS, -(-len(self.items) // self.batch.windows)))
        ends = [part * size + min(part, more) for part in range(count + 1)]
        return [self.items[start:end] for start, end in pairwise(ends)]

    def _group_scores(
        self, blocks: Iterable[Block], parts: Sequence[Batch], dense: Sequence[Tensor]
    ) -> Iterator[WindowScores]:
        counted_blocks = counted(blocks, self._replay.checkpoint, self._watch)
        return group_scores(self._replay, self._score, self.batch, self._heads, counted_blocks, parts, dense)

    def _dense_final_states(self, parts: Sequence[Batch]) -> Sequence[Tensor]:
        """Final hidden states [windows, tokens, width] of the dense model for each part, in host memory.

        Computed once, in the batches of a trial, so that the KL of the dense model from itself is exactly 0.
        """
        if not self._dense_states:
            self._dense_states = dense_final_states(self._replay, self.batch, parts, self._watch)
        sizes = [len(part) for part in parts]
        if [len(hidden) for hidden in self._dense_states] == sizes:
            return self._dense_states
        return torch.split(torch.cat(self._dense_states), sizes)  # batches became smaller when memory ran out


class Alongside:
    """Scores of one model whose blocks pass by once, equal to those of `RoleScorer.scores` to the last bit."""

    def __init__(
        self,
        replay: Replay,
        score: Score,
        batch: AutoBatch,
        heads: AutoBatch,
        parts: Sequence[Batch],
        dense: Sequence[Tensor],
    ) -> None:
        self._replay = replay
        self._score = score
        self._batch = batch
        self._heads = heads
        self._parts = parts
        self._dense = dense
        self._states: list[Tensor] = []

    @torch.inference_mode()
    def follow(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yields the blocks after the items have gone through them."""
        self._states = [embed(self._replay, self._batch, part) for part in self._parts]
        yield from passing(self._replay, self._batch, blocks, self._states, self._parts)

    @torch.inference_mode()
    def scores(self) -> WindowScores:
        """The scores on all items, after the last block."""
        found = final_scores(self._replay, self._score, self._heads, self._parts, self._states, self._dense)
        return joined(list(found))


def dense_final_states(
    replay: Replay, batch: AutoBatch, parts: Sequence[Batch], watch: EventHandler, phase: str = "evaluate"
) -> list[Tensor]:
    """Final hidden states [items, positions, width] of the dense model for each part, in host memory."""
    blocks = counted(dense_blocks(replay.checkpoint), replay.checkpoint, watch, phase)
    return [states.cpu() for states in final_states(replay, batch, blocks, parts)]


def counted(
    blocks: Iterable[Block], checkpoint: Checkpoint, watch: EventHandler, phase: str = "evaluate"
) -> Iterator[Block]:
    """The blocks of a model as they pass, each a step of `phase` when the next one is asked for."""
    for index, weights in blocks:
        yield index, weights
        watch(Step(phase, index + 1, len(checkpoint.blocks)))


def can_keep(checkpoint: Checkpoint) -> bool:
    """Whether a pruned copy of all linears fits on the device beside the dense ones."""
    needed = sum(checkpoint.sizes) * checkpoint.dtype.itemsize
    return checkpoint.offload == "none" and needed < 0.5 * free_memory(checkpoint.device)
