"""The stored study of a study file, and the settings that it was run with."""

import shlex
from dataclasses import replace

import optuna

from atp_tune.errors import UserError
from atp_tune.results.summary import made_from
from atp_tune.spec.facts import facts
from atp_tune.spec.finding import known
from atp_tune.spec.studyfile import StudyFile
from atp_tune.storage.fingerprint import check_facts
from atp_tune.storage.opening import find_study, open_storage


def stored_study(file: StudyFile, study_name: str | None) -> optuna.Study:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    db = open_storage(file.storage_url, create=False)
    study = find_study(db, study_name or file.name) if db else None
    if study is None:
        by_name = file.path.absolute() in [path.absolute() for path in known()]
        other = ["--study-name", study_name] if study_name else []
        command = shlex.join(["python", "tune.py", "--study", file.name if by_name else str(file.path), *other])
        raise UserError(f"study {study_name or file.name}: has no trials yet; run: {command}")
    return study


def file_as_run(study: optuna.Study, file: StudyFile, is_overridden: bool = False) -> StudyFile:
    """The study file with the settings that the study was run with, as far as they are stored.

    `is_overridden`: other settings are asked for; UserError if the study's values depend on one of them.
    """
    made = None if is_overridden else made_from(study.user_attrs.get("made_from"))
    if made is None:
        check_facts(study, facts(file.study, file.folder), partly=True)
        return file
    return replace(made, path=file.path)
