"""Texts as sequences of documents: c4, wikitext2, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE.

A part (a, b) of a text holds the documents whose first character's offset, as a share of all characters, lies
in [a, b): parts that don't overlap share no document.
"""

import importlib
import importlib.resources
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from atp_tune.cache import sha256_of, sha256_of_json
from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.errors import UserError, is_text
from atp_tune.paths import written
from atp_tune.spec.study import Text

_KNOWN = "c4, wikitext2, hub:ORG/NAME, file:PATH, package:MODULE:ATTRIBUTE or package:MODULE/FILE.txt"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_C4 = {
    "train": "en/c4-train.00000-of-01024.json.gz",  # the one file that Wanda and SparseGPT read
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}


class Column(Sequence[str]):
    """The texts in one column of a hub dataset, read when asked for; a missing text is empty."""

    def __init__(self, rows: Any, name: str) -> None:
        self._rows = rows.select_columns([name])
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Column": ...
    def __getitem__(self, index: int | slice) -> "str | Column":
        if isinstance(index, slice):
            return Column(self._rows.select(range(*index.indices(len(self)))), self._name)
        return self._rows[index][self._name] or ""

    def __iter__(self) -> Iterator[str]:
        for batch in self._rows.iter(batch_size=1000):
            yield from (text or "" for text in batch[self._name])


def documents(text: Text, base: Path) -> Sequence[str]:
    """The documents of a study's text, in their order; relative paths start at `base`.

    A hub dataset stays on disk and is read by index. Errors: UserError in one line that starts with the key.
    """
    read, _ = _source(text)
    found = read(text, base)
    if text.part != (0, 1):
        found = _cut(found, text)
    if not any(found):
        raise UserError(f'source: "{text.source}" holds no text')
    return found


def source_content(text: Text, base: Path) -> str:
    """SHA-256 that names the content in a cache key: of a local text itself, of a hub dataset's address."""
    _, identify = _source(text)
    return identify(text, base)


def hub_arguments(text: Text) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for c4, wikitext2 and hub:ORG/NAME."""
    return _HUB[text.source.partition(":")[0]](text) | {"revision": text.revision}


def _source(text: Text) -> tuple[Callable[[Text, Path], Sequence[str]], Callable[[Text, Path], str]]:
    scheme, _, rest = text.source.partition(":")
    if text.source in ("c4", "wikitext2") or (scheme == "hub" and _HUB_ID.fullmatch(rest)):
        return _read_hub, _identify_hub
    if scheme not in _LOCAL or not rest:
        raise UserError(f'source: "{text.source}" is none of {_KNOWN}')
    for key in ("config", "split", "revision"):
        if getattr(text, key) is not None:
            raise UserError(f"{key}: only a hub dataset has one, {text.source} has not; leave it out")
    return _LOCAL[scheme]


def _cut(found: Sequence[str], text: Text) -> Sequence[str]:
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    total = int(lengths.sum())
    shares = (np.cumsum(lengths) - lengths) / max(total, 1)
    first, last = np.searchsorted(shares, text.part)
    if first == last and total:
        start, end = text.part
        raise UserError(f"part: none of the {len(found)} documents of {text.source} starts in [{start}, {end})")
    return found[int(first) : int(last)]


def _c4(text: Text) -> dict[str, Any]:
    if text.config is not None:
        raise UserError("config: c4 is always en; for another one use hub:allenai/c4")
    split = text.split or "train"
    if split not in _C4:
        raise UserError(f'split: c4 has train and validation, not "{split}"')
    files = {
        "data_files": {split: _C4[split]},
        "verification_mode": "no_checks",
    }  # sizes are those of all files
    return {"path": "allenai/c4", "split": split, **files}


def _wikitext2(text: Text) -> dict[str, Any]:
    if text.config is not None:
        raise UserError("config: wikitext2 is always wikitext-2-raw-v1; for another one use hub:Salesforce/wikitext")
    if text.split not in ("train", "validation", "test"):
        raise UserError("split: wikitext2 needs train, validation or test")
    return {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": text.split}


def _hub(text: Text) -> dict[str, Any]:
    path = text.source.removeprefix("hub:")
    if text.split is None:
        raise UserError(f"split: {text.source} needs one, such as train, validation or test")
    if Path(path).exists():
        raise UserError(f"source: {path} is a folder here and would be read instead of the hub; change folder")
    return {"path": path, "name": text.config, "split": text.split}


_HUB = {"c4": _c4, "wikitext2": _wikitext2, "hub": _hub}


def _identify_hub(text: Text, base: Path) -> str:
    return sha256_of_json(hub_arguments(text))


def _read_hub(text: Text, base: Path) -> Sequence[str]:
    import datasets

    arguments = hub_arguments(text)
    try:
        with quiet("datasets", "huggingface_hub"):
            rows = datasets.load_dataset(**arguments)
    except Exception as error:  # whatever the network stack and the readers under it raise
        raise _hub_error(arguments["path"], error) from error
    _check_column(text, rows.column_names)
    if getattr(rows.features[text.column], "dtype", "") not in ("string", "large_string"):
        raise UserError(f'column: "{text.column}" of {text.source} holds no text')
    return Column(rows, text.column)


def _hub_error(path: str, error: Exception) -> UserError:
    import datasets

    url = f"https://huggingface.co/datasets/{path}"
    if isinstance(error, ConnectionError):
        return UserError(f"source: {path} is not in the cache, and the hub is out of reach; connect once")
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        if "gated" in str(error):
            return UserError(f"source: {path} is gated; ask for access at {url}, then run `hf auth login`")
        return UserError(f"source: the hub shows you no dataset {path} (or not this revision); see {url}")
    return UserError(f"source: {path} cannot be loaded: {one_line(error)}")


def _check_column(text: Text, names: Sequence[str], where: str = "") -> None:
    if text.column not in names:
        raise UserError(f'column: {where or text.source} has no "{text.column}"; it has {", ".join(names)}')


def _path(text: Text, base: Path) -> Path:
    path = written(text.source.removeprefix("file:"), base, "source")
    if path.suffix not in _READERS:
        raise UserError(f"source: {path} is none of {', '.join('*' + suffix for suffix in _READERS)}")
    if not path.is_file():
        raise UserError(f"source: there is no file {path}")
    return path


def _read_file(text: Text, base: Path) -> Sequence[str]:
    path = _path(text, base)
    try:
        return _READERS[path.suffix](path, text)
    except UnicodeDecodeError as error:
        raise UserError(f"source: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise _unread(path, error) from None


def _identify_file(text: Text, base: Path) -> str:
    path = _path(text, base)
    try:
        return sha256_of(path)
    except OSError as error:
        raise _unread(path, error) from None


def _unread(path: Path, error: OSError) -> UserError:
    return UserError(f"source: {path} cannot be read: {error.strerror or one_line(error)}; give another file")


def _read_txt(path: Path, text: Text) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_jsonl(path: Path, text: Text) -> list[str]:
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
    _check_column(text, list(row), where)
    value = row[text.column]
    if not isinstance(value, str) or not is_text(value.replace("\0", "")):
        raise UserError(f'column: "{text.column}" in {where} is no text')
    return value


def _read_parquet(path: Path, text: Text) -> list[str]:
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        _check_column(text, schema.names, str(path))
        if str(schema.field(text.column).type) not in ("string", "large_string"):
            raise UserError(f'column: "{text.column}" of {path} holds no text')
        column = pyarrow.parquet.read_table(path, columns=[text.column])[text.column]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"source: {path} is no Parquet file: {one_line(error)}") from None
    return [value or "" for value in column.to_pylist()]


_READERS: dict[str, Callable[[Path, Text], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _read_package(text: Text, base: Path) -> Sequence[str]:
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


def _strings(value: object, text: Text) -> list[str]:
    """Documents of a Python value: a str, a list or tuple of them, a dict's values in the order of keys."""
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
        raise UserError(f"source: {text.source} is neither a str nor a list, tuple or dict of str")
    return list(found)


def _identify_package(text: Text, base: Path) -> str:
    return sha256_of_json(list(_read_package(text, base)))


_LOCAL: dict[str, tuple[Callable[[Text, Path], Sequence[str]], Callable[[Text, Path], str]]] = {
    "file": (_read_file, _identify_file),
    "package": (_read_package, _identify_package),
}
