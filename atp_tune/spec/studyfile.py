"""Study files: reads them with their overrides, and says in one line what is wrong with them.

Errors: every mistake is a `UserError` like `FILE: KEY: RULE, got VALUE; did you mean NAME? (and 2 more mistakes)`;
FILE is `FILE with --set KEY=VALUE` where an override is the cause. `atp_tune.spec.study` says what the keys mean.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atp_tune.spec import finding, mistakes, parsing
from atp_tune.spec.former import present_keys, present_override
from atp_tune.spec.study import Study

PLACES = ("storage=", "device=")  # overrides that say where, not what
TRIALS = "search.trials="

_SQLITE_FILE = re.compile(r"(?P<scheme>sqlite(\+\w+)?:///)(?P<path>(?!:memory:|file:)[^?]+)(?P<query>.*)")


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
        return not self.study.search.early_termination and any(
            one.startswith("search.early_termination=") for one in self.overrides
        )

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
        embedded = self.folder.resolve() == finding.EMBEDDED.resolve()
        return finding.HERE.absolute() if embedded else self.folder.absolute()


def absolute_storage(address: str, folder: Path) -> str:
    """A storage URL in which a relative SQLite path starts at `folder`."""
    url = _SQLITE_FILE.fullmatch(address)
    return f"{url['scheme']}{folder.absolute() / url['path']}{url['query']}" if url else address


def load(name: str, overrides: Sequence[str] = ()) -> StudyFile:
    """Reads a study by name or path, with `key.path=value` overrides; every mistake is a `UserError`."""
    path = finding.find(name)
    data = parsing.read(path)
    changed = [(text, parsing.override(data, text, path)) for text in overrides]
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise mistakes.invalid(path, error, changed) from None
    own = tuple(text for text in map(present_override, overrides) if not text.startswith(PLACES))
    return StudyFile(path.stem, path, study, own)


def overridden(file: StudyFile, changes: Mapping[str, str | int]) -> StudyFile:
    """The study file with other values at some dotted keys, as overrides would set them."""
    data = file.study.model_dump(mode="json", exclude_unset=True)
    overrides = [f"{key}={value}" for key, value in changes.items()]
    for text in overrides:
        parsing.override(data, text, file.path)
    return replace(file, study=Study.model_validate(data), overrides=(*file.overrides, *overrides))


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
    study = Study.model_validate(present_keys(dict(stored["settings"])))
    return StudyFile(name, Path(path), study, tuple(map(present_override, overrides)))
