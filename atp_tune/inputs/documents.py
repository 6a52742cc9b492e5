"""Texts as sequences of documents: c4, wikitext2, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE.

A part (a, b) of a text holds the documents whose first character's offset, as a share of all characters, lies
in [a, b): parts that don't overlap share no document.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Protocol, cast

import numpy as np

from atp_tune.errors import UserError
from atp_tune.inputs.hub import HubDataset
from atp_tune.spec.study import Text

KNOWN = "c4, wikitext2, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE or package:MODULE/FILE.txt"
SOURCES = {
    "c4": "atp_tune.inputs.hub:C4",
    "wikitext2": "atp_tune.inputs.hub:WIKITEXT2",
    "hub": "atp_tune.inputs.hub:HUB",
    "file": "atp_tune.inputs.local:FILE",
    "package": "atp_tune.inputs.local:PACKAGE",
}


class TextSource(Protocol):
    """A kind of source, named by what stands before the colon in a text's `source`."""

    @property
    def form(self) -> str:
        """The regular expression of what stands after the colon; "" where there is no colon."""

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """All documents, in their order; relative paths start at `base`. UserError in one line."""

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 that names the documents in a cache key."""


def documents(text: Text, base: Path) -> Sequence[str]:
    """The documents of a study's text, in their order; relative paths start at `base`.

    A hub dataset stays on disk and is read by index. Errors: UserError in one line that starts with the key.
    """
    found = find_source(text).read(text, base)
    if text.part != (0, 1):
        found = _cut(found, text)
    if not any(found):
        raise UserError(f'source: "{text.source}" holds no text')
    return found


def source_content(text: Text, base: Path) -> str:
    """SHA-256 that names the content in a cache key: of a local text itself, of a hub dataset's address."""
    return find_source(text).identify(text, base)


def hub_arguments(text: Text) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for c4, wikitext2 and hub:ORG/NAME; UserError for other sources."""
    source = find_source(text)
    if not isinstance(source, HubDataset):
        raise UserError(f'source: "{text.source}" is no dataset of the hub')
    return source.revised_arguments(text)


def find_source(text: Text) -> TextSource:
    """The row of `SOURCES` that reads a text; UserError where there is none, or its source is not of the row's form."""
    name, colon, rest = text.source.partition(":")
    source = cast(TextSource, resolve_name(SOURCES[name])) if name in SOURCES else None
    flags = re.ASCII | re.DOTALL
    if source is None or bool(colon) != bool(source.form) or not re.fullmatch(source.form, rest, flags):
        raise UserError(f'source: "{text.source}" is none of {KNOWN}')
    return source


def _cut(found: Sequence[str], text: Text) -> Sequence[str]:
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    total = int(lengths.sum())
    shares = (np.cumsum(lengths) - lengths) / max(total, 1)
    first, last = np.searchsorted(shares, text.part)
    if first == last and total:
        start, end = text.part
        raise UserError(f"part: none of the {len(found)} documents of {text.source} starts in [{start}, {end})")
    return found[int(first) : int(last)]
