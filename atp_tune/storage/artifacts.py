"""Artifacts: the files that the dashboard offers with a study, NAME.artifacts beside NAME.db.

Both may be a stranger's. A name is taken for an artifact's only where Optuna could have made it, so that it names a
file of the folder; and only what lies in the folder itself is read, since a link may lead anywhere.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

CONFIG, REPORT = MADE_ANEW = ("best.json", "report.html")  # files that `serve` keeps current
OF_STUDY = "artifacts:"  # keys of system attributes: this and the artifact's name, also those of a trial
OF_TRIAL = re.compile(r"(?P<head>dashboard:artifacts:)(?P<trial>\d{1,18})(?P<tail>:.*)", re.ASCII | re.DOTALL)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")  # what Optuna calls an artifact


def is_name(name: object) -> bool:
    """Whether Optuna could have called an artifact so."""
    return isinstance(name, str) and UUID.fullmatch(name) is not None


def name_in(key: str) -> str | None:
    """What an attribute's key names, an artifact or not; None where it is not of the kind that names one."""
    return key.rpartition(":")[2] if key.startswith(OF_STUDY) or OF_TRIAL.fullmatch(key) else None


def own_file(folder: Path, name: object) -> Path | None:
    """The file of an artifact; None for another name, and for what is no file of the folder itself."""
    if not is_name(name):
        return None
    path = folder / str(name)
    return path if path.is_file() and not path.is_symlink() else None


def is_kept(key: str, value: object) -> bool:
    """Whether an attribute is no artifact's at all, or says of one what Optuna says; null is one that was removed."""
    name = name_in(key)
    if name is None:
        return True
    if not is_name(name):
        return False
    try:
        found = json.loads(value) if isinstance(value, str) else ()
    except (ValueError, RecursionError):
        return False
    return found is None or _is_meta(found, name)


def _is_meta(value: Any, name: str) -> bool:
    return (
        isinstance(value, dict)
        and value.get("artifact_id") == name
        and all(isinstance(value.get(key), str) for key in ("filename", "mimetype"))
        and isinstance(value.get("encoding"), str | None)
    )


def file_names(attributes: Mapping[str, Any]) -> dict[str, str]:
    """What a study's artifacts are called, by their names in the folder, out of the study's system attributes."""
    own = {key: value for key, value in attributes.items() if key.startswith(OF_STUDY) and is_kept(key, value)}
    read = {key: json.loads(value) for key, value in own.items()}
    return {str(name_in(key)): meta["filename"] for key, meta in read.items() if meta}


class Store(FileSystemArtifactStore):
    """Optuna's store in a folder, which reads no file outside it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def has(self, name: object) -> bool:
        """Whether an artifact of that name can be read."""
        return own_file(self._folder, name) is not None

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes; ArtifactNotFound if there is none."""
        path = own_file(self._folder, artifact_id)
        if path is None:
            raise ArtifactNotFound("not found")
        return path.open("rb")
