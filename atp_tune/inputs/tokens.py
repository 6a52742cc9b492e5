"""Items of token ids as a kind of input: a model is called with ids [windows, tokens]."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.classes import check_known
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError, named
from atp_tune.inputs import Batch, InputKind, cut_draws
from atp_tune.inputs.items import Items
from atp_tune.inputs.pairs import check_distinct, read_pairs
from atp_tune.inputs.windows import check_disjoint, first_windows, token_windows
from atp_tune.spec.facts import BOS
from atp_tune.spec.texts import Text


class TokenWindows:
    """The `InputKind` of causal language models; its items are windows."""

    called = "a text"
    has_steps = False

    def of(self, items: Mapping[str, Items]) -> "TokenWindows":
        """The kind itself, whatever the length of the windows."""
        return self

    def read(self, texts: Mapping[str, Text], folder: ModelFolder, base: Path, bos: bool) -> dict[str, Items]:
        """The windows of each text; UserError for bad input, or if two texts share a window."""
        found = {role: read_items(role, text, folder, base, bos) for role, text in texts.items()}
        self.check_disjoint(found)
        return found

    def draws(
        self, text: Text, count: int, positions: int, folder: ModelFolder, base: Path, bos: bool
    ) -> list[tuple[Items, Items]]:
        """Items and pool of each draw: with the seeds that follow, or from the windows that follow."""
        assert text.nsamples is not None
        pool = max(1, positions // text.seqlen)
        per = max(text.nsamples, pool if positions else 0)
        if text.sampling == "random":
            more = text.model_copy(update={"nsamples": per, "stride": 1})
            found = read_text("calibration", more, folder, base, bos, count)
            return cut_draws(found, count, text.nsamples, text.stride, pool)
        try:
            whole = text.model_copy(update={"nsamples": count * text.nsamples, "stride": 1})
            found = read_text("calibration", whole, folder, base, bos)
        except UserError as error:
            reason = str(error).removeprefix("texts.calibration: ")
            raise UserError(
                f"texts.calibration.draws: {count} draws of {text.nsamples} windows follow each other in a text; "
                f'{reason}, or draws, or set sampling = "random"'
            ) from None
        if per > text.nsamples:
            found = first_windows(text, folder.path, base, count * per, folder.trusted, bos)
        return cut_draws(found, count, text.nsamples, text.stride, pool)

    def many(self, text: Text, positions: int, folder: ModelFolder, base: Path, bos: bool) -> Items:
        """Items of a calibration text with `positions` tokens: the first that are drawn, or of the text."""
        count = max(1, positions // text.seqlen)
        if text.sampling == "random":
            more = text.model_copy(update={"nsamples": count, "stride": 1})
            return read_text("calibration", more, folder, base, bos)
        return first_windows(text, folder.path, base, count, folder.trusted, bos)

    def check_disjoint(self, items: Mapping[str, Items]) -> None:
        """UserError if two texts share a window, or a pair of image and text."""
        check_disjoint({role: windows for role, windows in items.items() if windows.image is None})
        check_distinct({role: pairs for role, pairs in items.items() if pairs.image is not None})

    def check_fit(self, checkpoint: Checkpoint, items: Mapping[str, Items], embed: Callable[[Batch], Tensor]) -> None:
        """UserError if a model has no embedding of a token or too few positions for a window, or nothing to predict."""
        for role, windows in items.items():
            if windows.bos and not has_embedding(checkpoint, first := int(windows.ids[0, 0])):
                raise UserError(
                    f"texts.bos: the model has no embedding of its tokenizer's BOS, {first}; set it to false"
                )
            if role != "calibration" and not has_text(windows):
                raise UserError(f"texts.{role}.seqlen: {windows.positions} tokens of a pair hold no text; raise seqlen")
            check_known(checkpoint.model, int(windows.ids.max()), f"texts.{role}")
            check_length(checkpoint, windows, embed, f"texts.{role}")

    def facts(self, items: Mapping[str, Items]) -> dict[str, bool]:
        """The fact whether windows begin with BOS."""
        return {BOS: any(windows.bos for windows in items.values())}

    def forward(self, model: nn.Module, batch: Tensor | Items) -> Any:
        """The output of the model for ids, without a cache, so that each window starts without state."""
        if isinstance(batch, Tensor):
            return model(input_ids=batch, use_cache=False)
        return model(**batch.in_dtype(model.dtype), use_cache=False)  # type: ignore[arg-type]

    def examples(self, checkpoint: Checkpoint, items: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [items, positions]: zeros, ascending, and descending in each window."""
        words = getattr(
            checkpoint.config.get_text_config(), "vocab_size", 1
        )  # without it the model names what it lacks
        up = torch.arange(items * positions, device=checkpoint.device).view(items, positions) % words
        return torch.zeros_like(up), up, up.flip(1)


TOKEN_WINDOWS: InputKind = TokenWindows()


def read_items(role: str, text: Text, folder: ModelFolder, base: Path, bos: bool) -> Items:
    """The windows of the text of one role, or its pairs of image and text; UserError that names the key."""
    if text.images is None:
        return read_text(role, text, folder, base, bos)
    with named(f"texts.{role}."):
        return read_pairs(text, folder, base)


def has_text(items: Items) -> bool:
    """Whether each item has a token, after its first, that stands for no image."""
    return items.image is None or bool((items.ids[:, 1:] != items.image).any(1).all())


def read_text(role: str, text: Text, folder: ModelFolder, base: Path, bos: bool, draws: int = 1) -> Items:
    """The windows of the text of one role, of all draws one after the other; UserError that names the key."""
    try:
        return token_windows(text, folder.path, base, trusted=folder.trusted, bos=bos, draws=draws)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(BOS) else f"texts.{role}: {error}") from None


def vocabulary(checkpoint: Checkpoint) -> int:
    """Number of token ids that a model embeds."""
    return int(checkpoint.config.get_text_config().vocab_size)


def has_embedding(checkpoint: Checkpoint, token: int) -> bool:
    """Whether a model embeds a token; some tokenizers have a default BOS outside the vocabulary."""
    return token < vocabulary(checkpoint)


@torch.inference_mode()
def check_length(checkpoint: Checkpoint, windows: Items, embed: Callable[[Batch], Tensor], what: str) -> None:
    """UserError if the windows of a text are too long for a model, such as for its learned positions."""
    try:
        embed(windows.batch(checkpoint.device)[:1])
    except (IndexError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        known = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        positions = "" if known is None else f", which has {known} positions"
        raise UserError(
            f"{what}.seqlen: the model{positions}, cannot take windows of {windows.positions} tokens "
            f"({one_line(error)}); lower seqlen"
        ) from None
