"""Study files: finds them by name, reads them, and says in one line what is wrong with them.

Errors: every mistake is a `UserError` like `FILE: KEY: RULE, got VALUE; did you mean NAME? (and 2 more mistakes)`;
FILE is `FILE with --set KEY=VALUE` where an override is the cause. `atp_tune.spec.study` says what the keys mean.
"""

import json
import re
import sqlite3
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from atp_tune.errors import UserError, is_text, without_secrets
from atp_tune.paths import is_special
from atp_tune.spec.study import Prune, Screen, Study, Text

Fact: TypeAlias = str | int | float | bool | list[str] | list[float]
KeyPath: TypeAlias = tuple[str | int, ...]

HERE = Path("studies")
PACKAGE = Path(__file__).parents[1]
EMBEDDED = PACKAGE / "studies"
# They say how long, where and on what a study runs, not what it computes.
NOT_FACTS = (
    "description", "storage", "device", "search.trials", "search.settle", "search.screen.trials", "model.allow_pickle",
    "model.residency", "texts.calibration.draws",
)  # fmt: skip
# What studies hold of values that were renamed: "block" was "sequential" before there was another order of measuring.
FORMER = {
    "prune.statistics=block": "sequential",
    "prune.statistics=sequential": "sequential within blocks",
}
_NOW = {former: key.partition("=")[2] for key, former in FORMER.items()}
# Keys younger than the first studies: they are facts only where they are not at their defaults, so that those resume.
LATER = (
    "prune.pattern", "prune.wanda.", "prune.dsnot.", "prune.alps.", "model.trust_remote_code", "search.screen.",
    "search.objective", "texts.calibration.every", "texts.search.every", "texts.report.every",
)  # fmt: skip

BOS = "texts.bos"  # as it came out, where it was left to a measurement; studies without it are older, and have none
PLACES = ("storage=", "device=")  # overrides that say where, not what
TRIALS = "search.trials="

_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:|file:)[^?]+)(?P<query>.*)")
_PATTERNS = {
    "model.sha256": "must be 64 hexadecimal digits in lower case",
    "device": "must be auto, cpu, mps, cuda or cuda:N",
}
_NUMBER, _WHOLE, _TEXT = "must be a number", "must be a whole number", "must be a string in quotes"
_RULES = {  # pydantic's type of error → the rule, with the fields of its context
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


@dataclass(frozen=True)
class StudyFile:
    """A study, its name, the file that it was read from, and what overrides it (but for where it is stored and run)."""

    name: str
    path: Path
    study: Study
    overrides: tuple[str, ...] = ()

    @property
    def sets_trials(self) -> bool:
        """Whether the total was asked for by an override, as `--trials` does."""
        return any(override.startswith(TRIALS) for override in self.overrides)

    @property
    def goes_on(self) -> bool:
        """Whether an override asks for the trials that a study which has settled left out."""
        return not self.study.search.settle and any(one.startswith("search.settle=") for one in self.overrides)

    @property
    def folder(self) -> Path:
        """Folder against which the study's relative paths are resolved."""
        return self.path.parent

    @property
    def database(self) -> Path | None:
        """The SQLite file of the trials, or None where another kind of database holds them."""
        if self.study.storage is None:
            return self._home / f"{self.name}.db"
        url = _SQLITE_FILE.fullmatch(self.study.storage)
        return self._home / url["path"] if url else None

    @property
    def storage_url(self) -> str:
        """Optuna storage URL; relative SQLite paths are made absolute."""
        if self.study.storage is None:
            return f"sqlite:///{self.database}"
        return absolute_storage(self.study.storage, self._home)

    def best_of(self, name: str) -> Path:
        """The JSON file of the best configuration of the study of that name, beside the database."""
        return self.beside(f"{name}.best.json")

    def beside(self, name: str) -> Path:
        """The place of a file beside the database, whatever the name holds."""
        folder = self.database.parent if self.database else self._home
        return folder / name.replace("/", "_")

    @property
    def _home(self) -> Path:
        """Absolute folder of the results: the study's own, or ./studies for one inside the package."""
        embedded = self.folder.resolve() == EMBEDDED.resolve()
        return HERE.absolute() if embedded else self.folder.absolute()


def absolute_storage(address: str, folder: Path) -> str:
    """A storage URL in which a relative SQLite path starts at `folder`."""
    url = _SQLITE_FILE.fullmatch(address)
    return f"{url['scheme']}{folder.absolute() / url['path']}{url['query']}" if url else address


def load(name: str, overrides: Sequence[str] = ()) -> StudyFile:
    """Reads a study by name or path, with `key.path=value` overrides; every mistake is a `UserError`."""
    path = find(name)
    data = _read(path)
    changed = [(override, _override(data, override, path)) for override in overrides]
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise _invalid(path, _mistakes(error), changed) from None
    own = tuple(override for override in overrides if not override.startswith(PLACES))
    return StudyFile(path.stem, path, study, own)


def overridden(file: StudyFile, changes: Mapping[str, str | int]) -> StudyFile:
    """The study file with other values at some dotted keys, as overrides would set them."""
    data = file.study.model_dump(mode="json", exclude_unset=True)
    overrides = [f"{key}={value}" for key, value in changes.items()]
    for override in overrides:
        _override(data, override, file.path)
    return replace(file, study=Study.model_validate(data), overrides=(*file.overrides, *overrides))


def find(name: str) -> Path:
    """The file of a study: a path as it is, a bare name from ./studies, the repository or the package."""
    is_path = name.endswith(".toml") or "/" in name or "\\" in name
    places = [Path(name)] if is_path else [folder / f"{name}.toml" for folder in _folders()]
    for path in places:
        if _exists(path):
            return path
    names = [path.stem for path in known()]
    if is_path:
        raise UserError(f"{name}: no such file{_did_you_mean(Path(name).stem, names)}")
    for file in [file for folder in _folders() for file in sorted(folder.glob("*.db"))]:
        if holds(file, name) and file.stem in names:
            raise UserError(f"{name}: is no study file, but trials: --study {file.stem} --study-name {name}")
    raise UserError(f"{name}: no such study; known are {', '.join(names) or 'none'}{_did_you_mean(name, names)}")


def holds(file: Path, study: str) -> bool:
    """Whether a SQLite file has trials of that name; nothing is made in files of other programs."""
    if is_special(file):  # a pipe would be waited for
        return False
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return bool(database.execute("SELECT 1 FROM studies WHERE study_name = ?", (study,)).fetchone())
    except sqlite3.Error:
        return False


def called_now(key: str, value: Any) -> Any:
    """What a stored fact is called in a study file of today."""
    return _NOW.get(value, value) if key == "prune.statistics" else value


def known() -> list[Path]:
    """Every study that `find` knows by name, in the order of names."""
    found: dict[str, Path] = {}
    for folder in _folders():
        for path in folder.glob("*.toml"):
            found.setdefault(path.stem, path)
    return [found[name] for name in sorted(found)]


def settings(file: StudyFile) -> dict[str, Any]:
    """What a study file and its overrides set, as JSON; not the storage, whose URL may hold a password."""
    values = file.study.model_dump(mode="json", exclude_unset=True, exclude={"storage", "device"})
    overrides = [override for override in file.overrides if json.dumps(override, ensure_ascii=False).isprintable()]
    return {"name": file.name, "path": str(file.path.absolute()), "settings": values, "overrides": overrides}


def from_settings(stored: dict[str, Any]) -> StudyFile:
    """The study file that `settings` were taken from, as it was then; ValueError, KeyError, TypeError if none."""
    name, path = stored["name"], stored["path"]
    if not isinstance(name, str) or "\0" in path:
        raise ValueError("no name, or no path")
    json.dumps(stored, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for half a character
    overrides = stored.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise ValueError("no overrides")
    return StudyFile(name, Path(path), Study.model_validate(stored["settings"]), tuple(overrides))


def facts(study: Study, folder: Path = Path()) -> dict[str, Fact]:
    """What decides the value of a trial, by dotted key: two studies with equal facts can share their trials.

    Keys without a value are left out, and so are local sources: the hash of their content is recorded
    elsewhere. Relative sources are looked up in `folder`, the study's.
    """
    flat = dict(_flat(study.model_dump(mode="json")))
    hidden = {key for key, value in flat.items() if value is None or key.startswith(NOT_FACTS)}
    hidden |= {key for key, value in flat.items() if key.startswith(LATER) and value == DEFAULTS[key]}
    if study.model.dtype == "auto":
        hidden.add("model.dtype")
    if is_local(study.model.source, folder):
        hidden.add("model.source")
    texts = [(role, text) for role, text in study.texts if isinstance(text, Text)]
    hidden |= {f"texts.{role}.source" for role, text in texts if is_local_text(text.source)}
    flat[BOS] = study.bos
    if study.bos is None:
        hidden.add(BOS)
    return {key: FORMER.get(f"{key}={value}", value) for key, value in flat.items() if key not in hidden}


def is_local(source: str, folder: Path = Path()) -> bool:
    """Whether a model's source is a folder or file of this machine; relative to the study's folder."""
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        return True
    try:
        return (folder / source).is_dir()
    except OSError:  # a name too long for a file
        return False


def is_local_text(source: str) -> bool:
    """Whether a text's source is a file of this machine."""
    return source.startswith("file:")


def _folders() -> tuple[Path, ...]:
    return HERE, PACKAGE.parent / "studies", EMBEDDED


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no permission to look, say: reading it tells the reason
        return True


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read(path: Path) -> dict[str, Any]:
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
        return tomllib.loads(text)
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


def _override(data: dict[str, Any], override: str, path: Path) -> KeyPath:
    """Writes one `key.path=value` into the data and gives back the key's path."""
    if not is_text(override):
        raise UserError(f"{path} with --set {override}: is not UTF-8 text")
    dotted, equals, value = override.partition("=")
    *tables, key = keys = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(keys):
        raise UserError(f"{path} with --set {override}: must have the form key.path=value")
    if tables == ["allocation"] and isinstance(data.get("allocation"), str | list):  # short for its table of names
        data["allocation"] = {"names": data["allocation"]}
    for depth, name in enumerate(tables, start=1):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise UserError(f"{path} with --set {override}: {_dotted(keys[:depth])}: is not a table")
    data[key] = _toml_value(value.strip())
    return keys


def _toml_value(text: str) -> object:
    """A TOML value, or the text itself where it is none (so that strings need no quotes)."""
    try:
        table = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return table["v"] if len(table) == 1 else text


def _invalid(
    path: Path, mistakes: dict[KeyPath, list[ErrorDetails]], changed: Sequence[tuple[str, KeyPath]]
) -> UserError:
    place, text = _worded(*next(iter(mistakes.items())))
    causes = [override for override, keys in changed if _within(place, keys) or _within(keys, place)]
    origin = " with --set ".join([str(path), *causes])
    others = len(mistakes) - 1
    more = f" (and {others} more mistake{'s' if others > 1 else ''})" if others else ""
    return UserError(f"{origin}: {text}{more}")


def _mistakes(error: ValidationError) -> dict[KeyPath, list[ErrorDetails]]:
    """What is wrong by place, unknown keys first: a misspelt key also makes the right one missing."""
    found: dict[KeyPath, list[ErrorDetails]] = {}
    problems = error.errors(include_url=False)
    problems.sort(key=lambda details: details["type"] != "extra_forbidden")
    for details in problems:
        found.setdefault(_place(details["loc"]), []).append(details)
    # Where a value in a list is wrong, the list's length and other branches of a union don't matter.
    outer = {place[:length] for place in found for length in range(len(place))}
    return {place: details for place, details in found.items() if place not in outer}


def _place(loc: KeyPath) -> KeyPath:
    """Pydantic's location without the branches of unions, which stand below a key that is no table."""
    place: KeyPath = ()
    table: type[BaseModel] | None = Study
    for part in loc:
        if isinstance(part, int) or table:
            place = (*place, part)
        if isinstance(part, str) and table:
            table = _table(table, part)
    return place


def _table(parent: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Model of a table of the study file; None where the key holds a plain value or is unknown."""
    annotation = parent.model_fields[key].annotation if key in parent.model_fields else None
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _worded(place: KeyPath, found: list[ErrorDetails]) -> tuple[KeyPath, str]:
    first = found[0]
    if first["type"] == "extra_forbidden":
        return place, f"{_dotted(place)}: unknown key; {_unknown(place)}"
    if first["type"] == "value_error":  # our own validators say `key: text`, relative to their table
        key, _, text = str(first["ctx"]["error"]).partition(": ")
        place = (*place, *key.split("."))
        return place, f"{_dotted(place)}: {text}"
    absent = first["type"] == "missing" and isinstance(place[-1], str)
    got = "" if absent else f", got {_shown(first['input'])}"
    rules = [_rule(place, details) for details in found]
    either = " or ".join([rules[0], *(rule.removeprefix("must ") for rule in rules[1:])])
    names = [name for details in found for name in _literals(details)]
    return place, f"{_dotted(place)}: {either}{got}{_did_you_mean(first['input'], names)}"


def _rule(place: KeyPath, details: ErrorDetails) -> str:
    names = _literals(details)
    if names:
        return f"must be {'one of ' * (len(names) > 1)}{', '.join(names)}"
    if details["type"] == "string_pattern_mismatch" and _dotted(place) in _PATTERNS:
        return _PATTERNS[_dotted(place)]
    rule = _RULES.get(details["type"], "is not valid")
    return rule.format(**details.get("ctx", {}))


def _literals(details: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", details["ctx"]["expected"]) if details["type"] == "literal_error" else []


def _unknown(place: KeyPath) -> str:
    """What was meant: the same key of another table, a near one of this table, or any of this table."""
    *parents, key = map(str, place)
    keys = [dotted.split(".") for dotted in _keys()]
    siblings = [own for *table, own in keys if table == parents]
    elsewhere = [".".join(path) for path in keys if path[-1] == key]
    near = get_close_matches(_dotted(place), elsewhere, n=1, cutoff=0)
    near = near or [".".join([*parents, own]) for own in get_close_matches(key, siblings, n=1)]
    return f"did you mean {near[0]}?" if near else f"known here are {', '.join(siblings)}"


def _keys(table: type[BaseModel] = Study, prefix: str = "") -> Iterator[str]:
    """Every key that a study file can hold, dotted, tables included."""
    for key in table.model_fields:
        yield prefix + key
        inner = _table(table, key)
        if inner:
            yield from _keys(inner, f"{prefix}{key}.")


def _within(place: KeyPath, table: KeyPath) -> bool:
    return place[: len(table)] == table


def _dotted(place: KeyPath) -> str:
    """`("prune", "pruners", 0)` as `prune.pruners[0]`; keys that TOML would quote are quoted."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            text += "." * bool(text) + (part if bare else json.dumps(part, ensure_ascii=False))
    return text


def _shown(value: object) -> str:
    """A value as TOML writes it, at most 60 characters."""
    if isinstance(value, dict):
        return "a table"
    try:
        text = without_secrets(json.dumps(value, ensure_ascii=False, default=str))
    except (ValueError, RecursionError):
        return "a value too large to show"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _did_you_mean(value: object, names: Sequence[str]) -> str:
    near = get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


DEFAULTS = {
    **dict(_flat(Prune().model_dump(mode="json"), "prune.")),
    **dict(_flat(Screen(trials=1).model_dump(mode="json"), "search.screen.")),
    "model.trust_remote_code": False,
    "search.objective": ["perplexity"],
    **{f"texts.{role}.every": 1 for role in ("calibration", "search", "report")},
}
