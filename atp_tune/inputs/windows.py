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
from pathlib import Path
from typing import Any

import numpy as np

from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.files import CODE
from atp_tune.config.data import Text, short_source
from atp_tune.errors import UserError
from atp_tune.events import Notify, silent
from atp_tune.inputs.items import Items
from atp_tune.inputs.sources import documents, source_content
from atp_tune.utils.cache import cache_dir, keep, key, sha256_of, version_of

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
    text: Text,
    folder: Path,
    base: Path,
    notify: Notify = silent,
    trusted: bool = False,
    bos: bool = False,
    draws: int = 1,
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
        notify(f"reading and tokenising {text.source}")
        encode, first = _encoder(folder, trusted, bos)
        cut = partial(_random, draws=draws) if text.sampling == "random" else _consecutive
        parts = [cut(documents(kind, base), encode, kind, first) for kind in text.kinds]
        ids = in_turn(parts, draws)[:: text.stride]
        packed = io.BytesIO()
        np.save(packed, ids)
        keep(stored, packed.getvalue())
    return Items.windows(ids, bos)


def first_windows(text: Text, folder: Path, base: Path, most: int, trusted: bool = False, bos: bool = False) -> Items:
    """At most the first `most` windows of a consecutive text; UserError if the text is shorter than a window."""
    _check_text(text)
    encode, first = _encoder(folder, trusted, bos)
    wanted = text.model_copy(update={"nsamples": most})
    return Items.windows(in_turn([_first(documents(kind, base), encode, kind, first) for kind in wanted.kinds]), bos)


def in_turn(parts: Sequence[np.ndarray], draws: int = 1) -> np.ndarray:
    """Windows [windows, tokens] of each part in turn, until one has no more, within each of so many equal draws."""
    of_draws = [part.reshape(draws, -1, part.shape[1]) for part in parts]
    count = min(part.shape[1] * len(parts) + place for place, part in enumerate(of_draws))
    return np.stack([of_draws[at % len(parts)][draw, at // len(parts)] for draw in range(draws) for at in range(count)])


def _check_text(text: Text) -> None:
    """UserError for pairs of image and text, of which only a calibration takes the images too."""
    if text.images is not None:
        raise UserError("images: pairs of image and text are for calibration; give another text")


def check_disjoint(named: Mapping[str, Items]) -> None:
    """UserError if two roles share text, in whatever windows it is cut."""
    roles = list(named)
    for index, role in enumerate(roles):
        for other in roles[:index]:
            if shared := shared_windows(named[role], named[other]):
                what = "is" if named[role].positions == named[other].positions else "has text that is"
                raise UserError(
                    f"texts.{role}: window {shared[0]} {what} also in texts.{other}; give them other texts or parts"
                )


def shared_windows(one: Items, other: Items) -> list[int]:
    """The windows of `one` that share a run of tokens with `other`: half a window of the shorter ones, or 64 tokens.

    If both are cut from one text, each shorter window lies within a longer one, or at least half of it does. Of windows
    of fewer than 128 tokens those count of which more is shared, a whole one of 64 or fewer.
    """
    shorter = min(windows.positions - windows.bos for windows in (one, other))
    run = max(1, shorter // 2, min(shorter, LEAST_RUN))
    mine = _runs(one, run)
    return np.flatnonzero(np.isin(mine, _runs(other, run)).any(1)).tolist()


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
    found: np.ndarray = (sums[:, run:] - sums[:, :-run]) * inverses[: ids.shape[1] - run + 1]
    return found


def _key(text: Text, folder: Path, base: Path, trusted: bool, bos: bool, draws: int) -> str:
    patterns = (*_TOKENIZER, CODE) if trusted else _TOKENIZER
    found = (file for pattern in patterns for file in folder.glob(pattern))
    files = {file.name: sha256_of(file) for file in found if file.exists() and not file.is_dir()}
    return key(
        "windows",
        text=text.model_dump(exclude={"draws"}),
        content=source_content(text, base),
        tokenizer=files,
        libraries=[version_of("transformers"), version_of("tokenizers")],
        bos=bos,
        draws=draws,
    )


def load_tokenizer(folder: Path, trusted: bool) -> Any:
    """Loads the tokenizer of a folder; UserError if that fails. `trusted`: code in the folder may run."""
    from transformers import AutoTokenizer

    from atp_tune.checkpoints.blocks import check_language

    check_language(folder, "the tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # tokenizers raise many types
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def bos_of(tokenizer: Any) -> int | None:
    """The id of a tokenizer's BOS, or None.

    The config of the model is not used: that of Qwen has an id, although it was trained without BOS.
    """
    found = getattr(tokenizer, "bos_token_id", None)
    return found if isinstance(found, int) else None


def _encoder(folder: Path, trusted: bool, bos: bool) -> tuple[Encode, list[int]]:
    """A function from text to ids, and the ids that each window begins with, [BOS] or [].

    With BOS, the tokenizer adds no BOS of its own, and any BOS in the text is removed, so that BOS only starts windows.
    """
    tokenizer = load_tokenizer(folder, trusted)
    first = bos_of(tokenizer) if bos else None
    if bos and first is None:
        raise UserError(f"texts.bos: the tokenizer in {folder} has no BOS token; leave it out, or set it to false")

    def encode(text: str) -> list[int]:
        try:  # verbose=False: no warning about texts longer than the context of the model
            ids = list(tokenizer(text, verbose=False, **({"add_special_tokens": False} if bos else {})).input_ids)
        except Exception as error:  # tokenizers raise many types
            raise UserError(f"the tokenizer in {folder} cannot read the text: {one_line(error)}") from error
        return [token for token in ids if token != first] if bos else ids

    return encode, [] if first is None else [first]


def _cut(ids: Sequence[int], count: int, tokens: int, first: list[int]) -> np.ndarray:
    """Windows [count, tokens] without overlap, each starting with the ids `first`."""
    stride = tokens - len(first)
    rows = np.array(ids[: count * stride], np.int64).reshape(count, stride)
    return np.hstack([np.full((count, len(first)), first, np.int64), rows])


def _random(found: Sequence[str], encode: Encode, text: Text, first: list[int], draws: int) -> np.ndarray:
    """For each window, draws documents until one is longer than it, then its start, in the same order as Wanda.

    Each of the draws has a seed of its own. A window that shares a token with one of an earlier draw is drawn again.
    """
    encoded = lru_cache(maxsize=32)(lambda index: encode(found[index]))
    short: dict[int, int] = {}
    rows, tokens, taken = [], text.seqlen - len(first), list[tuple[int, int]]()
    for draw in range(draws):
        generator, own = random.Random(text.seed + draw), list[tuple[int, int]]()
        for _ in range(text.nsamples or 0):
            for _ in range(_TRIES):
                index, ids = _long_document(generator, encoded, len(found), tokens, short)
                start = generator.randint(0, len(ids) - tokens - 1)
                if not any(index == other and abs(start - place) < tokens for other, place in taken):
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


def _long_document(
    generator: random.Random,
    encoded: Callable[[int], list[int]],
    count: int,
    tokens: int,
    short: dict[int, int],
) -> tuple[int, list[int]]:
    """Index and ids of the first drawn document with more than `tokens` ids; `short`: the lengths of the others."""
    while len(short) < count:
        index = generator.randint(0, count - 1)
        if index in short:
            continue
        if len(ids := encoded(index)) > tokens:
            return index, ids
        short[index] = len(ids)
    raise UserError(
        f"seqlen: none of the {count} documents is longer than {tokens} tokens, the longest has "
        f'{max(short.values())}; lower seqlen, or set sampling = "consecutive"'
    )


def _consecutive(found: Sequence[str], encode: Encode, text: Text, first: list[int]) -> np.ndarray:
    ids = _head(found, encode, None if text.nsamples is None else text.nsamples * text.seqlen)
    count = len(ids) // (text.seqlen - len(first))
    if count < (text.nsamples or 1):
        asked = "one window" if text.nsamples is None else f"{text.nsamples} windows"
        raise UserError(
            f"nsamples: {short_source(text.source)} has {len(ids)} tokens, that is {count} windows of {text.seqlen}; "
            f"{asked} cannot be cut, lower nsamples or seqlen"
        )
    return _cut(ids, text.nsamples or count, text.seqlen, first)


def _first(found: Sequence[str], encode: Encode, text: Text, first: list[int]) -> np.ndarray:
    """At most the first `nsamples` windows."""
    assert text.nsamples is not None
    ids = _head(found, encode, text.nsamples * text.seqlen)
    count = min(text.nsamples, len(ids) // (text.seqlen - len(first)))
    if count == 0:
        raise UserError(
            f"seqlen: {short_source(text.source)} has {len(ids)} tokens, not one window of {text.seqlen}; lower seqlen"
        )
    return _cut(ids, count, text.seqlen, first)


def _head(found: Sequence[str], encode: Encode, needed: int | None) -> list[int]:
    """Ids of the joined documents: all, or at least the first `needed`, reading as little as possible."""
    if needed is None:
        return encode("\n\n".join(found))
    characters = (needed + _MARGIN) * _CHARACTERS_PER_TOKEN
    while True:
        head, whole = _first_characters(found, characters)
        ids = encode(head)
        if whole or len(ids) >= needed + _MARGIN:
            return ids
        characters *= 4


def _first_characters(found: Sequence[str], count: int) -> tuple[str, bool]:
    """The first `count` characters of the joined documents, and whether these are all."""
    pieces: list[str] = []
    length = 0
    for document in found:
        pieces.append(document)
        length += len(document) + 2
        if length > count + 2:
            return "\n\n".join(pieces)[:count], False
    return "\n\n".join(pieces), True
