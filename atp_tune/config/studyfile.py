"""Reads study files and the overrides of `--set`.

Errors: every mistake is a `UserError` like `FILE: KEY: RULE, got VALUE; did you mean NAME? (and 2 more mistakes)`;
FILE is `FILE with --set KEY=VALUE` if an override is the cause. `atp_tune.config.study` defines the keys.
"""

import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, core_schema

from atp_tune.config import finding
from atp_tune.config.best import dumps
from atp_tune.config.plugged import plug_in, plugin_settings
from atp_tune.config.prune import PruneConfig
from atp_tune.config.study import Study
from atp_tune.errors import PluginError, UserError, did_you_mean, is_text, printable, without_secrets
from atp_tune.pruners import PRUNERS
from atp_tune.utils.cache import write_out
from atp_tune.utils.registry import STORED, Table
from atp_tune.utils.system import is_special

# --- Turns the errors of pydantic about a study file into one line: the first mistake, its key, rule and correction.

KeyPath = tuple[str | int, ...]

PATTERNS = {
    "model.sha256": "must be 64 hexadecimal digits in lower case",
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


def invalid(
    path: Path | str, error: ValidationError, changed: Sequence[tuple[str, KeyPath]] = (), table: KeyPath = ()
) -> UserError:
    """The UserError for a study file at `path`, or one `table` of it; `changed`: each override, and the key it set."""
    errors = dict[KeyPath, list[ErrorDetails]]()
    problems = error.errors(include_url=False)  # unknown keys first: a misspelt key also makes the correct key missing
    problems.sort(key=lambda details: details["type"] != "extra_forbidden")
    for details in problems:
        errors.setdefault(_key_path((*table, *details["loc"])), []).append(details)
    # If a value in a list is wrong, errors about the list itself are left out.
    outer = {key_path[:length] for key_path in errors for length in range(len(key_path))}
    errors = {key_path: details for key_path, details in errors.items() if key_path not in outer}
    key_path, text = _worded(*next(iter(errors.items())))
    causes = [override for override, keys in changed if key_path[: len(keys)] == keys[: len(key_path)]]
    origin = " with --set ".join([str(path), *causes])
    others = len(errors) - 1
    more = f" (and {others} more mistake{'s' if others > 1 else ''})" if others else ""
    return UserError(f"{origin}: {text}{more}")


def _key_path(loc: KeyPath) -> KeyPath:
    """The location without the branches of unions, which pydantic adds below a key that is not a table."""
    key_path: KeyPath = ()
    table: type[BaseModel] | None = Study
    for part in loc:
        if isinstance(part, int) or table:
            key_path = (*key_path, part)
        if isinstance(part, str) and table:
            table = table_model(table, part)
    return key_path


def table_model(parent: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of the table under `key`; None if the key is unknown or holds a plain value."""
    if issubclass(parent, PruneConfig) and plugin_settings(key):
        return PRUNERS[key]  # type: ignore[return-value]
    annotation = parent.model_fields[key].annotation if key in parent.model_fields else None
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _worded(key_path: KeyPath, errors: list[ErrorDetails]) -> tuple[KeyPath, str]:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        is_table = key_path[:-1] == ("prune",) and isinstance(first["input"], dict)
        other = "; a plug-in's table needs its name in prune.pruners" * is_table
        return key_path, f"{dotted(key_path)}: unknown key; {_unknown(key_path)}{other}"
    if first["type"] == "value_error":  # validators of this package raise `key: text`, relative to their table
        key, _, text = str(first["ctx"]["error"]).partition(": ")
        key_path = (*key_path, *key.split("."))
        return key_path, f"{dotted(key_path)}: {text}"
    absent = first["type"] == "missing" and isinstance(key_path[-1], str)
    got = "" if absent else f", got {_shown(first['input'])}"
    if first["type"] in _OF_NUMBERS:  # a number where a list may stand too: the number is what is wrong
        errors = [details for details in errors if details["type"] != "tuple_type"]
    rules = [_rule(key_path, details) for details in errors]
    either = " or ".join([rules[0], *(rule.removeprefix("must ") for rule in rules[1:])])
    names = [name for details in errors for name in _literals(details)]
    return key_path, f"{dotted(key_path)}: {either}{got}{did_you_mean(first['input'], names)}"


def _rule(key_path: KeyPath, details: ErrorDetails) -> str:
    names = _literals(details)
    if names:
        return f"must be {'one of ' * (len(names) > 1)}{', '.join(names)}"
    if details["type"] == "string_pattern_mismatch" and dotted(key_path) in PATTERNS:
        return PATTERNS[dotted(key_path)]
    return _RULES.get(details["type"], "is not valid").format(**details.get("ctx", {}))


def _literals(details: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", details["ctx"]["expected"]) if details["type"] == "literal_error" else []


def _unknown(key_path: KeyPath) -> str:
    """Suggests the same key of another table or a similar key of this table, or lists the keys of this table."""
    *parents, key = map(str, key_path)
    keys = [key.split(".") for key in dotted_keys()]
    siblings = [own for *table, own in keys if table == parents]
    elsewhere = [".".join(path) for path in keys if path[-1] == key]
    near = [".".join([*parents, own]) for own in get_close_matches(key, siblings, n=1, cutoff=NEARLY)]
    near = near or get_close_matches(dotted(key_path), elsewhere, n=1, cutoff=0)
    near = near or [".".join([*parents, own]) for own in get_close_matches(key, siblings, n=1)]
    return f"did you mean {near[0]}?" if near else f"known here are {', '.join(siblings)}"


def dotted_keys(table: type[BaseModel] = Study, prefix: str = "") -> Iterator[str]:
    """All dotted keys that a study file may hold, including tables."""
    plugged = [name for name in PRUNERS.held() if plugin_settings(name)] if issubclass(table, PruneConfig) else []
    for key in [*table.model_fields, *plugged]:
        yield prefix + key
        inner = table_model(table, key)
        if key in plugged:
            yield from (f"{prefix}{key}.{own}" for own in plugin_settings(key))
        elif inner:
            yield from dotted_keys(inner, f"{prefix}{key}.")


def dotted(key_path: KeyPath) -> str:
    """Formats `("prune", "pruners", 0)` as `prune.pruners[0]`; quotes keys that TOML would quote."""
    text = ""
    for part in key_path:
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


PLACES = ("storage=", "device=")  # overrides that change where a study is stored or runs, not its results
TRIALS = "search.trials="
REMOTE_CODE = "model", "trust_remote_code"
ALLOWED = "--set model.trust_remote_code=true"

_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:|file:)[^?]+)(?P<query>.*)")


@dataclass(frozen=True)
class StudyFile:
    """A study, its name, its file, and its overrides except those of storage and device.

    `trusts_plugins`: the code that it names may run, in this process and in workers; `trusts_model`: the code in the
    model's folder, if it asks for that. A file or a database permits neither.
    """

    name: str
    path: Path
    study: Study
    overrides: tuple[str, ...] = ()
    trusts_plugins: bool = False
    trusts_model: bool = False

    @property
    def permissions(self) -> dict[str, bool]:
        """The permissions that a configuration of the study cannot give itself: `allowed` of `apply`."""
        model = self.study.model
        return {
            "allow_pickle": model.allow_pickle,
            "trust_remote_code": model.trust_remote_code and self.trusts_model,
            "trust_plugins": self.trusts_plugins,
        }

    @property
    def goes_on(self) -> bool:
        """Whether an override switches early termination off, so that a study that terminated early goes on."""
        return not self.study.search.early_termination and any(
            text.startswith("search.early_termination=") for text in self.overrides
        )

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the study start at."""
        return self.path.parent

    @property
    def database(self) -> Path | None:
        """The SQLite file of the trials; None for another kind of database."""
        if self.study.storage is None:
            return self._home / f"{self.name}.db"
        url = _SQLITE_FILE.fullmatch(self.study.storage)
        return self._home / url["path"] if url else None

    @property
    def storage_url(self) -> str:
        """The Optuna storage URL; a relative SQLite path is made absolute."""
        if self.study.storage is None:
            return f"sqlite:///{self.database}"
        return absolute_storage(self.study.storage, self._home)

    @property
    def artifacts(self) -> Path | None:
        """The folder of the files that a dashboard offers; None for another kind of database."""
        return self.database and self.database.with_suffix(".artifacts")

    def best_path(self, name: str) -> Path:
        """The JSON file, beside the database, of the best configuration of the study `name`."""
        return self.beside(f"{name}.best.json")

    def beside(self, name: str) -> Path:
        """The path of a file beside the database; slashes in its name are replaced."""
        folder = self.database.parent if self.database else self._home
        return folder / name.replace("/", "_")

    @property
    def _home(self) -> Path:
        """The absolute folder of the results: the folder of the study, or ./studies for a study in the package."""
        embedded = self.folder.resolve() == finding.EMBEDDED.resolve()
        return finding.HERE.absolute() if embedded else self.folder.absolute()


def absolute_storage(address: str, folder: Path) -> str:
    """The storage URL with a relative SQLite path made absolute, starting at `folder`."""
    url = _SQLITE_FILE.fullmatch(address)
    return f"{url['scheme']}{folder.absolute() / url['path']}{url['query']}" if url else address


def read(path: Path) -> Table:
    """Reads the tables of a study file."""
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
    try:
        return tomllib.loads(text)
    except RecursionError:
        reason = "values are nested too deeply"
    except ValueError as error:  # not only TOMLDecodeError: also, for example, an integer of 5000 digits
        reason = _syntax(str(error), lines=text.count("\n") + 1)
    raise UserError(f"{path}: {reason}")


def _syntax(message: str, lines: int) -> str:
    """Turns tomllib's `Message (at line 1, column 2)` into `line 1, column 2: message`."""
    what, _, where = message.removesuffix(")").rpartition(" (at ")
    if not what:
        return message[0].lower() + message[1:]
    position = f"line {lines}" if where == "end of document" else where
    return f"{position}: {what[0].lower()}{what[1:]}"


def override(data: Table, text: str, path: Path) -> KeyPath:
    """Sets one `key.path=value` in the tables `data` of the file at `path`; returns the path of the key."""
    if not is_text(text):
        raise UserError(f"{path} with --set {text}: is not UTF-8 text")
    written, equals, value = text.partition("=")
    *tables, key = keys = tuple(part.strip() for part in written.split("."))
    if not equals or not all(keys):
        raise UserError(f"{path} with --set {text}: must have the form key.path=value")
    if tables == ["allocation"] and isinstance(data.get("allocation"), str | list):
        data["allocation"] = {"names": data["allocation"]}
    for depth, name in enumerate(tables, start=1):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(f"{path} with --set {text}: {dotted(keys[:depth])}: is not a table")
    data[key] = value.strip()
    with suppress(ValueError, RecursionError):  # text that is not TOML is a string, so strings need no quotes
        table = tomllib.loads(f"v = {data[key]}")
        data[key] = table["v"] if len(table) == 1 else data[key]
    return keys


def tables(overrides: Sequence[str]) -> Table:
    """The tables that overrides make by themselves; UserError for one that is wrong."""
    data: Table = {}
    for text in overrides:
        override(data, text, Path("study.toml"))
    return data


def load(
    name: str, overrides: Sequence[str] = (), plugins: bool | None = None, folder: Path | None = None
) -> StudyFile:
    """Reads a study by name or path and applies `key.path=value` overrides; UserError for every mistake.

    `plugins`: None runs no code of plug-ins, which commands that only read results do not need. Else it says whether
    the code may run that the study names, whose places start at `folder` (default: the file's own). Without it the file
    cannot allow the model's own code: that needs an override.
    """
    path = finding.find(name)
    data = read(path)
    changed = [(text, override(data, text, path)) for text in overrides]
    try:
        study = Study.model_validate(data)
        trusts_model = bool(plugins) or REMOTE_CODE in (keys for _, keys in changed)
        if plugins is False and study.model.trust_remote_code and not trusts_model:
            raise UserError(f"{dotted(REMOTE_CODE)}: a file cannot allow the model's code; read it, then add {ALLOWED}")
        if plugins is not None:
            study = plug_in(study, path.parent if folder is None else folder, plugins)
    except ValidationError as error:
        raise invalid(path, error, changed) from None
    except PluginError:
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    own = tuple(text for text in overrides if not text.startswith(PLACES))
    return StudyFile(path.stem, path, study, own, bool(plugins), trusts_model)


def overridden(file: StudyFile, texts: Sequence[str], plugins: bool) -> StudyFile:
    """A copy of a study file, which need not exist, with `key.path=value` overrides; UserError for wrong ones.

    `plugins`: whether the code of its plug-ins may run.
    """
    data = file.study.model_dump(mode="json", exclude_unset=True)
    keys = [(text, override(data, text, file.path)) for text in texts]
    try:
        study = plug_in(Study.model_validate(data), file.folder, plugins)
    except ValidationError as error:
        raise invalid(file.path, error, keys) from None
    rest = (text for text in texts if not text.startswith(PLACES))
    return replace(file, study=study, overrides=(*file.overrides, *rest), trusts_plugins=plugins)


def settings(file: StudyFile) -> Table:
    """The values that a study file and its overrides set, as JSON; no storage, whose URL may hold a password."""
    values = file.study.model_dump(mode="json", exclude_unset=True, exclude={"storage", "device"})
    overrides = [text for text in file.overrides if json.dumps(text, ensure_ascii=False).isprintable()]
    return {"name": file.name, "path": str(file.path.absolute()), "settings": values, "overrides": overrides}


def from_settings(stored: Table) -> StudyFile:
    """Rebuilds a study file from its `settings`; ValueError, KeyError or TypeError if they are not valid."""
    name, path = stored["name"], stored["path"]
    if not isinstance(name, str) or "\0" in path:
        raise ValueError("no name, or no path")
    json.dumps(stored, ensure_ascii=False).encode()  # ValueError for an unpaired surrogate
    overrides = stored.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ValueError("no overrides")
    return StudyFile(name, Path(path), Study.model_validate(stored["settings"], context=STORED), tuple(overrides))


# --- Writes study files with comments: what differs from the defaults, and what a user will want to change.
#
# A JSON value without null and without objects is also a TOML value, so values are written as JSON; objects become
# inline tables.

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
    shown = {key for key in SHOWN if not key.startswith(study.methods.unused)}
    comment = [f"# {printable(line)}".rstrip() for line in head]
    return "\n".join([*comment, *([""] if comment else []), *_lines(study, "", shown)]) + "\n"


def _lines(table: BaseModel, prefix: str, shown: AbstractSet[str]) -> Iterator[str]:
    """The lines of a table: its keys, then the tables in it, each below its title."""
    values, fields = table.model_dump(mode="json"), type(table).model_fields
    inner = {key: value for key, value in table if isinstance(value, BaseModel)}
    for key, field in fields.items():
        is_told = prefix + key in shown or field.is_required() or getattr(table, key) != field.get_default()
        if key not in inner and getattr(table, key) is not None and is_told:
            yield from _key(key, values[key], field.description)
    for key, value in inner.items():
        lines = list(_lines(value, f"{prefix}{key}.", shown))
        if lines and lines[0]:  # it has keys of its own; its purpose, in one sentence, is the title
            title = fields[key].description or (type(value).__doc__ or "").splitlines()[0].removesuffix(".")
            yield from ("", f"# {title}", f"[{prefix}{key}]")
        yield from lines
    for name, settings in table.tables.items() if isinstance(table, PruneConfig) else ():
        yield from ("", "# Settings of a plug-in", f"[{prefix}{name}]")
        yield from (line for key, value in settings.items() for line in _key(key, value, None))


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


# --- The JSON schema of study files, by which editors complete keys and mark mistakes.
#
# It is of draft 7, which the editors' TOML plugins read, and holds what `atp_tune.config.studyfile` accepts, short
# forms too. It does not hold rules between several keys.

DRAFT = "http://json-schema.org/draft-07/schema#"


class TomlSchema(GenerateJsonSchema):
    """pydantic's schema for TOML, which has no null: tuples as in draft 7, no titles, which repeat the keys."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Table:
        """The schema without null."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> Table:
        """The default, unless it is no value."""
        fields = super().default_schema(schema)
        return {key: value for key, value in fields.items() if key != "default" or value is not None}

    def tuple_schema(self, schema: core_schema.TupleSchema) -> Table:
        """`items` for `prefixItems`."""
        return {"items" if key == "prefixItems" else key: value for key, value in super().tuple_schema(schema).items()}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No title."""
        return False


def schema_text() -> str:
    """The schema, as the text of a file."""
    return dumps(study_schema(), 2) + "\n"


def study_schema() -> Table:
    """The schema of study files."""
    return {"$schema": DRAFT, **Study.model_json_schema(schema_generator=TomlSchema)}


def choices() -> dict[str, list[str]]:
    """The dotted keys that hold more than a table, each with the values that it names: choices, else its default."""
    schema, named = study_schema(), dict[str, list[str]]()
    for key, value in _values(schema, schema):
        forms, default = _resolved(schema, value), value.get("default", "")
        names = [str(name) for form in forms for name in form.get("enum", [form["const"]] if "const" in form else [])]
        names += ["true", "false"] * any(form.get("type") == "boolean" for form in forms)
        named[key] = names or ([] if default == "" or isinstance(default, list) else [str(default)])
    return named


def _values(schema: Table, table: Table, prefix: str = "") -> Iterator[tuple[str, Table]]:
    for key, value in table["properties"].items():
        forms = _resolved(schema, value)
        if any("properties" not in form for form in forms):
            yield prefix + key, value
        for form in forms:
            if "properties" in form:
                yield from _values(schema, form, f"{prefix}{key}.")


def _resolved(schema: Table, value: Table) -> list[Table]:
    """The forms of a value, where they are defined."""
    return [
        schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form
        for form in value.get("anyOf", [value])
    ]
