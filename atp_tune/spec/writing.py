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

from atp_tune.cache import write_out
from atp_tune.errors import printable
from atp_tune.spec.config import dumps
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.study import Study

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
