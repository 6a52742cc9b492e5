"""Texts as sequences of documents: c4, wikitext2, mixed, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE.

A part (a, b) of a text holds the documents that start in [a, b), as a share of all characters, so that disjoint parts
share no document. With `shuffle` documents come in the order of their SHA-256, so that the first windows of a part are
of all kinds too. Of a text with one document, such as a .txt file, it holds the paragraphs that start there: what lies
between blank lines, or the lines if no line is blank.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from atp_tune.config.data import KINDS, Text, short_source
from atp_tune.config.plugged import parts_of
from atp_tune.errors import PluginError, UserError, is_text
from atp_tune.inputs.sources import HubDataset
from atp_tune.plugins import digest, guarded, short_name
from atp_tune.utils.cache import sha256_of_json
from atp_tune.utils.registry import Origin, Registry

KNOWN = (
    f"c4, wikitext2, mixed[:{'|'.join(KINDS)}], hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE, "
    "package:MODULE/FILE.txt or a plug-in"
)


class TextSource(Protocol):
    """A kind of source; its name is the part of `source` before the colon, or the place of a plug-in."""

    @property
    def form(self) -> str:
        """A regular expression for the part after the colon; "" for sources without a colon."""

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """All documents in order; relative paths start at `base`. UserError for bad input."""

    def identify(self, text: Text, base: Path) -> str:
        """A SHA-256 for the documents in cache keys."""


SOURCES = Registry[TextSource](
    "source of texts",
    {
        "c4": "atp_tune.inputs.sources:C4",
        "wikitext2": "atp_tune.inputs.sources:WIKITEXT2",
        "mixed": "atp_tune.inputs.mixed:MIXED_TEXTS",
        "hub": "atp_tune.inputs.sources:HUB",
        "file": "atp_tune.inputs.sources:FILE",
        "package": "atp_tune.inputs.sources:PACKAGE",
        "memory": "atp_tune.inputs.sources:LENT",
    },
    "atp_tune.text_sources",
    "atp_tune.inputs.documents:finished",
)

LONG = 200  # characters of a paragraph that is not repeated by chance


def documents(text: Text, base: Path) -> Sequence[str]:
    """The documents of a study's text in order; relative paths start at `base`.

    A hub dataset stays on disk and is read by index. Errors: UserError that starts with the key.
    """
    found = find_source(text).read(text, base)
    if text.part != (0, 1):
        found = _cut(_paragraphs(found[0]) if len(found) == 1 else found, text)
    if not any(found):
        raise UserError(f'source: "{text.source}" holds no text')
    return found


def source_content(text: Text, base: Path) -> str:
    """A SHA-256 for cache keys: of the content of a local text, or of the address of a hub dataset."""
    return find_source(text).identify(text, base)


def hub_arguments(text: Text) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for c4, wikitext2 and hub:ORG/NAME; UserError for other sources."""
    source = find_source(text)
    if not isinstance(source, HubDataset):
        raise UserError(f'source: "{text.source}" is no dataset of the hub')
    return source.revised_arguments(text)


def find_source(text: Text) -> TextSource:
    """The source in `SOURCES` that reads a text; UserError if there is none or the form is wrong."""
    name, rest = parts_of(text.source)
    source: TextSource | None = SOURCES.get(short_name(name))
    flags = re.ASCII | re.DOTALL
    if source is None or not (SOURCES.origin(short_name(name)) or _has_form(source, text.source, rest, flags)):
        raise UserError(f'source: "{text.source}" is none of {KNOWN}')
    return source


def _has_form(source: TextSource, written: str, rest: str, flags: int) -> bool:
    return (":" in written) == bool(rest) and re.fullmatch(source.form, rest, flags) is not None


def _paragraphs(document: str) -> list[str]:
    return document.split(_between(document))


def _between(document: str) -> str:
    """The separator of a document's paragraphs."""
    return "\n\n" if "\n\n" in document else "\n"


def _cut(found: Sequence[str], text: Text) -> Sequence[str]:
    if text.shuffle:
        found = sorted(found, key=lambda document: digest(document.encode(errors="replace")))
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    total = int(lengths.sum())
    shares = (np.cumsum(lengths) - lengths) / max(total, 1)
    first, last = np.searchsorted(shares, text.part)
    if first == last and total:
        start, end = text.part
        raise UserError(
            f"part: none of the {len(found)} documents of {short_source(text.source)} starts in [{start}, {end})"
        )
    part = found[int(first) : int(last)]
    return _without_repeats(part, found[: int(first)]) if text.shuffle else part


def _without_repeats(part: Sequence[str], before: Sequence[str]) -> Sequence[str]:
    """The documents of a part without the long paragraphs of those before it: Python's manual has 14 % twice.

    Neighbours may share text, but shuffled parts would share it with each other.
    """
    known = {paragraph for document in before for paragraph in _paragraphs(document) if len(paragraph) >= LONG}
    return [_between(document).join(p for p in _paragraphs(document) if p not in known) for document in part]


# --- A source of texts that is a plug-in: a function from what follows its name, and the study's folder, to documents.


class PluginSource:
    """The `TextSource` around a plug-in; PluginError, which names the plug-in and its file, for a wrong result."""

    form = ".*"

    def __init__(self, function: Callable[[str, Path], Sequence[str]], origin: Origin) -> None:
        self._function = function
        self._origin = origin
        self.__doc__ = getattr(function, "__doc__", None)

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents."""
        with guarded(self._origin, "it could not be read"):
            found = self._function(parts_of(text.source)[1], base)
        if not isinstance(found, list | tuple) or not all(isinstance(each, str) and is_text(each) for each in found):
            raise PluginError(f"{self._origin}: returned something else than a list of str of valid text")
        return found

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents."""
        return sha256_of_json(list(self.read(text, base)))


def finished(found: Any, origin: Origin) -> PluginSource:
    """The source of a plug-in; UserError if it is none."""
    if not callable(found) or isinstance(found, type):
        raise UserError(f"{origin}: is no source of texts: must be a function of a str and a folder")
    return PluginSource(found, origin)
