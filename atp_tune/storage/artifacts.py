"""Artifacts: the files that the dashboard offers with a study, in NAME.artifacts beside NAME.db.

Database and folder may be a stranger's. Only artifact ids of Optuna's form are accepted, so that each names a file of
the folder, and no links are read.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from atp_tune.errors import UserError

CONFIG, REPORT = MADE_ANEW = ("best.json", "report.html")  # files that `serve` updates
OF_STUDY = "artifacts:"  # prefix of system attributes of studies and trials; the artifact's id follows
OF_TRIAL = re.compile(r"(?P<head>dashboard:artifacts:)(?P<trial>\d{1,18})(?P<tail>:.*)", re.ASCII | re.DOTALL)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def refuse_link(folder: Path) -> None:
    """UserError if the folder of artifacts is a link, which a stranger may have made."""
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link to {folder.resolve()}, where files would be written; name that folder with "
            "--artifacts DIR, or remove the link"
        )


def is_name(name: object) -> bool:
    """Whether a name has the form of Optuna's artifact ids."""
    return isinstance(name, str) and UUID.fullmatch(name) is not None


def name_in(key: str) -> str | None:
    """The artifact id in an attribute's key, unchecked; None for other keys."""
    return key.rpartition(":")[2] if key.startswith(OF_STUDY) or OF_TRIAL.fullmatch(key) else None


def own_file(folder: Path, name: object) -> Path | None:
    """An artifact's file; None for an invalid id, a missing file, or a link."""
    if not is_name(name):
        return None
    path = folder / str(name)
    return path if path.is_file() and not path.is_symlink() else None


def is_kept(key: str, value: object) -> bool:
    """Whether an attribute is no artifact's, or is valid metadata of one (null: removed)."""
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
    """The file names of a study's artifacts by id, from the study's system attributes."""
    own = {key: value for key, value in attributes.items() if key.startswith(OF_STUDY) and is_kept(key, value)}
    read = {key: json.loads(value) for key, value in own.items()}
    return {str(name_in(key)): meta["filename"] for key, meta in read.items() if meta}


class Store(FileSystemArtifactStore):
    """A store of Optuna's in a folder, without access to files outside."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def has(self, name: object) -> bool:
        """Whether an artifact with this id can be read."""
        return own_file(self._folder, name) is not None

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes; ArtifactNotFound if there is none."""
        path = own_file(self._folder, artifact_id)
        if path is None:
            raise ArtifactNotFound("not found")
        return path.open("rb")
