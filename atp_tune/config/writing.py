"""Writes study files with comments: what differs from the defaults, and what a user will want to change.

A JSON value without null and without objects is also a TOML value, so values are written as JSON; objects become inline
tables.
"""

import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from atp_tune.config.best import dumps
from atp_tune.config.prune import PruneConfig
from atp_tune.config.study import Study
from atp_tune.errors import printable
from atp_tune.utils.cache import write_out

SCHEMA = "study.schema.json"  # beside the studies that come along
WIDTH = 120  # columns of a line
MARGIN = 44  # column of a comment beside its key, as in the studies that come along
SHOWN = {  # keys that are written with their default too, unless that is no value
    "model.dtype", "prune.pruners", "prune.pattern", "allocation.names", "search.sampler", "search.objective",
    "recover.train", "recover.loss", "recover.steps", "recover.batch",
    *(f"texts.{role}.seqlen" for role in ("calibration", "validation", "test")),
}  # fmt: skip


def write_study(path: Path, study: Study, head: Sequence[str], is_new: bool = False) -> None:
    """Writes a study file, with the lines `head` as its first comment; an existing file is replaced.

    It names the schema of study files for editors, if that lies beside it. Read back it equals `study`, else
    ValueError and nothing is written. Relative paths of model and texts start at the folder of `path`. UserError if
    the file cannot be written, or if there is one and this one `is_new`.
    """
    text = study_text(study, head)
    if (path.parent / SCHEMA).exists():
        text = f"#:schema ./{SCHEMA}\n{text}"
    if Study.model_validate(tomllib.loads(text)) != study:
        raise ValueError(f"{path}: the study as it was written differs from the study")
    write_out(path, text.encode(), is_new)


def study_text(study: Study, head: Sequence[str]) -> str:
    """The text of a study file, with the lines `head` as its first comment."""
    shown = SHOWN if not study.by_bits else {key for key in SHOWN if not key.startswith("prune.")}
    comment = [f"# {printable(line)}".rstrip() for line in head]
    return "\n".join([*comment, *([""] if comment else []), *_lines(study, "", shown)]) + "\n"


def _lines(table: BaseModel, prefix: str, shown: AbstractSet[str]) -> Iterator[str]:
    """The lines of a table: its keys, then the tables in it, each below its title."""
    values, fields = table.model_dump(mode="json"), type(table).model_fields
    inner = {key: value for key, value in table if isinstance(value, BaseModel)}
    for key, field in fields.items():
        if key not in inner and _is_written(prefix + key in shown, getattr(table, key), field):
            yield from _key(key, values[key], field.description)
    for key, value in inner.items():
        lines = list(_lines(value, f"{prefix}{key}.", shown))
        if lines and lines[0]:  # it has keys of its own
            yield from ("", f"# {_title(value, fields[key])}", f"[{prefix}{key}]")
        yield from lines
    for name, settings in table.tables.items() if isinstance(table, PruneConfig) else ():
        yield from ("", "# Settings of a plug-in", f"[{prefix}{name}]")
        yield from (line for key, value in settings.items() for line in _key(key, value, None))


def _is_written(is_shown: bool, value: Any, field: FieldInfo) -> bool:
    return value is not None and (is_shown or field.is_required() or value != field.get_default())


def _key(key: str, value: Any, comment: str | None) -> Iterator[str]:
    """One key, with its comment beside it, or above it where the line would be too long."""
    line = f"{key} = {toml_value(value)}"
    beside = f"{line:<{MARGIN - 1}} # {comment}" if comment else line
    if comment and len(beside) > WIDTH:
        yield from (f"# {part}" for part in textwrap.wrap(comment, WIDTH - 2))
        yield line
    else:
        yield beside


def toml_value(value: Any) -> str:
    """A value in TOML; a mapping becomes an inline table."""
    if not isinstance(value, dict):
        return dumps(value, None)
    return "{ " + ", ".join(f"{dumps(key, None)} = {toml_value(one)}" for key, one in value.items()) + " }"


def _title(table: BaseModel, field: FieldInfo) -> str:
    """The purpose of a table, in one sentence."""
    return field.description or (type(table).__doc__ or "").splitlines()[0].removesuffix(".")


# --- The JSON schema of study files, by which editors complete keys and mark mistakes.
#
# It is of draft 7, which the editors' TOML plugins read, and holds what `atp_tune.config.studyfile` accepts, short
# forms too. It does not hold rules between several keys.

DRAFT = "http://json-schema.org/draft-07/schema#"


class TomlSchema(GenerateJsonSchema):
    """pydantic's schema for TOML, which has no null: tuples as in draft 7, no titles, which repeat the keys."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        """The schema without null."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        """The default, unless it is no value."""
        found = super().default_schema(schema)
        return {key: value for key, value in found.items() if key != "default" or value is not None}

    def tuple_schema(self, schema: core_schema.TupleSchema) -> dict[str, Any]:
        """`items` for `prefixItems`."""
        found = super().tuple_schema(schema)
        return {"items" if key == "prefixItems" else key: value for key, value in found.items()}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No title."""
        return False


def schema_text() -> str:
    """The schema, as the text of a file."""
    return dumps(study_schema(), 2) + "\n"


def study_schema() -> dict[str, Any]:
    """The schema of study files."""
    return {"$schema": DRAFT, **Study.model_json_schema(schema_generator=TomlSchema)}


def choices() -> dict[str, list[str]]:
    """The dotted keys that hold more than a table, each with the values that it names: choices, else its default."""
    schema = study_schema()
    return {key: _named(_resolved(schema, value)) or _default(value) for key, value in _values(schema, schema)}


def _values(schema: dict[str, Any], table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in table["properties"].items():
        forms = _resolved(schema, value)
        if any("properties" not in form for form in forms):
            yield prefix + key, value
        for form in forms:
            if "properties" in form:
                yield from _values(schema, form, f"{prefix}{key}.")


def _named(forms: list[dict[str, Any]]) -> list[str]:
    names = [str(name) for form in forms for name in form.get("enum", [form["const"]] if "const" in form else [])]
    return names + ["true", "false"] * any(form.get("type") == "boolean" for form in forms)


def _default(value: dict[str, Any]) -> list[str]:
    default = value.get("default", "")
    return [] if default == "" or isinstance(default, list) else [str(default)]


def _resolved(schema: dict[str, Any], value: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms of a value, where they are defined."""
    forms = value.get("anyOf", [value])
    return [schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]
