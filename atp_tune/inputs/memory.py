"""Texts in the caller's memory, `memory:SHA256`: lists of documents, named by their content."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp_tune.cache import sha256_of_json
from atp_tune.errors import UserError, is_text
from atp_tune.inputs.local import check_no_hub_keys
from atp_tune.spec.texts import MEMORY, Text

COLUMN = "text"

_lent: dict[str, Sequence[str]] = {}


class LentTexts:
    """The source memory:SHA256, while the documents are lent."""

    form = "[0-9a-f]{64}"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents."""
        check_no_hub_keys(text)
        if text.source not in _lent:
            raise UserError(
                f"source: {text.source[:19]}… lay in the memory of a Python process; give the texts again, as in "
                "atp_tune.load_study(…, texts=texts)"
            )
        return _lent[text.source]

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents."""
        return text.source.removeprefix(MEMORY)


LENT = LentTexts()


@contextmanager
def lent(documents: Sequence[str]) -> Iterator[str]:
    """Lends documents to studies, and yields the source by which these name them."""
    source = MEMORY + sha256_of_json(list(documents))
    before = _lent.get(source)
    _lent[source] = documents
    try:
        yield source
    finally:
        if before is None:
            _lent.pop(source, None)


def documents_of(texts: Any, what: str = "texts") -> list[str]:
    """Documents from a list of str, or from the column `text` of a `datasets.Dataset`.

    UserError, which names the argument `what`, for anything else.
    """
    columns = getattr(texts, "column_names", None)
    if columns is not None and not isinstance(columns, Mapping):
        if COLUMN not in columns:
            raise UserError(
                f'{what}: the dataset has no column "{COLUMN}", but {", ".join(columns)}; give one, as in '
                f'dataset["{columns[0] if columns else COLUMN}"]'
            )
        if not hasattr(texts, "__len__"):
            raise UserError(f'{what}: the dataset is streamed; give some of it: list(dataset.take(1000)["{COLUMN}"])')
        texts = texts[COLUMN]
    found = texts if isinstance(texts, str | bytes) or not isinstance(texts, Sequence) else list(texts)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        ids = "no token ids, " if isinstance(found, list) else ""
        raise UserError(f"{what}: is a {type(texts).__name__}; give {ids}a list of str, or a datasets.Dataset of them")
    if not any(found):
        raise UserError(f"{what}: hold no text")
    if not all(is_text(one.replace("\0", "")) for one in found):
        raise UserError(f"{what}: hold a document with an unpaired surrogate, which no tokenizer reads")
    return found
