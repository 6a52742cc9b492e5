"""Token windows of a text, drawn as in the papers, and cached by content.

random: as in the C4 loader of Wanda and SparseGPT (`get_c4`). consecutive: as in their WikiText-2 evaluation
(`get_wikitext2`, `eval_ppl`): all documents are joined by blank lines, tokenised as a whole, and cut without overlap.

Without BOS (beginning-of-sequence token) windows are equal to theirs: a tokenizer that adds BOS adds it once, before
the joined text or a drawn document, so only a window that starts there has it. With BOS, each window of `tokens` ids is
BOS and `tokens - 1` ids of the text, in which there is no other BOS; consecutive windows have a stride of `tokens - 1`,
so that each token of the text is predicted once. An NLL is the mean over the `tokens - 1` positions after the first.
"""

import io
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atp_tune.checkpoints.blocks import check_known, check_language, reads_images
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import as_user_error, one_line, quiet
from atp_tune.checkpoints.devices import Tensors, is_out_of_memory
from atp_tune.checkpoints.files import CODE
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import ImageSet, Text, short_source
from atp_tune.errors import UserError, within
from atp_tune.inputs import Batch, cut_draws
from atp_tune.inputs.items import IDS, ByRole, Items, shared
from atp_tune.inputs.pictures import Pictures, pictures
from atp_tune.inputs.sources import documents, find_source
from atp_tune.storage.fingerprint import BOS
from atp_tune.utils.cache import cache_dir, keep, key, package_version, sha256_of
from atp_tune.utils.system import require, written

Encode = Callable[[str], list[int]]

_TOKENIZER = (  # files of tokenizers; config.json may name the class
    "config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "*.spm", "*.codes",
)  # fmt: skip
_CHARACTERS_PER_TOKEN = 8  # more than in usual texts
_TRIES = 1000  # to draw a window that shares no token with those of earlier draws
_MARGIN = 1024  # tokens near a cut of the text, which may be tokenised differently


LEAST_RUN = 64  # tokens: texts of one kind share shorter runs, such as a line of a table, unless windows are shorter
BASE, MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # odd


def token_windows(
    text: Text, folder: Path, base: Path, trusted: bool = False, bos: bool = False, draws: int = 1
) -> Items:
    """The windows of a study's text with the tokenizer in `folder`, from the cache if possible.

    Relative paths start at `base`; `trusted`: code in `folder` may run; `bos`: each window begins with BOS; `draws`: so
    many random draws, with the seeds that follow, one after the other.

    Errors: UserError that starts with a key of the text, or if there is no BOS.
    """
    _check_text(text)
    stored = cache_dir("windows") / f"{_key(text, folder, base, trusted, bos, draws)}.npy"
    if stored.is_file():
        ids = np.load(stored, allow_pickle=False)
    else:
        encode, first = _encoder(folder, trusted, bos)
        cut = partial(_random, draws=draws) if text.sampling == "random" else _consecutive
        ids = in_turn([cut(documents(kind, base), encode, kind, first) for kind in text.kinds], draws)[:: text.stride]
        packed = io.BytesIO()
        np.save(packed, ids)
        keep(stored, packed.getvalue())
    return Items.windows(ids, bos)


def first_windows(text: Text, folder: ModelFolder, base: Path, most: int, bos: bool = False) -> Items:
    """At most the first `most` windows of a consecutive text; UserError if the text is shorter than a window."""
    _check_text(text)
    encode, first = _encoder(folder.path, folder.trusted, bos)
    wanted = text.model_copy(update={"nsamples": most})
    parts = [_consecutive(documents(kind, base), encode, kind, first, at_most=True) for kind in wanted.kinds]
    return Items.windows(in_turn(parts), bos)


def in_turn(parts: Sequence[np.ndarray], draws: int = 1) -> np.ndarray:
    """Windows [windows, tokens] of each part in turn, until one has no more, within each of so many equal draws."""
    of_draws = [part.reshape(draws, -1, part.shape[1]) for part in parts]
    count = min(part.shape[1] * len(parts) + index for index, part in enumerate(of_draws))
    return np.stack([of_draws[at % len(parts)][draw, at // len(parts)] for draw in range(draws) for at in range(count)])


def _check_text(text: Text) -> None:
    """UserError for pairs of image and text, of which only a calibration takes the images too."""
    if text.images is not None:
        raise UserError("images: pairs of image and text are for calibration; give another text")


def shared_windows(one: Items, other: Items) -> list[int]:
    """The windows of `one` that share a run of tokens with `other`: half a window of the shorter ones, or 64 tokens.

    If both are cut from one text, each shorter window lies within a longer one, or at least half of it does. Of windows
    of fewer than 128 tokens those count of which more is shared, a whole one of 64 or fewer.
    """
    shorter = min(windows.positions - windows.bos for windows in (one, other))
    run = max(1, shorter // 2, min(shorter, LEAST_RUN))
    return np.flatnonzero(np.isin(_runs(one, run), _runs(other, run)).any(1)).tolist()


def _runs(windows: Items, run: int) -> np.ndarray:
    """A number for each run of so many tokens [windows, runs]: equal for equal runs, as a polynomial modulo 2⁶⁴.

    Σ_i x_i bⁱ over a run is the difference of two sums from the window's first token, times b to minus its place.
    """
    ids = windows.ids[:, int(windows.bos) :].astype(np.uint64)
    ids = (ids + np.uint64(1)) * MIX
    ids ^= ids >> np.uint64(31)
    powers = np.full(ids.shape[1], BASE, np.uint64).cumprod(dtype=np.uint64)
    sums = np.zeros((len(ids), ids.shape[1] + 1), np.uint64)
    (ids * powers).cumsum(1, dtype=np.uint64, out=sums[:, 1:])
    inverses = np.full(ids.shape[1], pow(int(BASE), -1, 1 << 64), np.uint64).cumprod(dtype=np.uint64)
    numbers: np.ndarray = (sums[:, run:] - sums[:, :-run]) * inverses[: ids.shape[1] - run + 1]
    return numbers


def _key(text: Text, folder: Path, base: Path, trusted: bool, bos: bool, draws: int) -> str:
    patterns = (*_TOKENIZER, CODE) if trusted else _TOKENIZER
    paths = (file for pattern in patterns for file in folder.glob(pattern))
    files = {file.name: sha256_of(file) for file in paths if file.exists() and not file.is_dir()}
    return key(
        "windows",
        text=text.model_dump(exclude={"draws"}),
        content=find_source(text).identify(text, base),
        tokenizer=files,
        libraries=[package_version("transformers"), package_version("tokenizers")],
        bos=bos,
        draws=draws,
    )


def load_tokenizer(folder: Path, trusted: bool) -> Any:
    """Loads the tokenizer of a folder; UserError if that fails. `trusted`: code in the folder may run."""
    from transformers import AutoTokenizer

    check_language(folder, "the tokenizer")
    with as_user_error(f"the tokenizer in {folder} cannot be loaded"):
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trusted)


def bos_id(tokenizer: Any) -> int | None:
    """The id of a tokenizer's BOS, or None.

    The config of the model is not used: that of Qwen has an id, although it was trained without BOS.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    return token if isinstance(token, int) else None


def _encoder(folder: Path, trusted: bool, bos: bool) -> tuple[Encode, list[int]]:
    """A function from text to ids, and the ids that each window begins with, [BOS] or [].

    With BOS, the tokenizer adds no BOS of its own, and any BOS in the text is removed, so that BOS only starts windows.
    """
    tokenizer = load_tokenizer(folder, trusted)
    first = bos_id(tokenizer) if bos else None
    if bos and first is None:
        raise UserError(f"texts.bos: the tokenizer in {folder} has no BOS token; leave it out, or set it to false")

    def encode(text: str) -> list[int]:
        with as_user_error(f"the tokenizer in {folder} cannot read the text"):
            # verbose=False: no warning about texts longer than the context of the model
            ids = list(tokenizer(text, verbose=False, **({"add_special_tokens": False} if bos else {})).input_ids)
        return [token for token in ids if token != first] if bos else ids

    return encode, [] if first is None else [first]


def _random(documents: Sequence[str], encode: Encode, text: Text, first: list[int], draws: int) -> np.ndarray:
    """For each window, draws documents until one is longer than it, then its start, in the same order as Wanda.

    Each of the draws has a seed of its own. A window that shares a token with one of an earlier draw is drawn again.
    """
    encoded = lru_cache(maxsize=32)(lambda index: encode(documents[index]))
    short = dict[int, int]()
    rows, tokens, taken = [], text.seqlen - len(first), list[tuple[int, int]]()

    def long_document(generator: random.Random) -> tuple[int, list[int]]:
        """Index and ids of the first drawn document with more than `tokens` ids; `short`: the lengths of the others."""
        while len(short) < len(documents):
            index = generator.randint(0, len(documents) - 1)
            if index in short:
                continue
            if len(ids := encoded(index)) > tokens:
                return index, ids
            short[index] = len(ids)
        raise UserError(
            f"seqlen: none of the {len(documents)} documents is longer than {tokens} tokens, the longest has "
            f'{max(short.values())}; lower seqlen, or set sampling = "consecutive"'
        )

    for draw in range(draws):
        generator, own = random.Random(text.seed + draw), list[tuple[int, int]]()
        for _ in range(text.nsamples or 0):
            for _ in range(_TRIES):
                index, ids = long_document(generator)
                start = generator.randint(0, len(ids) - tokens - 1)
                if not any(index == other and abs(start - offset) < tokens for other, offset in taken):
                    break
            else:
                raise UserError(
                    f"draws: {short_source(text.source)} is too short for {draws} draws of {text.nsamples} windows of "
                    f"{tokens} tokens that share none; lower draws"
                )
            own.append((index, start))
            rows.append([*first, *ids[start : start + tokens]])
        taken += own
    return np.array(rows, np.int64)


def _consecutive(
    documents: Sequence[str], encode: Encode, text: Text, first: list[int], at_most: bool = False
) -> np.ndarray:
    """The first `nsamples` windows, or all; UserError if there are fewer, with `at_most` if there is none."""
    ids = _head(documents, encode, None if text.nsamples is None else text.nsamples * text.seqlen)
    stride = text.seqlen - len(first)
    count = len(ids) // stride
    if at_most and not count:
        raise UserError(
            f"seqlen: {short_source(text.source)} has {len(ids)} tokens, not one window of {text.seqlen}; lower seqlen"
        )
    if not at_most and count < (text.nsamples or 1):
        wanted = "one window" if text.nsamples is None else f"{text.nsamples} windows"
        raise UserError(
            f"nsamples: {short_source(text.source)} has {len(ids)} tokens, that is {count} windows of {text.seqlen}; "
            f"{wanted} cannot be cut, lower nsamples or seqlen"
        )
    count = min(text.nsamples or count, count)
    rows = np.array(ids[: count * stride], np.int64).reshape(count, stride)
    return np.hstack([np.full((count, len(first)), first, np.int64), rows])  # without overlap


def _head(documents: Sequence[str], encode: Encode, needed: int | None) -> list[int]:
    """Ids of the joined documents: all, or at least the first `needed`, reading as little as possible."""
    if needed is None:
        return encode("\n\n".join(documents))
    characters = (needed + _MARGIN) * _CHARACTERS_PER_TOKEN
    while True:
        pieces, length = list[str](), 0
        for document in documents:
            pieces.append(document)
            length += len(document) + 2
            if length > characters + 2:
                break
        ids = encode("\n\n".join(pieces)[:characters])
        if length <= characters + 2 or len(ids) >= needed + _MARGIN:
            return ids
        characters *= 4


# --- Items of token ids as a kind of input: a model is called with ids [windows, tokens].

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
    # Images with their texts as labels.
    kind, _, path = text.source.partition(":")
    source = f"parquet:{written(path, base, 'source')}" if kind == "file" else text.source
    options = {"config": text.config, "split": text.split, "revision": text.revision} if kind == "hub" else {}
    pairs = pictures(ImageSet(source=source, column=str(text.images), label=text.column, **options), base)
    require("images", "images")
    processor = load_processor(folder.path, folder.trusted, "images:", f"of {folder.id}")
    made = (_pair(processor, pairs, index, text.seqlen) for index in _order(len(pairs), text))
    rows = list(islice((pair for pair in made if pair is not None), text.nsamples))
    wanted = text.nsamples or 1
    if len(rows) < wanted:
        raise UserError(
            f"nsamples: {len(rows)} of {len(pairs)} pairs have {text.seqlen} tokens with their image, {wanted} are "
            "asked for; lower it or seqlen"
        )
    return Items.of(_stacked(rows[:: text.stride]), image=_image_token(processor))


def _order(count: int, text: Text) -> list[int]:
    """The pairs of the part, in order or, with random sampling, shuffled by the seed."""
    rows = torch.arange(*(int(share * count) for share in text.part))
    if text.sampling == "random":
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(text.seed))]
    return rows.tolist()


def load_processor(folder: Path, trusted: bool, asks: str, whose: str) -> Any:
    """Loads the processor of a folder, with Pillow. `trusted`: code in the folder may run.

    UserError, which begins with what `asks` for it and says `whose` it is, such as "of ORG/NAME" or "in FOLDER", if it
    cannot be loaded.
    """
    from transformers import AutoProcessor

    with as_user_error(f"{asks} the processor {whose} cannot be loaded"), quiet("transformers"):
        processor = AutoProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trusted, backend="pil"
        )
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{asks} {whose.partition(' ')[2]} has no processor of images beside text")
    return processor


def _pair(processor: Any, pictures: Pictures, index: int, tokens: int) -> Tensors | None:
    """Makes the arguments with which the model is called for one pair, cut to `tokens`; None if the pair is shorter."""
    picture, name = pictures.picture(index), pictures.name(index)
    with as_user_error(f"images: the processor does not take {name}"), quiet("transformers"):
        text = _written(processor, str(pictures.labels[index]))
        bos = getattr(processor.tokenizer, "bos_token", None)
        once = {"add_special_tokens": False} if bos and text.startswith(bos) else {}  # the template has written BOS
        arguments = dict(processor(text=text, images=[picture], return_tensors="pt", **once))
    arguments = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    ids, image = arguments[IDS], _image_token(processor)
    if not bool((ids == image).any()):
        raise UserError(f"images: the processor makes no image token of {name}")
    length = ids.shape[1]
    if length < tokens:
        return None
    if bool((ids[:, tokens:] == image).any()):
        raise UserError(f"seqlen: {tokens} tokens do not hold the image of {name}; raise seqlen")
    cut = {  # of what has a value for each token, such as the ids and their types
        key: value[:, :tokens] if value.dim() == 2 and value.shape[1] == length else value
        for key, value in arguments.items()
    }
    mask = cut.pop(MASK, None)
    if mask is not None and not bool((mask == 1).all()):
        raise UserError(f"images: the processor pads {name}; not supported")
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


def _stacked(rows: list[Tensors]) -> Tensors:
    """The tensors of all pairs, [pairs, …]; UserError if those of some pairs have other shapes."""
    first, shapes = rows[0], [{name: value.shape for name, value in row.items()} for row in rows]
    if any(each != shapes[0] for each in shapes):
        raise UserError("images: the processor cuts images of other sizes otherwise; give images of one size")
    if wrong := next((name for name, value in first.items() if len(value) != 1), None):
        raise UserError(f"images: {wrong} of the processor has not one row for each image; not supported yet")
    return {name: torch.cat([row[name] for row in rows]) for name in first}


class TokenWindows:
    """The `InputKind` of causal language models; its items are windows."""

    called = "a text"
    has_steps = False

    def of(self, items: ByRole) -> "TokenWindows":
        """The kind itself, whatever the length of the windows."""
        return self

    def read(self, texts: Mapping[str, Text], folder: ModelFolder, base: Path, bos: bool) -> dict[str, Items]:
        """The windows of each text; UserError for bad input, or if two texts share a window."""
        windows = {role: read_items(role, text, folder, base, bos) for role, text in texts.items()}
        self.check_disjoint(windows)
        return windows

    def draws(
        self, text: Text, count: int, positions: int, folder: ModelFolder, base: Path, bos: bool
    ) -> list[tuple[Items, Items]]:
        """Items and pool of each draw: with the seeds that follow, or from the windows that follow."""
        assert text.nsamples is not None
        pool = max(1, positions // text.seqlen)
        per = max(text.nsamples, pool if positions else 0)
        if text.sampling == "random":
            windows = read_text("calibration", text.of_length(per), folder, base, bos, count)
        else:
            try:
                windows = read_text("calibration", text.of_length(count * text.nsamples), folder, base, bos)
            except UserError as error:
                raise UserError(
                    f"texts.calibration.draws: {count} draws of {text.nsamples} windows follow each other in a text; "
                    f'{error.what}, or draws, or set sampling = "random"'
                ) from None
            if per > text.nsamples:
                windows = first_windows(text, folder, base, count * per, bos)
        return cut_draws(windows, count, text.nsamples, text.stride, pool)

    def many(self, text: Text, positions: int, folder: ModelFolder, base: Path, bos: bool) -> Items:
        """Items of a calibration text with `positions` tokens: the first that are drawn, or of the text."""
        count = max(1, positions // text.seqlen)
        if text.sampling == "random":
            return read_text("calibration", text.of_length(count), folder, base, bos)
        return first_windows(text, folder, base, count, bos)

    def check_disjoint(self, items: ByRole) -> None:
        """UserError if two roles share text, in whatever windows it is cut, or a pair of image and text."""
        pairs = {role: own for role, own in items.items() if len(own.tensors) > 1}
        roles = [role for role in items if role not in pairs]
        for index, role in enumerate(roles):
            for other in roles[:index]:
                if found := shared_windows(items[role], items[other]):
                    what = "is" if items[role].positions == items[other].positions else "has text that is"
                    raise UserError(
                        f"texts.{role}: window {found[0]} {what} also in texts.{other}; give them other texts or parts"
                    )
        for role, doubles in shared(pairs).items():
            for index, other in doubles.items():
                raise UserError(f"texts.{role}: pair {index} is also in texts.{other}; give them other files or parts")

    def check_fit(self, checkpoint: Checkpoint, items: ByRole, embed: Callable[[Batch], Tensor]) -> None:
        """UserError if a model has no embedding of a token or too few positions for a window, or nothing to predict."""
        for role, windows in items.items():
            if windows.bos and (first := int(windows.ids[0, 0])) >= vocabulary(checkpoint):
                raise UserError(
                    f"texts.bos: the model has no embedding of its tokenizer's BOS, {first}; set it to false"
                )
            if role != "calibration" and not has_text(windows):
                raise UserError(f"texts.{role}.seqlen: {windows.positions} tokens of a pair hold no text; raise seqlen")
            check_known(checkpoint.model, int(windows.ids.max()), f"texts.{role}")
            check_length(checkpoint, windows, embed, f"texts.{role}")

    def facts(self, items: ByRole) -> dict[str, bool]:
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


TOKEN_WINDOWS = TokenWindows()


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
    """Number of token ids that a model embeds; some tokenizers have a default BOS outside of it."""
    return int(checkpoint.config.get_text_config().vocab_size)


@torch.inference_mode()
def check_length(checkpoint: Checkpoint, windows: Items, embed: Callable[[Batch], Tensor], what: str) -> None:
    """UserError if the windows of a text are too long for a model, such as for its learned positions."""
    try:
        embed(windows.batch(checkpoint.device)[:1])
    except (IndexError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        maximum = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
        positions = "" if maximum is None else f", which has {maximum} positions"
        raise UserError(
            f"{what}.seqlen: the model{positions}, cannot take windows of {windows.positions} tokens "
            f"({one_line(error)}); lower seqlen"
        ) from None
