"""Documents on this machine: file:PATH, package:MODULE:ATTRIBUTE, package:MODULE/FILE.txt."""

import importlib
import importlib.resources
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atp_tune.cache import sha256_of, sha256_of_json
from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError, is_text
from atp_tune.inputs.hub import check_column
from atp_tune.paths import written
from atp_tune.spec.data import MEMORY, Text


class LocalFile:
    """The source file:PATH; the suffix of the file selects the reader."""

    form = ".+"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents of the file."""
        path = self._path(text, base)
        try:
            return READERS[path.suffix](path, text)
        except UnicodeDecodeError as error:
            raise UserError(f"source: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise _unread(path, error) from None

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the file."""
        path = self._path(text, base)
        try:
            return sha256_of(path)
        except OSError as error:
            raise _unread(path, error) from None

    def _path(self, text: Text, base: Path) -> Path:
        check_no_hub_keys(text)
        path = written(text.source.removeprefix("file:"), base, "source")
        if path.suffix not in READERS:
            raise UserError(f"source: {path} is none of {', '.join('*' + suffix for suffix in READERS)}")
        if not path.is_file():
            raise UserError(f"source: there is no file {path}")
        return path


class PackageText:
    """The sources package:MODULE:ATTRIBUTE and package:MODULE/FILE.txt, in an installed package."""

    form = ".+"

    def read(self, text: Text, base: Path) -> Sequence[str]:
        """The documents of the attribute or the file."""
        check_no_hub_keys(text)
        name = text.source.removeprefix("package:")
        module, colon, attribute = name.partition(":")
        try:
            if colon:
                return _strings(getattr(importlib.import_module(module), attribute), text)
            module, _, inner = name.partition("/")
            return [importlib.resources.files(module).joinpath(inner).read_text(encoding="utf-8")]
        except ModuleNotFoundError as error:
            raise UserError(f"source: {text.source} needs the module {error.name}; is it installed?") from None
        except AttributeError:
            raise UserError(f"source: module {module} has no {attribute}") from None
        except (OSError, ValueError, TypeError):
            raise UserError(f"source: {text.source} is no text; give package:MODULE:ATTRIBUTE or …/FILE.txt") from None

    def identify(self, text: Text, base: Path) -> str:
        """SHA-256 of the documents."""
        return sha256_of_json(list(self.read(text, base)))


def check_no_hub_keys(text: Text) -> None:
    """UserError if a local text has a key that only hub datasets have."""
    for key in ("config", "split", "revision"):
        if getattr(text, key) is not None:
            raise UserError(f"{key}: only a hub dataset has one, {text.source} has not; leave it out")


def _unread(path: Path, error: OSError) -> UserError:
    return UserError(f"source: {path} cannot be read: {error.strerror or one_line(error)}; give another file")


def read_txt(path: Path, text: Text) -> list[str]:
    """The whole file as one document."""
    return [path.read_text(encoding="utf-8")]


def read_jsonl(path: Path, text: Text) -> list[str]:
    """One document per line, from a column of JSON objects."""
    found = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                found.append(_jsonl_text(line, text, f"line {number} of {path}"))
    return found


def _jsonl_text(line: str, text: Text, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"source: {where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"source: {where} is no JSON object")
    check_column(text, list(row), where)
    value = row[text.column]
    if not isinstance(value, str) or not is_text(value.replace("\0", "")):
        raise UserError(f'column: "{text.column}" in {where} is no text')
    return value


def read_parquet(path: Path, text: Text) -> list[str]:
    """One document per row, from a column."""
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        check_column(text, schema.names, str(path))
        if str(schema.field(text.column).type) not in ("string", "large_string"):
            raise UserError(f'column: "{text.column}" of {path} holds no text')
        column = pyarrow.parquet.read_table(path, columns=[text.column])[text.column]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source: {path} is no Parquet file: {one_line(error)}") from None
    return [value or "" for value in column.to_pylist()]


def _strings(value: object, text: Text) -> list[str]:
    """Documents of a Python value: a str, a list or tuple of str, or a dict of str, sorted by key."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise UserError(f"source: {text.source} is neither a str nor a list, tuple or dict of str")
    return list(found)


READERS: dict[str, Callable[[Path, Text], list[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
FILE, PACKAGE = LocalFile(), PackageText()


# --- Texts in the caller's memory, `memory:SHA256`: lists of documents, named by their content.

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
