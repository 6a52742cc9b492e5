"""Token windows of a text, drawn as the field draws them and kept in the cache by content.

random: the C4 loader of Wanda and SparseGPT (`get_c4`). consecutive: their WikiText-2 convention
(`get_wikitext2`, `eval_ppl`), all documents joined by blank lines, tokenised in one go, cut without overlap.

Without BOS (beginning-of-sequence token) windows are theirs to the last token: a tokenizer that puts a BOS before what
it is given puts one before the joined text, or before each drawn document, and the window that starts there has it; no
other has. With BOS every window of `tokens` ids is BOS and `tokens - 1` ids of the text, which has none of its own:
consecutive windows are cut in strides of `tokens - 1`, so that each token of the text is predicted once. The first
prediction, which has seen BOS alone, counts: an NLL is the mean over the `tokens - 1` positions after the first.
"""

import hashlib
import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atp_tune.cache import cache_dir, keep, sha256_of, sha256_of_json
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.models import Notify, silent
from atp_tune.checkpoints.trust import CODE
from atp_tune.errors import UserError
from atp_tune.inputs.documents import documents, source_content
from atp_tune.spec.study import Text

if TYPE_CHECKING:
    import torch

Encode = Callable[[str], list[int]]

_FORMAT = 1  # counted up when the same settings come to other windows
# config.json names the tokenizer's class where nothing else does.
_TOKENIZER = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.codes",
)
_CHARACTERS_PER_TOKEN = 8  # more than any usual text has
_MARGIN = 1024  # tokens: a cut text is tokenised differently only near the cut


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of one length: `ids` int64 [windows, tokens], and the SHA-256 of ids and shape; `bos`: each begins with
    BOS.
    """

    ids: np.ndarray
    content: str
    bos: bool = False

    @classmethod
    def of(cls, ids: np.ndarray, bos: bool = False) -> "Windows":
        """Windows of these ids, with their SHA-256."""
        return cls(ids, hashlib.sha256(f"{ids.shape}".encode() + ids.astype("<i8").tobytes()).hexdigest(), bos)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """Tokens of a window."""
        return int(self.ids.shape[1])

    def batch(self, device: "torch.device") -> "torch.Tensor":
        """The ids [windows, tokens] on a device."""
        import torch

        return torch.from_numpy(self.ids).to(device)

    def thinned(self, every: int) -> "Windows":
        """The first window and every so many-th after it: what `every` in a study's text leaves."""
        return Windows.of(np.ascontiguousarray(self.ids[::every]), self.bos)


def token_windows(
    text: Text, folder: Path, base: Path, notify: Notify = silent, trusted: bool = False, bos: bool = False
) -> Windows:
    """The windows of a study's text with the tokenizer in `folder`, whose code may run if it is trusted.

    Relative paths start at `base`. `bos`: each begins with BOS; UserError where the tokenizer has none.

    A second call reads them from the cache and loads neither text nor tokenizer. Errors: UserError in one
    line that starts with the key of the text.
    """
    stored = cache_dir("windows") / f"{_key(text, folder, base, trusted, bos)}.npy"
    if stored.is_file():
        ids = np.load(stored, allow_pickle=False)
    else:
        notify(f"reading and tokenising {text.source}")
        encode, first = _encoder(folder, trusted, bos)
        ids = DRAWS[text.sampling](documents(text, base), encode, text, first)[:: text.stride]
        packed = io.BytesIO()
        np.save(packed, ids)
        keep(stored, packed.getvalue())
    return Windows.of(ids, bos)


def first_windows(text: Text, folder: Path, base: Path, most: int, trusted: bool = False, bos: bool = False) -> Windows:
    """The first windows of a consecutive text, at most so many: all where it is shorter; UserError if it has none."""
    encode, first = _encoder(folder, trusted, bos)
    ids = _head(documents(text, base), encode, most * text.seqlen)
    count = min(most, len(ids) // (text.seqlen - len(first)))
    if count == 0:
        raise UserError(f"seqlen: {text.source} has {len(ids)} tokens, not one window of {text.seqlen}; lower seqlen")
    return Windows.of(_cut(ids, count, text.seqlen, first), bos)


def stretches(windows: Windows, count: int) -> list[Windows]:
    """The same windows in so many parts of equal length, one after the other."""
    size = len(windows) // count
    return [Windows.of(windows.ids[part * size : (part + 1) * size], windows.bos) for part in range(count)]


def check_disjoint(named: Mapping[str, Windows]) -> None:
    """Raises a UserError if two roles share a window, token by token."""
    seen: dict[bytes, str] = {}
    for role, windows in named.items():
        rows = [row.tobytes() for row in windows.ids]
        for index, row in enumerate(rows):
            if row in seen:
                other = seen[row]
                raise UserError(
                    f"texts.{role}: window {index} is also in texts.{other}; give them other texts or parts"
                )
        seen |= dict.fromkeys(rows, role)


def recut(windows: Windows, tokens: int) -> Windows:
    """The same tokens of the text, without BOS, in windows of so many, to be compared with those of another text.

    With BOS windows of different lengths do not begin at the same places: they are put together again before the cut.
    """
    ids = windows.ids[:, 1:].reshape(1, -1) if windows.bos else windows.ids
    per = ids.shape[1] // tokens * tokens
    return Windows.of(np.ascontiguousarray(ids[:, :per]).reshape(-1, tokens))


def _key(text: Text, folder: Path, base: Path, trusted: bool, bos: bool) -> str:
    patterns = (*_TOKENIZER, CODE) if trusted else _TOKENIZER
    found = (file for pattern in patterns for file in folder.glob(pattern))
    files = {file.name: sha256_of(file) for file in found if file.exists() and not file.is_dir()}
    return sha256_of_json(
        {
            "format": _FORMAT,
            "text": text.model_dump(exclude={"draws"}),
            "content": source_content(text, base),
            "tokenizer": files,
            "libraries": [version("transformers"), version("tokenizers")],
            **({"bos": True} if bos else {}),  # without, keys are those of before there was a choice
        }
    )


def load_tokenizer(folder: Path, trusted: bool) -> Any:
    """The tokenizer in a folder; UserError if it cannot be loaded. `trusted`: code in it may run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # whatever the many tokenizers raise
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error


def bos_of(tokenizer: Any) -> int | None:
    """The id of a tokenizer's BOS; None where it has none.

    A model's config is not asked: Qwen's names an id there although its tokenizer, and its training, know no BOS.
    """
    found = getattr(tokenizer, "bos_token_id", None)
    return found if isinstance(found, int) else None


def _encoder(folder: Path, trusted: bool, bos: bool) -> tuple[Encode, list[int]]:
    """What makes ids of a text, and the ids that each window begins with: none without BOS.

    With BOS a text has no other, so that two never follow each other: the tokenizer is told to add none, and what the
    text itself spells so is left out.
    """
    tokenizer = load_tokenizer(folder, trusted)
    first = bos_of(tokenizer) if bos else None
    if bos and first is None:
        raise UserError(f"texts.bos: the tokenizer in {folder} has no BOS token; leave it out, or set it to false")

    def encode(text: str) -> list[int]:
        try:  # verbose=False: texts longer than the model's context are meant, and cut into windows later
            ids = list(tokenizer(text, verbose=False, **({"add_special_tokens": False} if bos else {})).input_ids)
        except Exception as error:  # whatever the many tokenizers raise
            raise UserError(f"the tokenizer in {folder} cannot read the text: {one_line(error)}") from error
        return [token for token in ids if token != first] if bos else ids

    return encode, [] if first is None else [first]


def _cut(ids: Sequence[int], count: int, tokens: int, first: list[int]) -> np.ndarray:
    """Windows [count, tokens] without overlap, each behind the ids that it begins with."""
    stride = tokens - len(first)
    rows = np.array(ids[: count * stride], np.int64).reshape(count, stride)
    return np.hstack([np.full((count, len(first)), first, np.int64), rows])


def _random(found: Sequence[str], encode: Encode, text: Text, first: list[int]) -> np.ndarray:
    """Draws documents until one is longer than a window, then where the window starts: the order of Wanda."""
    generator = random.Random(text.seed)
    encoded = lru_cache(maxsize=32)(lambda index: encode(found[index]))
    short: dict[int, int] = {}
    rows, tokens = [], text.seqlen - len(first)
    for _ in range(text.nsamples or 0):
        ids = _long_document(generator, encoded, len(found), tokens, short)
        start = generator.randint(0, len(ids) - tokens - 1)
        rows.append([*first, *ids[start : start + tokens]])
    return np.array(rows, np.int64)


def _long_document(
    generator: random.Random,
    encoded: Callable[[int], list[int]],
    count: int,
    tokens: int,
    short: dict[int, int],
) -> list[int]:
    """Ids of the first drawn document with more than `tokens`; `short` keeps the lengths of the others."""
    while len(short) < count:
        index = generator.randint(0, count - 1)
        if index in short:
            continue
        if len(ids := encoded(index)) > tokens:
            return ids
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
            f"nsamples: {text.source} has {len(ids)} tokens, that is {count} windows of {text.seqlen}; "
            f"{asked} cannot be cut, lower nsamples or seqlen"
        )
    return _cut(ids, text.nsamples or count, text.seqlen, first)


def _head(found: Sequence[str], encode: Encode, needed: int | None) -> list[int]:
    """Ids of the joined documents: all, or at least the first `needed`, read no further than that takes."""
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
    """The first `count` characters of the joined documents, and whether that is all of them."""
    pieces: list[str] = []
    length = 0
    for document in found:
        pieces.append(document)
        length += len(document) + 2
        if length > count + 2:
            return "\n\n".join(pieces)[:count], False
    return "\n\n".join(pieces), True


DRAWS = {"random": _random, "consecutive": _consecutive}
