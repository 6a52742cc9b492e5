"""Writes into a study what Optuna's plain dashboard shows of it: note, figures and the best configuration.

A run does this when it has found a better trial, and at its end. `serve` makes the same on request, and a report.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.study import Study

from atp_tune.dashboard.notes import study_note, with_own_words
from atp_tune.figures import draw
from atp_tune.results.stored import best_config
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import artifacts
from atp_tune.storage.attributes import StudySnapshot, readable
from atp_tune.storage.database import Database, without_password
from atp_tune.utils.cache import temporary_folder, write_atomically

# --- Notes and figures as Optuna's dashboard stores them: texts in parts, as system attributes of a study.
#
# The dashboard itself is an extra, which only `serve` needs. `tests/test_dashboard.py` compares with its own functions.

PREFIX = "dashboard:"  # of the dashboard's attributes
LENGTH = 2045  # characters of a part, which fit into a column of Optuna's tables


def note_parts(text: str, version: int, trial: int | None = None) -> dict[str, Any]:
    """The attributes of a note; `trial`: the trial's id in the storage, None for the study's own note."""
    head = _head(trial)
    return {f"{head}note_ver": version, **_parts(f"{head}note_str:", text)}


def note_version(attributes: Mapping[str, Any], trial: int | None = None) -> int:
    """The version of a stored note; 0 if there is none that a dashboard wrote."""
    version = attributes.get(f"{_head(trial)}note_ver")
    return version if isinstance(version, int) else 0


def note_in(attributes: Mapping[str, Any], trial: int | None = None) -> str:
    """The text of a stored note; "" if there is none, or if a part is missing or no text."""
    if not note_version(attributes, trial):
        return ""
    prefix = f"{_head(trial)}note_str:"
    count = sum(key.startswith(prefix) for key in attributes)
    parts = [attributes.get(f"{prefix}{index}") for index in range(count)]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else ""


def _head(trial: int | None) -> str:
    return PREFIX if trial is None else f"{PREFIX}{trial}:"


def _parts(prefix: str, text: str) -> dict[str, str]:
    starts = range(0, len(text), LENGTH)
    return {f"{prefix}{index}": text[start : start + LENGTH] for index, start in enumerate(starts)}


def publish(study: Study, address: str, folder: Path | None) -> None:
    """Writes note, figures and best configuration of a study.

    `address`: the storage's URL; `folder`: of the artifacts, None for none.

    Note and figures are written in one transaction. Does nothing over gRPC, whose server makes them on request.
    """
    db = getattr(study._storage, "_backend", study._storage)  # the storage behind Optuna's cache
    if not isinstance(db, Database):
        return
    study = StudySnapshot(study)
    stored, summary = db.get_study_system_attrs(study._study_id), summarise(study)
    note = study_note(summary, without_password(address), files=() if folder is None else (artifacts.CONFIG,))
    made = figures_of(summary) | note_of(note, stored)
    db.set_study_system_attrs(study._study_id, without_rests(made, stored))
    if folder is not None and (config := config_of(study, summary)) is not None:
        # Makes the folder of a study's files; UserError for a link, which a stranger may have made.
        artifacts.refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        attach(study, folder, artifacts.CONFIG, config)


def figures_of(summary: Summary) -> dict[str, Any]:
    """The figures of a study, as system attributes in the dashboard's format."""
    made: dict[str, Any] = {}
    for name, figure in draw(summary).items():
        # The attributes of a figure: its name among the study's figures, and Plotly's JSON of it.
        made |= _parts(f"{PREFIX}plot_data:{name}:", figure.to_json())
    return made


def note_of(text: str, stored: Mapping[str, Any], trial: int | None = None, step: int = 1) -> dict[str, Any]:
    """The note of a study or trial with people's own text below, as system attributes.

    `trial`: the trial's id in the storage, None for the study's note. Its version is `step` above the stored one. A
    stored note that no dashboard writes is ignored.
    """
    return note_parts(with_own_words(text, note_in(stored, trial)), note_version(stored, trial) + step, trial)


def without_rests(made: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Made attributes, and "" for stored parts beyond them: longer figures and notes are stored in more parts."""
    series = {key.rpartition(":")[0] for key in made if key.rpartition(":")[2].isdecimal()}
    rests = {key: "" for key in stored if key not in made and key.rpartition(":")[0] in series}
    return {**made, **rests}


def config_of(study: Study, summary: Summary) -> bytes | None:
    """The best configuration, for downloads to any folder; None without a best trial or its study file."""
    if summary.made_from is None or summary.best_trial is None:
        return None
    config = best_config(summary.made_from, study, Path(artifacts.CONFIG))
    return config.model_copy(update={"folder": str(summary.made_from.folder)}).to_json().encode()


def attach(study: Study, folder: Path, name: str, content: bytes) -> None:
    """Attaches a file to a study, replacing an earlier one of that name; `folder`: of the artifacts."""
    with readable(study.study_name):
        known = artifacts.file_names(study._storage.get_study_system_attrs(study._study_id))
    for artifact, file_name in known.items():
        if file_name == name:
            write_atomically(folder / artifact, content)
            return
    with temporary_folder() as place:  # outside the folder, where a file may have this name
        file = place / name
        file.write_bytes(content)
        upload_artifact(artifact_store=FileSystemArtifactStore(folder), file_path=str(file), study_or_trial=study)
