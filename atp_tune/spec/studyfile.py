"""Reads study files and the overrides of `--set`.

Errors: every mistake is a `UserError` like `FILE: KEY: RULE, got VALUE; did you mean NAME? (and 2 more mistakes)`;
FILE is `FILE with --set KEY=VALUE` if an override is the cause. `atp_tune.spec.study` defines the keys.
"""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atp_tune.errors import PluginError, UserError, is_text
from atp_tune.frozen import STORED
from atp_tune.paths import is_special
from atp_tune.spec import finding
from atp_tune.spec.mistakes import KeyPath, dotted, invalid
from atp_tune.spec.plugged import plug_in
from atp_tune.spec.study import Study

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
        trusted = model.trust_remote_code and self.trusts_model
        found = {"allow_pickle": model.allow_pickle, "trust_remote_code": trusted}
        return {**found, "trust_plugins": self.trusts_plugins}

    @property
    def sets_trials(self) -> bool:
        """Whether an override sets the total number of trials, as `--trials` does."""
        return any(text.startswith(TRIALS) for text in self.overrides)

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

    def best_of(self, name: str) -> Path:
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


def read(path: Path) -> dict[str, Any]:
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
    place = f"line {lines}" if where == "end of document" else where
    return f"{place}: {what[0].lower()}{what[1:]}"


def override(data: dict[str, Any], text: str, path: Path) -> KeyPath:
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
    data[key] = _toml_value(value.strip())
    return keys


def tables(overrides: Sequence[str]) -> dict[str, Any]:
    """The tables that overrides make by themselves; UserError for one that is wrong."""
    data: dict[str, Any] = {}
    for text in overrides:
        override(data, text, Path("study.toml"))
    return data


def _toml_value(text: str) -> object:
    """Parses a TOML value; text that is not TOML is a string, so strings need no quotes."""
    try:
        table = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):
        return text
    return table["v"] if len(table) == 1 else text


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


def overridden(file: StudyFile, changes: Mapping[str, str | int]) -> StudyFile:
    """A copy of the study file with other values at dotted keys, set in the same way as overrides."""
    data = file.study.model_dump(mode="json", exclude_unset=True)
    overrides = [f"{key}={value}" for key, value in changes.items()]
    for text in overrides:
        override(data, text, file.path)
    return replace(file, study=Study.model_validate(data), overrides=(*file.overrides, *overrides))


def settings(file: StudyFile) -> dict[str, Any]:
    """The values that a study file and its overrides set, as JSON; no storage, whose URL may hold a password."""
    values = file.study.model_dump(mode="json", exclude_unset=True, exclude={"storage", "device"})
    overrides = [text for text in file.overrides if json.dumps(text, ensure_ascii=False).isprintable()]
    return {"name": file.name, "path": str(file.path.absolute()), "settings": values, "overrides": overrides}


def from_settings(stored: dict[str, Any]) -> StudyFile:
    """Rebuilds a study file from its `settings`; ValueError, KeyError or TypeError if they are not valid."""
    name, path = stored["name"], stored["path"]
    if not isinstance(name, str) or "\0" in path:
        raise ValueError("no name, or no path")
    json.dumps(stored, ensure_ascii=False).encode()  # ValueError for an unpaired surrogate
    overrides = stored.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ValueError("no overrides")
    study = Study.model_validate(stored["settings"], context=STORED)
    return StudyFile(name, Path(path), study, tuple(overrides))
