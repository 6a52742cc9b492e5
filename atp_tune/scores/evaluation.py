"""Scores of a model whose weights are given block by block.

Each block is used once, in order, so a model may be larger than memory. For KL the dense model is given by its final
hidden states; its logits would need too much memory, so they are computed again.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from atp_tune.blocks.prune_pass import advance, embed, entering
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import Text
from atp_tune.inputs import Batch
from atp_tune.inputs.items import IDS, Items
from atp_tune.inputs.tokens import has_embedding
from atp_tune.inputs.windows import bos_of, first_windows, load_tokenizer, token_windows
from atp_tune.metrics import BOS_TOKENS, BOS_WINDOWS, BosEffect
from atp_tune.scores import Score, Scores, joined
from atp_tune.scores.next_token import NEXT_TOKEN

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
) -> Scores:
    """Scores of items, from their final hidden states [items, positions, width]."""

    def step(rows: slice) -> Scores:
        return score.items(replay, items[rows], hidden[rows], None if dense is None else dense[rows])

    return joined(heads.over(len(items), step))


@torch.inference_mode()
def compare_bos(
    replay: Replay,
    batch: AutoBatch,
    heads: AutoBatch,
    blocks: Iterable[Block],
    folder: ModelFolder,
    text: Text,
    base: Path,
) -> BosEffect | None:
    """Perplexity of the same tokens with and without BOS; None if the tokenizer or the model has no BOS.

    Windows without BOS are those with BOS, minus the first token; the prediction right after BOS does not count. Both
    go through the dense blocks together, so that streamed weights are copied once.
    """
    tokenizer = load_tokenizer(folder.path, folder.trusted)
    bos = bos_of(tokenizer)
    if bos is None or not has_embedding(replay.checkpoint, bos):
        return None
    ids = _few_windows(text, folder, base).tensors[IDS].to(replay.checkpoint.device)
    plain = ids[:, 1:].contiguous()
    states = final_states(replay, batch, blocks, [ids, plain])
    with_bos, without = (
        head_scores(replay, NEXT_TOKEN, heads, plain, hidden)["nlls"] for hidden in (states[0][:, 1:], states[1])
    )
    return BosEffect.of(str(tokenizer.bos_token), with_bos, without, ids.shape[1])


def _few_windows(text: Text, folder: ModelFolder, base: Path) -> Items:
    """A few windows of a text, with BOS."""
    few = text.model_copy(update={"nsamples": BOS_WINDOWS, "seqlen": min(BOS_TOKENS, text.seqlen), "stride": 1})
    if text.sampling == "random":
        return token_windows(few, folder.path, base, trusted=folder.trusted, bos=True)
    return first_windows(few, folder.path, base, BOS_WINDOWS, folder.trusted, bos=True)
