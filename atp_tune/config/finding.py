"""Finds study files by name: in ./studies, in the repository and in the package."""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from atp_tune.errors import UserError, did_you_mean
from atp_tune.utils.system import is_special

HERE = Path("studies")
PACKAGE = Path(__file__).parents[1]
EMBEDDED = PACKAGE / "studies"
BARE = Path(__file__).parent / "prune.toml"  # the study file of `prune` without a study


def find(name: str) -> Path:
    """The file of a study, given its path, or its name in ./studies, the repository or the package."""
    is_path = name.endswith(".toml") or "/" in name or "\\" in name
    paths = [Path(name)] if is_path else [folder / f"{name}.toml" for folder in _folders()]
    for path in paths:
        with suppress(OSError):  # for example no permission; reading the file reports the reason
            if not path.exists():
                continue
        return path
    names = [*known()]
    if is_path:
        raise UserError(f"{name}: no such file{did_you_mean(Path(name).stem, names)}")
    for folder in _folders():
        for file in sorted(folder.glob("*.db")):
            if holds(file, name) and file.stem in names:
                raise UserError(f"{name}: is no study file, but trials: --study {file.stem} --study-name {name}")
    raise UserError(f"{name}: no such study; known are {', '.join(names) or 'none'}{did_you_mean(name, names)}")


def known() -> dict[str, Path]:
    """The files of all studies that `find` finds by name, sorted by name."""
    paths = dict[str, Path]()
    for folder in _folders():
        for path in folder.glob("*.toml"):
            paths.setdefault(path.stem, path)
    return dict(sorted(paths.items()))


def holds(file: Path, study: str) -> bool:
    """Whether a SQLite file holds an Optuna study of that name."""
    return bool(_rows(file, "SELECT 1 FROM studies WHERE study_name = ?", study))


def finished_trials(file: Path, study: str) -> list[int]:
    """Numbers of the trials that a study in a SQLite file has finished, read without Optuna; none if there are none."""
    query = "SELECT number FROM trials JOIN studies USING (study_id) WHERE study_name = ? AND state = 'COMPLETE'"
    numbers = [number for (number,) in _rows(file, query, study)]
    return sorted(number for number in numbers if isinstance(number, int))  # another program may have written anything


def _rows(file: Path, query: str, study: str) -> list[tuple[Any, ...]]:
    """What a SQLite file answers, opened read-only; nothing if it cannot be read."""
    if is_special(file):  # reading a pipe would block
        return []
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(query, (study,)).fetchall()
    except sqlite3.Error:
        return []


def _folders() -> tuple[Path, ...]:
    return HERE, PACKAGE.parent / "studies", EMBEDDED
