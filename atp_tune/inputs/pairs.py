"""Pairs of an image and a text, on which a model that reads images beside text is calibrated.

The model's own processor makes the ids, with as many image tokens as an image takes, and the pixels: by its chat
template, the image before the text, else by its image token and the text. All pairs are cut to `seqlen` tokens, so that
none is padded and blocks are called as on windows of text of that length; shorter pairs are left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.checkpoints.classes import reads_images
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError
from atp_tune.extras import require
from atp_tune.inputs.items import IDS, Items
from atp_tune.inputs.pictures import NO_CLASS, Pictures, pictures
from atp_tune.paths import written
from atp_tune.spec.images import ImageSet
from atp_tune.spec.texts import Text

KEYS = {"column": "images", "label": "column"}  # of images and of their labels → of a text
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


def check_distinct(named: Mapping[str, Items]) -> None:
    """UserError if two roles share a pair."""
    seen: dict[bytes, str] = {}
    for role, pairs in named.items():
        found = pairs.digests() if len(named) > 1 else []
        for index, digest in enumerate(found):
            if digest in seen:
                raise UserError(
                    f"texts.{role}: pair {index} is also in texts.{seen[digest]}; give them other files or parts"
                )
        seen |= dict.fromkeys(found, role)


def _source(text: Text, base: Path) -> Pictures:
    """Images with their texts as labels."""
    kind, _, place = text.source.partition(":")
    source = f"parquet:{written(place, base, 'source')}" if kind == "file" else text.source
    options = {"config": text.config, "split": text.split, "revision": text.revision} if kind == "hub" else {}
    try:
        return pictures(ImageSet(source=source, column=str(text.images), label=text.column, **options), base)
    except UserError as error:
        raise _renamed(error) from None


def _renamed(error: UserError) -> UserError:
    """A message about images by the keys of a text: `images` is the column of images, `column` that of their texts."""
    key, colon, rest = str(error).partition(":")
    return UserError(KEYS.get(key, key) + colon + rest.replace(NO_CLASS, "no text"))


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
    """What the model is called with for one pair, cut to `tokens`; None if the pair is shorter."""
    try:
        picture, words = found.picture(index), str(found.labels[index])
    except UserError as error:
        raise _renamed(error) from None
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
