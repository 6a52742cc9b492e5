"""Documents on this machine: file:PATH, package:MODULE:ATTRIBUTE, package:MODULE/FILE.txt."""

import importlib
import importlib.resources
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from atp_tune.cache import sha256_of, sha256_of_json
from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError, is_text
from atp_tune.inputs.hub import check_column
from atp_tune.paths import written
from atp_tune.spec.texts import Text


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
