"""Measures the dense model with and without BOS on a few windows of the calibration text."""

from collections.abc import Iterable
from pathlib import Path

import torch

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.inputs.tokens import has_embedding
from atp_tune.inputs.windows import Windows, bos_of, first_windows, load_tokenizer, token_windows
from atp_tune.metrics.bos import TOKENS, WINDOWS, BosEffect
from atp_tune.scores.evaluation import Block, final_states, head_scores
from atp_tune.scores.next_token import NEXT_TOKEN
from atp_tune.spec.texts import Text


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
    ids = _few_windows(text, folder, base).batch(replay.checkpoint.device)
    plain = ids[:, 1:].contiguous()
    states = final_states(replay, batch, blocks, [ids, plain])
    with_bos, without = (
        head_scores(replay, NEXT_TOKEN, heads, plain, hidden).nlls for hidden in (states[0][:, 1:], states[1])
    )
    return BosEffect.of(str(tokenizer.bos_token), with_bos, without, ids.shape[1])


def _few_windows(text: Text, folder: ModelFolder, base: Path) -> Windows:
    """A few windows of a text, with BOS."""
    few = text.model_copy(update={"nsamples": WINDOWS, "seqlen": min(TOKENS, text.seqlen), "stride": 1})
    if text.sampling == "random":
        return token_windows(few, folder.path, base, trusted=folder.trusted, bos=True)
    return first_windows(few, folder.path, base, WINDOWS, folder.trusted, bos=True)
