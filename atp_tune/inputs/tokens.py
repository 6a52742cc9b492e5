"""Items of token ids as a kind of input: a model is called with ids [windows, tokens]."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.checkpoints.blocks import check_known, reads_images
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import ImageSet, Text
from atp_tune.config.facts import BOS
from atp_tune.errors import UserError, within
from atp_tune.inputs import Batch, InputKind, cut_draws
from atp_tune.inputs.items import IDS, Items, shared
from atp_tune.inputs.pictures import Pictures, pictures
from atp_tune.inputs.windows import check_disjoint, first_windows, token_windows
from atp_tune.utils.extras import require
from atp_tune.utils.paths import written

# --- Pairs of an image and a text, on which a model that reads images beside text is calibrated.
#
# The model's own processor makes the ids, with as many image tokens as an image takes, and the pixels: by its chat
# template, the image before the text, else by its image token and the text. All pairs are cut to `seqlen` tokens, so
# that none is padded and blocks are called as on windows of text of that length; shorter pairs are left out.

MASK = "attention_mask"


def read_pairs(text: Text, folder: ModelFolder, base: Path) -> Items:
    """The pairs of a calibration text with images; UserError that starts with a key of the text."""
    if not reads_images(folder.path):
        raise UserError(f"images: {folder.id} reads text alone; leave it out, or take a model that reads images too")
    found, processor = _source(text, base), _processor(folder)
    rows: list[dict[str, Tensor]] = []
    for index in _order(len(found), text):
        made = _pair(processor, found, index, text.seqlen)
        if made is not None:
            rows.append(made)
        if len(rows) == text.nsamples:
            break
    wanted = text.nsamples or 1
    if len(rows) < wanted:
        raise UserError(
            f"nsamples: {len(rows)} of {len(found)} pairs have {text.seqlen} tokens with their image, {wanted} are "
            "asked for; lower it or seqlen"
        )
    return Items.of(_stacked(rows[:: text.stride]), image=_image_token(processor))


def _source(text: Text, base: Path) -> Pictures:
    """Images with their texts as labels."""
    kind, _, place = text.source.partition(":")
    source = f"parquet:{written(place, base, 'source')}" if kind == "file" else text.source
    options = {"config": text.config, "split": text.split, "revision": text.revision} if kind == "hub" else {}
    return pictures(ImageSet(source=source, column=str(text.images), label=text.column, **options), base)


def _order(count: int, text: Text) -> list[int]:
    """The pairs of the part, in order or, with random sampling, shuffled by the seed."""
    start, end = (int(share * count) for share in text.part)
    rows = list(range(start, end))
    if text.sampling == "consecutive":
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(text.seed))
    return [rows[place] for place in order.tolist()]


def _processor(folder: ModelFolder) -> Any:
    from transformers import AutoProcessor

    require("images", "images")
    try:
        with quiet("transformers"):
            found = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder.path), local_files_only=True, trust_remote_code=folder.trusted, backend="pil"
            )
    except Exception as error:  # processors raise many types
        raise UserError(f"images: the processor of {folder.id} cannot be loaded: {one_line(error)}") from error
    if getattr(found, "tokenizer", None) is None or getattr(found, "image_processor", None) is None:
        raise UserError(f"images: {folder.id} has no processor of images beside text")
    return found


def _pair(processor: Any, found: Pictures, index: int, tokens: int) -> dict[str, Tensor] | None:
    """Makes the arguments with which the model is called for one pair, cut to `tokens`; None if the pair is shorter."""
    picture, words = found.picture(index), str(found.labels[index])
    try:
        with quiet("transformers"):
            text = _written(processor, words)
            bos = getattr(processor.tokenizer, "bos_token", None)
            once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}  # the template has written BOS
            made = dict(processor(text=text, images=[picture], return_tensors="pt", **once))
    except Exception as error:  # processors raise many types
        raise UserError(f"images: the processor does not take {found.name(index)}: {one_line(error)}") from error
    made = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    ids, image = made[IDS], _image_token(processor)
    if not bool((ids == image).any()):
        raise UserError(f"images: the processor makes no image token of {found.name(index)}")
    if ids.shape[1] < tokens:
        return None
    if bool((ids[:, tokens:] == image).any()):
        raise UserError(f"seqlen: {tokens} tokens do not hold the image of {found.name(index)}; raise seqlen")
    length = ids.shape[1]
    cut = {  # of what has a value for each token, such as the ids and their types
        name: value[:, :tokens] if value.dim() == 2 and value.shape[1] == length else value
        for name, value in made.items()
    }
    mask = cut.pop(MASK, None)
    if mask is not None and not bool((mask == 1).all()):
        raise UserError(f"images: the processor pads {found.name(index)}; not supported")
    return cut


def _image_token(processor: Any) -> int:
    """The id of the image token; UserError for a processor that names none."""
    own = getattr(processor, "image_token_id", None)
    token = getattr(processor, "image_token", None)
    if own is None and isinstance(token, str):
        own = processor.tokenizer.convert_tokens_to_ids(token)
    if not isinstance(own, int):
        raise UserError("images: the processor names no image token; leave the images out")
    return own


def _written(processor: Any, words: str) -> str:
    """The image token, or what the chat template makes of an image, before the text."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": words}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    return f"{processor.image_token}{words}"


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all pairs, [pairs, …]; UserError if those of some pairs have other shapes."""
    first = rows[0]
    for row in rows:
        shapes = {name: tuple(value.shape) for name, value in row.items()}
        if shapes != {name: tuple(value.shape) for name, value in first.items()}:
            raise UserError("images: the processor cuts images of other sizes otherwise; give images of one size")
    if wrong := next((name for name, value in first.items() if len(value) != 1), None):
        raise UserError(f"images: {wrong} of the processor has not one row for each image; not supported yet")
    return {name: torch.cat([row[name] for row in rows]) for name in first}


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
            raise UserError(
                f"texts.calibration.draws: {count} draws of {text.nsamples} windows follow each other in a text; "
                f'{error.what}, or draws, or set sampling = "random"'
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
        pairs = {role: found for role, found in items.items() if len(found.tensors) > 1}
        check_disjoint({role: windows for role, windows in items.items() if role not in pairs})
        for role, doubles in shared(pairs).items():
            for index, other in doubles.items():
                raise UserError(f"texts.{role}: pair {index} is also in texts.{other}; give them other files or parts")

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
    with within(f"texts.{role}", column="images", label="column"):
        return read_pairs(text, folder, base)


def has_text(items: Items) -> bool:
    """Whether each item has a token, after its first, that stands for no image."""
    return items.image is None or bool((items.ids[:, 1:] != items.image).any(1).all())


def read_text(role: str, text: Text, folder: ModelFolder, base: Path, bos: bool, draws: int = 1) -> Items:
    """The windows of the text of one role, of all draws one after the other; UserError that names the key."""
    with within(f"texts.{role}"):
        return token_windows(text, folder.path, base, trusted=folder.trusted, bos=bos, draws=draws)


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
