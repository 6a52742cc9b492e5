"""Turns the errors of pydantic about a study file into one line: the first mistake, its key, rule and correction."""

import json
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeAlias, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from atp_tune.errors import UserError, did_you_mean, without_secrets
from atp_tune.pruners import PRUNERS
from atp_tune.spec.plugged import settings_of
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import Study

KeyPath: TypeAlias = tuple[str | int, ...]

_HASH = "must be 64 hexadecimal digits in lower case"
PATTERNS = {
    "model.sha256": _HASH,
    "device": "must be auto, cpu, mps, cuda or cuda:N",
}
_NUMBER, _WHOLE, _TEXT = "must be a number", "must be a whole number", "must be a string in quotes"
NEARLY = 0.85  # likeness of a misspelt key of the same table, before the same key of another is thought of
_OF_NUMBERS = ("greater_than", "less_than", "finite_number", "float_type", "float_parsing")
_RULES = {  # error type of pydantic → message, with the fields of the error's context
    "missing": "is needed",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be finite",
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_from_float": _WHOLE,
    "int_parsing_size": "is too large",
    "string_type": _TEXT,
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must match {pattern}",
    "tuple_type": "must be a list",
    "too_short": "must hold at least {min_length} value",
    "too_long": "must hold at most {max_length} values",
    "model_type": "must be a table",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
}


def invalid(path: Path, error: ValidationError, changed: Sequence[tuple[str, KeyPath]]) -> UserError:
    """The UserError for a study file at `path`; `changed` holds each override and the key that it set."""
    found = _by_place(error)
    place, text = _worded(*next(iter(found.items())))
    causes = [override for override, keys in changed if _within(place, keys) or _within(keys, place)]
    origin = " with --set ".join([str(path), *causes])
    others = len(found) - 1
    more = f" (and {others} more mistake{'s' if others > 1 else ''})" if others else ""
    return UserError(f"{origin}: {text}{more}")


def _by_place(error: ValidationError) -> dict[KeyPath, list[ErrorDetails]]:
    """Errors by key, unknown keys first: a misspelt key also makes the correct key missing."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    problems = error.errors(include_url=False)
    problems.sort(key=lambda details: details["type"] != "extra_forbidden")
    for details in problems:
        found.setdefault(_place(details["loc"]), []).append(details)
    # If a value in a list is wrong, errors about the list itself are left out.
    outer = {place[:length] for place in found for length in range(len(place))}
    return {place: details for place, details in found.items() if place not in outer}


def _place(loc: KeyPath) -> KeyPath:
    """The location without the branches of unions, which pydantic adds below a key that is not a table."""
    place: KeyPath = ()
    table: type[BaseModel] | None = Study
    for part in loc:
        if isinstance(part, int) or table:
            place = (*place, part)
        if isinstance(part, str) and table:
            table = table_of(table, part)
    return place


def table_of(parent: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of the table under `key`; None if the key is unknown or holds a plain value."""
    if issubclass(parent, PruneConfig) and settings_of(key):
        plugged: type[BaseModel] = PRUNERS[key]  # type: ignore[assignment]
        return plugged
    annotation = parent.model_fields[key].annotation if key in parent.model_fields else None
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _worded(place: KeyPath, found: list[ErrorDetails]) -> tuple[KeyPath, str]:
    first = found[0]
    if first["type"] == "extra_forbidden":
        is_table = place[:-1] == ("prune",) and isinstance(first["input"], dict)
        other = "; a plug-in's table needs its name in prune.pruners" * is_table
        return place, f"{dotted(place)}: unknown key; {_unknown(place)}{other}"
    if first["type"] == "value_error":  # validators of this package raise `key: text`, relative to their table
        key, _, text = str(first["ctx"]["error"]).partition(": ")
        place = (*place, *key.split("."))
        return place, f"{dotted(place)}: {text}"
    absent = first["type"] == "missing" and isinstance(place[-1], str)
    got = "" if absent else f", got {_shown(first['input'])}"
    if first["type"] in _OF_NUMBERS:  # a number where a list may stand too: the number is what is wrong
        found = [details for details in found if details["type"] != "tuple_type"]
    rules = [_rule(place, details) for details in found]
    either = " or ".join([rules[0], *(rule.removeprefix("must ") for rule in rules[1:])])
    names = [name for details in found for name in _literals(details)]
    return place, f"{dotted(place)}: {either}{got}{did_you_mean(first['input'], names)}"


def _rule(place: KeyPath, details: ErrorDetails) -> str:
    names = _literals(details)
    if names:
        return f"must be {'one of ' * (len(names) > 1)}{', '.join(names)}"
    if details["type"] == "string_pattern_mismatch" and dotted(place) in PATTERNS:
        return PATTERNS[dotted(place)]
    rule = _RULES.get(details["type"], "is not valid")
    return rule.format(**details.get("ctx", {}))


def _literals(details: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", details["ctx"]["expected"]) if details["type"] == "literal_error" else []


def _unknown(place: KeyPath) -> str:
    """Suggests the same key of another table or a similar key of this table, or lists the keys of this table."""
    *parents, key = map(str, place)
    keys = [key.split(".") for key in keys_of()]
    siblings = [own for *table, own in keys if table == parents]
    elsewhere = [".".join(path) for path in keys if path[-1] == key]
    near = [".".join([*parents, own]) for own in get_close_matches(key, siblings, n=1, cutoff=NEARLY)]
    near = near or get_close_matches(dotted(place), elsewhere, n=1, cutoff=0)
    near = near or [".".join([*parents, own]) for own in get_close_matches(key, siblings, n=1)]
    return f"did you mean {near[0]}?" if near else f"known here are {', '.join(siblings)}"


def keys_of(table: type[BaseModel] = Study, prefix: str = "") -> Iterator[str]:
    """All dotted keys that a study file may hold, including tables."""
    plugged = [name for name in PRUNERS.held() if settings_of(name)] if issubclass(table, PruneConfig) else []
    for key in [*table.model_fields, *plugged]:
        yield prefix + key
        inner = table_of(table, key)
        if key in plugged:
            yield from (f"{prefix}{key}.{own}" for own in settings_of(key))
        elif inner:
            yield from keys_of(inner, f"{prefix}{key}.")


def _within(place: KeyPath, table: KeyPath) -> bool:
    return place[: len(table)] == table


def dotted(place: KeyPath) -> str:
    """Formats `("prune", "pruners", 0)` as `prune.pruners[0]`; quotes keys that TOML would quote."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            text += "." * bool(text) + (part if bare else json.dumps(part, ensure_ascii=False))
    return text


def _shown(value: object) -> str:
    """Formats a value as in TOML, shortened to 60 characters."""
    if isinstance(value, dict):
        return "a table"
    try:
        text = without_secrets(json.dumps(value, ensure_ascii=False, default=str))
    except (ValueError, RecursionError):
        return "a value too large to show"
    return text if len(text) <= 60 else f"{text[:59]}…"
