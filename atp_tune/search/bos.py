"""Asks the dense model, on a few windows of the calibration text, whether its windows should begin with BOS."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atp_tune.errors import UserError
from atp_tune.metrics.bos import TOKENS, WINDOWS, BosEffect
from atp_tune.scores.evaluation import final_states, head_scores
from atp_tune.spec.study import Text
from atp_tune.texts.windows import Windows, bos_of, first_windows, load_tokenizer, token_windows

if TYPE_CHECKING:
    from atp_tune.search.context import TrialContext


@torch.inference_mode()
def compare(context: "TrialContext", text: Text, base: Path) -> BosEffect | None:
    """Perplexity of the same tokens in windows with and without BOS; None where tokenizer or model have none.

    Windows without it are those with it less their first token, and the prediction that only BOS allows does not count
    here. Both kinds go through the blocks together: weights that are streamed come once.
    """
    folder, checkpoint = context.folder, context.checkpoint
    tokenizer = load_tokenizer(folder.path, folder.trusted)
    bos = bos_of(tokenizer)
    if bos is None or not _has_embedding(context, bos):
        return None
    ids = torch.from_numpy(_few(text, folder.path, base, folder.trusted).ids).to(checkpoint.device)
    plain = ids[:, 1:].contiguous()
    states = final_states(context.replay, context.batch("calibration"), context.dense(), [ids, plain])
    with_bos, without = (
        head_scores(context.replay, context.heads, plain, hidden).nlls for hidden in (states[0][:, 1:], states[1])
    )
    return BosEffect.of(str(tokenizer.bos_token), with_bos, without, ids.shape[1])


def check_embedding(context: "TrialContext") -> None:
    """UserError where windows begin with a BOS that the model does not know."""
    first = int(next(iter(context.windows.values())).ids[0, 0])
    if context.bos and not _has_embedding(context, first):
        raise UserError(f"texts.bos: the model has no embedding of its tokenizer's BOS, {first}; set it to false")


def _has_embedding(context: "TrialContext", token: int) -> bool:
    """Whether the model knows a token: some tokenizers are given a BOS of their class, beyond the vocabulary."""
    return token < int(context.checkpoint.config.get_text_config().vocab_size)


def _few(text: Text, folder: Path, base: Path, trusted: bool) -> Windows:
    """A few windows of a text, with BOS."""
    few = text.model_copy(update={"windows": WINDOWS, "tokens": min(TOKENS, text.tokens), "every": 1})
    if text.draw == "random":
        return token_windows(few, folder, base, trusted=trusted, bos=True)
    return first_windows(few, folder, base, WINDOWS, trusted, bos=True)
