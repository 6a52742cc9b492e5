"""Parses study files and the overrides of `--set`; what does not parse is a `UserError` of one line."""

import tomllib
from pathlib import Path
from typing import Any

from atp_tune.errors import UserError, is_text
from atp_tune.paths import is_special
from atp_tune.spec.former import present_key, present_keys
from atp_tune.spec.mistakes import KeyPath, dotted


def read(path: Path) -> dict[str, Any]:
    """The tables of a study file, with the present names of keys."""
    if is_special(path):
        raise UserError(f"{path}: cannot be read: Not a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line}: is not UTF-8 text") from None
    return _parse(path, text)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return present_keys(tomllib.loads(text))
    except RecursionError:
        reason = "values are nested too deeply"
    except ValueError as error:  # more than TOMLDecodeError: an integer of 5000 digits, for one
        reason = _syntax(str(error), lines=text.count("\n") + 1)
    raise UserError(f"{path}: {reason}")


def _syntax(message: str, lines: int) -> str:
    """Tomllib's `Message (at line 1, column 2)` as `line 1, column 2: message`."""
    what, _, where = message.removesuffix(")").rpartition(" (at ")
    if not what:
        return message[0].lower() + message[1:]
    place = f"line {lines}" if where == "end of document" else where
    return f"{place}: {what[0].lower()}{what[1:]}"


def override(data: dict[str, Any], text: str, path: Path) -> KeyPath:
    """Writes one `key.path=value` into the tables of the file at `path`, and gives back the key's path."""
    if not is_text(text):
        raise UserError(f"{path} with --set {text}: is not UTF-8 text")
    written, equals, value = text.partition("=")
    written = ".".join(part.strip() for part in written.split("."))
    *tables, key = keys = tuple(present_key(written).split("."))
    if not equals or not all(keys):
        raise UserError(f"{path} with --set {text}: must have the form key.path=value")
    if tables == ["allocation"] and isinstance(data.get("allocation"), str | list):  # short for its table of names
        data["allocation"] = {"names": data["allocation"]}
    for depth, name in enumerate(tables, start=1):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(f"{path} with --set {text}: {dotted(keys[:depth])}: is not a table")
    found = _toml_value(value.strip())
    data[key] = present_keys(found, written) if isinstance(found, dict) else found
    return keys


def _toml_value(text: str) -> object:
    """A TOML value, or the text itself where it is none (so that strings need no quotes)."""
    try:
        table = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return table["v"] if len(table) == 1 else text
