"""Writes into a study what Optuna's plain dashboard shows of it: note, figures and the best configuration.

A run does this when it has found a better trial, and at its end. `serve` makes the same on request, and a report.
"""

from collections.abc import Sequence
from pathlib import Path

from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.study import Study
from optuna.trial import FrozenTrial

from atp_tune.plan import Plan
from atp_tune.report.figures import draw
from atp_tune.report.formats import rendered
from atp_tune.results.formatting import trial_remark
from atp_tune.results.status import best_config, measured_columns
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import database
from atp_tune.storage.attributes import Attributes, StudySnapshot, readable
from atp_tune.utils.cache import temporary_folder, write_atomically
from atp_tune.utils.registry import Table

# --- The texts of the dashboard: Markdown notes on studies and trials, and columns of its table.

OWN = "*Above: written by atp_tune. Below: your own notes, which are kept.*"


def own_words(written: str) -> str:
    """The part of a stored note that people wrote."""
    return written.rpartition(OWN)[2].strip()


def study_note(
    summary: Summary, address: str, join: str = "grpc://HOST:13000", files: Sequence[str] = database.MADE_ANEW
) -> str:
    """The search space, results, files, and the next commands.

    `address` is the storage's URL, `join` its URL for other machines; `files`: the study's artifacts.
    """
    return rendered("study.md.jinja", summary=summary, file=summary.made_from, address=address, join=join, files=files)


def trial_note(trial: FrozenTrial, summary: Summary) -> str:
    """Plan, value or the reason for none, sparsities and times of a trial."""
    return rendered("trial.md.jinja", summary=summary, trial=trial, plan=Plan.stored_in(trial.user_attrs))


def columns(trial: FrozenTrial) -> Table:
    """A trial's attributes for the dashboard's table: numbers, which sort, and no long lists."""
    attrs = trial.user_attrs
    shown = measured_columns(attrs)
    shown |= {name: attrs[name] for name in ("device", "dtype", "host") if name in attrs}
    if remark := trial_remark(trial):
        shown["remark"] = remark
    return shown


# --- Notes and figures as Optuna's dashboard stores them: texts in parts, as system attributes of a study.
#
# The dashboard itself is an extra, which only `serve` needs. `tests/test_dashboard.py` compares with its own functions.

PREFIX = "dashboard:"  # of the dashboard's attributes
LENGTH = 2045  # characters of a part, which fit into a column of Optuna's tables


def note_parts(text: str, version: int, trial: int | None = None) -> Table:
    """The attributes of a note; `trial`: the trial's id in the storage, None for the study's own note."""
    head = _head(trial)
    return {f"{head}ver": version, **_parts(f"{head}str:", text)}


def note_in(attributes: Attributes, trial: int | None = None) -> tuple[str, int]:
    """The text of a stored note, and its version; "" if a part is missing or no text, 0 if no dashboard wrote it."""
    head = _head(trial)
    version, prefix = attributes.get(f"{head}ver"), f"{head}str:"
    if not version or not isinstance(version, int):
        return "", 0
    parts = [attributes.get(f"{prefix}{index}") for index in range(sum(key.startswith(prefix) for key in attributes))]
    return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else "", version


def _head(trial: int | None) -> str:
    return f"{PREFIX}{'' if trial is None else f'{trial}:'}note_"


def _parts(prefix: str, text: str) -> dict[str, str]:
    return {f"{prefix}{index}": text[start : start + LENGTH] for index, start in enumerate(range(0, len(text), LENGTH))}


def publish(study: Study, address: str, folder: Path | None) -> None:
    """Writes note, figures and best configuration of a study.

    `address`: the storage's URL; `folder`: of the artifacts, None for none.

    Note and figures are written in one transaction. Does nothing over gRPC, whose server makes them on request.
    """
    db = getattr(study._storage, "_backend", study._storage)  # the storage behind Optuna's cache
    if not isinstance(db, database.Database):
        return
    study = StudySnapshot(study)
    stored, summary = db.get_study_system_attrs(study._study_id), summarise(study)
    note = study_note(summary, database.without_password(address), files=() if folder is None else (database.CONFIG,))
    attributes = dashboard_figures(summary) | dashboard_note(note, stored)
    db.set_study_system_attrs(study._study_id, without_rests(attributes, stored))
    if folder is not None and (config := best_as_json(study, summary)) is not None:
        # Makes the folder of a study's files; UserError for a link, which a stranger may have made.
        database.refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        attach(study, folder, database.CONFIG, config)


def dashboard_figures(summary: Summary) -> Table:
    """The figures of a study, as system attributes in the dashboard's format."""
    attributes: Table = {}
    for name, figure in draw(summary).items():
        # The attributes of a figure: its name among the study's figures, and Plotly's JSON of it.
        attributes |= _parts(f"{PREFIX}plot_data:{name}:", figure.to_json())
    return attributes


def dashboard_note(text: str, stored: Attributes, trial: int | None = None, step: int = 1) -> Table:
    """The note of a study or trial with people's own text below, as system attributes.

    `trial`: the trial's id in the storage, None for the study's note. Its version is `step` above the stored one. A
    stored note that no dashboard writes is ignored.
    """
    written, version = note_in(stored, trial)
    note = f"{text}\n\n---\n\n{OWN}\n\n{own_words(written)}".rstrip() + "\n"
    return note_parts(note, version + step, trial)


def without_rests(attributes: Attributes, stored: Attributes) -> Table:
    """Made attributes, and "" for stored parts beyond them: longer figures and notes are stored in more parts."""
    series = {key.rpartition(":")[0] for key in attributes if key.rpartition(":")[2].isdecimal()}
    return {**attributes, **{key: "" for key in stored if key not in attributes and key.rpartition(":")[0] in series}}


def best_as_json(study: Study, summary: Summary) -> bytes | None:
    """The best configuration, for downloads to any folder; None without a best trial or its study file."""
    if summary.made_from is None or summary.best_trial is None:
        return None
    config = best_config(summary.made_from, study, Path(database.CONFIG))
    return config.model_copy(update={"folder": str(summary.made_from.folder)}).to_json().encode()


def attach(study: Study, folder: Path, name: str, content: bytes) -> None:
    """Attaches a file to a study, replacing an earlier one of that name; `folder`: of the artifacts."""
    with readable(study.study_name):
        names = database.file_names(study._storage.get_study_system_attrs(study._study_id))
    for artifact, file_name in names.items():
        if file_name == name:
            write_atomically(folder / artifact, content)
            return
    with temporary_folder() as temporary:  # outside the folder, where a file may have this name
        file = temporary / name
        file.write_bytes(content)
        upload_artifact(artifact_store=FileSystemArtifactStore(folder), file_path=str(file), study_or_trial=study)
