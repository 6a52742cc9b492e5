"""Findings on a configuration (zero-shot, speed, continuations, recovery), stored in its JSON file and on its study.

On the study each is a user attribute, named after the file's key and the trial. A configuration that is written later
for the same trial includes them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial
from pydantic import BaseModel, TypeAdapter, ValidationError

from atp_tune.config.best import Config, ZeroShot, read_config
from atp_tune.config.finding import holds
from atp_tune.config.prune import Recovered
from atp_tune.config.studyfile import absolute_storage
from atp_tune.errors import UserError
from atp_tune.metrics import Answers, Continuations, Speed
from atp_tune.plan import Plan
from atp_tune.storage import opening
from atp_tune.storage.database import without_password
from atp_tune.utils.cache import alone_with, write_atomically
from atp_tune.utils.system import check_writable

Key = Literal["zero_shot", "speed", "continuations", "recovered"]
KINDS: dict[Key, TypeAdapter[Any]] = {
    "zero_shot": TypeAdapter(ZeroShot), "speed": TypeAdapter(Speed), "continuations": TypeAdapter(Continuations),
    "recovered": TypeAdapter(Recovered),
}  # fmt: skip


def attach(
    path: Path, config: Config, key: Key, value: BaseModel | Mapping[str, Any], address: str | None = None
) -> list[str]:
    """Stores a measurement of a configuration in its file and on its study, if found; the names of those places.

    `address`: the study's storage, else SQLite files beside the configuration and its study file are searched. A file
    that holds another trial by now is not changed. UserError if the study is not in the storage of `address`.
    """
    found = value.model_dump(mode="json") if isinstance(value, BaseModel) else dict(value)
    study = study_of(path, config, address)
    if study is not None:  # first: a run that writes the file takes what the study has
        store(study, key, config.trial, found)
    places = [str(path)] if path.exists() and _write(path, config, {key: found}) else []
    return places + ([f"study {study.study_name}"] if study is not None else [])


def check(path: Path, config: Config, address: str | None = None) -> None:
    """UserError if `attach` could not store a measurement; called before it is measured."""
    if path.exists():
        check_writable(path, instead="copy it to where you can write")
    if address is not None:
        study_of(path, config, address)


def store(study: optuna.Study, key: str, trial: int | None, found: Mapping[str, Any]) -> None:
    """Stores a finding on a trial of its study, in an attribute of its own."""
    study.set_user_attr(f"{key}:{trial}", dict(found))


def _write(path: Path, config: Config, found: Mapping[Key, Any]) -> bool:
    """Adds measurements to the file; False if it holds another trial by now."""
    with alone_with(path):
        now = read_config(path)
        if not is_same(now, config):
            return False
        try:
            write_atomically(path, _with(now, found).to_json().encode())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; copy it to where you can write") from None
    return True


def _with(config: Config, found: Mapping[Key, Any]) -> Config:
    return config.model_copy(update={key: KINDS[key].validate_python(value) for key, value in found.items()})


def is_same(one: Config, other: Config) -> bool:
    """Whether two configurations are of one trial of one study."""
    return all(getattr(one, part) == getattr(other, part) for part in ("study", "trial", "plan")) and (
        one.model.fingerprint == other.model.fingerprint
    )


def study_of(path: Path, config: Config, address: str | None = None) -> optuna.Study | None:
    """A configuration's study; None if not found, UserError if not in the storage of `address`."""
    if config.trial is None:  # not from a search
        return None
    if address is not None:
        study = _in_storage(absolute_storage(address, Path()), config)
        if study is None:
            raise UserError(
                f"--storage {without_password(address)}: has no study {config.study} whose trial {config.trial} is "
                f"that of {path}"
            )
        return study
    found = (_in_storage(f"sqlite:///{file}", config) for file in _databases(path, config))
    return next((study for study in found if study is not None), None)


def _databases(path: Path, config: Config) -> Iterator[Path]:
    """SQLite files with a study of this name, beside the configuration and its study file."""
    folders = dict.fromkeys([path.absolute().parent, Path(os.path.realpath(path.absolute().parent / config.folder))])
    files = [file for folder in folders for file in sorted(folder.glob("*.db"))]
    return (file for file in sorted(files, key=lambda file: file.stem != config.study) if holds(file, config.study))


def _in_storage(address: str, config: Config) -> optuna.Study | None:
    db = opening.open_storage(address, create=False)
    study = opening.find_study(db, config.study) if db else None
    if study is None or study.user_attrs.get("fingerprint", {}).get("model.content") != config.model.fingerprint:
        return None
    plans = (
        Plan.stored_in(trial.user_attrs) for trial in study.get_trials(deepcopy=False) if trial.number == config.trial
    )
    return study if any(plan is not None and plan.does == config.plan.does for plan in plans) else None


def with_attached(config: Config, study: optuna.Study, out: Path) -> Config:
    """The configuration with its trial's measurements from the study and from the file that it will replace."""
    return _with(config, {**_in_file(config, out), **attached(study, config.trial)})


def attached(study: optuna.Study, trial: int | None) -> dict[Key, Any]:
    """The measurements of a trial on its study that this version can read."""
    found: dict[Key, Any] = {}
    for key, kind in KINDS.items():
        known = study.user_attrs.get(key)
        if isinstance(known, dict) and str(trial) in known:
            with suppress(ValidationError):
                kind.validate_python(known[str(trial)])
                found[key] = known[str(trial)]
    return found


def speed_of(study: optuna.Study, trial: int) -> Speed | None:
    """The speed of a trial's model, if `speedup` measured it."""
    found = attached(study, trial).get("speed")
    return None if found is None else Speed.model_validate(found)


def answers_of(study: optuna.Study, trial: FrozenTrial) -> Answers | None:
    """The answers of a trial's model on test images, beside dense's and uniform's, if this version can read them."""
    known = study.user_attrs.get("answers")
    try:
        return Answers.model_validate(known[str(trial.number)]) if known and str(trial.number) in known else None
    except ValidationError:
        return None


def _in_file(config: Config, out: Path) -> dict[Key, Any]:
    try:
        there = read_config(out) if out.is_file() else None
    except UserError:
        return {}
    if there is None or not is_same(there, config):
        return {}
    return {key: getattr(there, key) for key in KINDS if getattr(there, key) is not None}
