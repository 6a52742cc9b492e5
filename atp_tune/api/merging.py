"""Merging the trials of one study from several storages into a new SQLite file, for machines without a shared network.

Equal trials of two storages (copies of an earlier common state) are merged into one. Trials are renumbered by their
start times, also in attributes that refer to trials. Running and waiting trials are left out. Where attributes of the
study differ, the first storage wins; users' notes are kept from all storages.

Also left out: `best.json` and `report.html` of a dashboard, which `serve` writes again, links, and artifacts, notes and
attributes that Optuna or its dashboard cannot have written.

Errors: UserError if the storages hold different studies or unreadable data, or the new file exists.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from atp_tune.errors import UserError
from atp_tune.spec.studyfile import absolute_storage
from atp_tune.storage import artifacts, fingerprint, opening, progress
from atp_tune.storage.attributes import TABLES, readable
from atp_tune.storage.database import RetryingDatabase, without_password
from atp_tune.utils.cache import rename_new, temporary_folder
from atp_tune.utils.paths import check_writable

Numbers: TypeAlias = Mapping[int, int]  # number of a trial in a storage → its new number

Attributes: TypeAlias = dict[str, Any]
NOTE = re.compile(r"dashboard:(\d+:)?note_(ver|str:\d+)")
SEED = "search.seed"  # may differ: it affects which points are tried, not their values
AS_BEFORE = re.compile(r"(?<=^failed before, as trial )[0-9]{1,9}(?![0-9])")


@dataclass(frozen=True)
class Share:
    """The trials of one storage: finished, already in an earlier storage (`known`), and unfinished."""

    address: str
    trials: int
    known: int
    unfinished: int


@dataclass(frozen=True)
class Merged:
    """The new study, and each storage's share."""

    study: optuna.Study
    shares: list[Share]


@dataclass(frozen=True)
class Source:
    """The study in one storage, read once; `address` without password, `trials` finished, `attrs` of the system."""

    address: str
    study: optuna.Study
    trials: list[FrozenTrial]
    unfinished: int
    attrs: Attributes
    artifacts: Path


def merge(places: Sequence[str], out: Path, name: str | None) -> Merged:
    """Merges the study `name`, or the only common one, from files or storage URLs."""
    _check_new(out)
    sources = _open(places, name)
    _check_same(sources)
    kept, numbers = _unite(sources)
    try:
        name = sources[0].study.study_name
        with temporary_folder(out) as folder, readable(name):
            _write(folder, sources, kept, numbers)
            _check_new(out)
            if (files := folder / "artifacts").exists():
                files.rename(out.with_suffix(".artifacts"))
            rename_new(folder / "new.db", out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    made = opening.find_study(_database(str(out)), name)
    assert made is not None
    return Merged(made, list(_shares(sources, numbers)))


def _shares(sources: Sequence[Source], numbers: Sequence[Numbers]) -> Iterator[Share]:
    known: set[int] = set()
    for source, own in zip(sources, numbers, strict=True):
        yield Share(source.address, len(own), len(known.intersection(own.values())), source.unfinished)
        known.update(own.values())


def _check_new(out: Path) -> None:
    for path in (out, out.with_suffix(".artifacts")):
        if path.exists():
            raise UserError(f"--out {out}: {path} exists; name a new file")
    check_writable(out, named="--out ")


def _open(places: Sequence[str], name: str | None) -> list[Source]:
    databases = {place: _database(place) for place in places}
    found = {place: opening.names_in(db) for place, db in databases.items()}
    shared = set.intersection(*(set(names) for names in found.values()))
    wanted = {name} if name else shared
    if len(wanted) != 1 or not wanted <= shared:
        held = "; ".join(f"{_shown(place)} holds {', '.join(names) or 'none'}" for place, names in found.items())
        raise UserError(f"merge: which study? Name one that all have with --study NAME; {held}")
    return [_source(place, databases[place], *wanted) for place in places]


def _source(place: str, db: BaseStorage, name: str) -> Source:
    study = opening.find_study(db, name)
    assert study is not None
    with readable(name):
        trials = study.get_trials(deepcopy=False)
        attrs = study._storage.get_study_system_attrs(study._study_id)
    ended = [trial for trial in trials if trial.state.is_finished()]
    folder = opening.artifacts_of(_address(place))
    return Source(_shown(place), study, ended, len(trials) - len(ended), attrs, folder)


def _address(place: str) -> str:
    return place if "://" in place else absolute_storage(f"sqlite:///{place}", Path())


def _shown(place: str) -> str:
    return without_password(place) if "://" in place else place


def _database(place: str) -> BaseStorage:
    db = opening.open_storage(_address(place), create=False)
    if db is None:
        raise UserError(f"merge: {place}: no such file")
    return db


def _check_same(sources: Sequence[Source]) -> None:
    first, *others = sources
    for source in sources:
        if "fingerprint" not in source.study.user_attrs:
            raise UserError(f"merge: {source.address}: study {source.study.study_name} has no trials of atp_tune yet")
    for other in others:
        facts = other.study.user_attrs["fingerprint"]
        seed = {key: value for key, value in first.study.user_attrs["fingerprint"].items() if key == SEED}
        if differing := fingerprint.differences(first.study, {**facts, **seed}):
            raise UserError(f"merge: {other.address} holds another study than {first.address}: {differing}")


def _unite(sources: Sequence[Source]) -> tuple[list[FrozenTrial], list[Numbers]]:
    """The trials of the new study in order, and for each source the new numbers of its trials."""
    kept: list[tuple[int, FrozenTrial]] = []
    known: dict[object, int] = {}  # trials of earlier sources → their places in `kept`
    places: list[dict[int, int]] = []
    for index, source in enumerate(sources):
        own = {}
        for trial in source.trials:
            own[trial.number] = known.get(_key(trial), len(kept))
            if own[trial.number] == len(kept):
                kept.append((index, trial))
        known |= {_key(trial): own[trial.number] for trial in source.trials}
        places.append(own)
    order = sorted(range(len(kept)), key=lambda place: (kept[place][1].datetime_start or datetime.max, place))
    number_of = {place: number for number, place in enumerate(order)}
    numbers = [{old: number_of[place] for old, place in own.items()} for own in places]
    return [_renumbered(kept[place][1], numbers[kept[place][0]]) for place in order], list(numbers)


def _key(trial: FrozenTrial) -> object:
    """A key that is equal for copies of one trial only."""
    values = tuple(trial.values or ())
    return tuple(sorted(trial.params.items())), values, trial.state, trial.datetime_start, trial.datetime_complete


def _renumbered(trial: FrozenTrial, numbers: Numbers) -> FrozenTrial:
    """The trial with new numbers in its attributes."""
    trial, user, system = copy(trial), dict(trial.user_attrs), dict(trial.system_attrs)
    if user.get("repeats") in numbers:
        user["repeats"] = numbers[user["repeats"]]
    if "failure" in user:
        user["failure"] = AS_BEFORE.sub(lambda found: str(numbers.get(int(found[0]), found[0])), user["failure"])
    system = {key: value for key, value in system.items() if artifacts.is_kept(key, value)}
    if system.get("failed_trial") in numbers:
        system["failed_trial"] = numbers[system["failed_trial"]]
    if "retry_history" in system:
        system["retry_history"] = [numbers[old] for old in system["retry_history"] if old in numbers]
    trial.user_attrs, trial.system_attrs = user, system
    return trial


def _write(folder: Path, sources: Sequence[Source], kept: Sequence[FrozenTrial], numbers: Sequence[Numbers]) -> None:
    db = opening.open_storage(f"sqlite:///{folder.absolute() / 'new.db'}", create=True)
    assert isinstance(db, RetryingDatabase)
    first = sources[0].study
    study = optuna.create_study(study_name=first.study_name, storage=db, directions=first.directions)
    ids = [study._storage.create_new_trial(study._study_id, trial) for trial in kept]
    merged: Attributes = {}
    by_trial: dict[str, Attributes] = {}
    for source, own in [*zip(sources, numbers, strict=True)][::-1]:  # the first source overwrites the others
        merged |= source.study.user_attrs
        names = {"dense": "dense"} | {str(old): str(new) for old, new in own.items()}
        for key in TABLES:
            stored = source.study.user_attrs.get(key, {})
            by_trial.setdefault(key, {}).update({names[name]: value for name, value in stored.items() if name in names})
    totals = [source.study.user_attrs.get("total", 0) for source in sources]
    merged["total"] = max(sum(map(progress.counts, kept)), *totals)
    merged |= {key: values for key, values in by_trial.items() if values}
    merged.pop("gp_posterior", None)
    posteriors = [source.study.user_attrs.get("gp_posterior") for source in sources]
    valid = [found for found in posteriors if isinstance(found, dict) and isinstance(found.get("before"), int)]
    if valid:
        merged["gp_posterior"] = max(valid, key=lambda found: int(found["before"]))
    for key, value in merged.items():
        study.set_user_attr(key, value)
    for key, value in _system_attrs(sources, numbers, ids).items():
        study._storage.set_study_system_attr(study._study_id, key, value)
    if any(NOTE.fullmatch(key) for source in sources for key in source.attrs):
        _write_notes(study, sources, numbers, ids)
    # Copies the artifacts of all studies and their trials, without links and invalid ids.
    files = folder / "artifacts"
    for source in sources:
        keys = chain(_kept_attrs(source), *(trial.system_attrs for trial in source.trials))
        for file in (artifacts.own_file(source.artifacts, artifacts.name_in(key)) for key in keys):
            if file is not None:
                files.mkdir(exist_ok=True)
                shutil.copyfile(file, files / file.name)
    db.close()  # before the file is renamed


def _system_attrs(sources: Sequence[Source], numbers: Sequence[Numbers], ids: Sequence[int]) -> Attributes:
    merged = {}
    for source, own in [*zip(sources, numbers, strict=True)][::-1]:  # the first source overwrites the others
        new_ids = {trial._trial_id: ids[own[trial.number]] for trial in source.trials}
        for key, value in _kept_attrs(source).items():
            found = artifacts.OF_TRIAL.fullmatch(key)
            if found and int(found["trial"]) in new_ids:
                merged[f"{found['head']}{new_ids[int(found['trial'])]}{found['tail']}"] = value
            elif not found and not NOTE.fullmatch(key):
                merged[key] = value
    return merged


def _kept_attrs(source: Source) -> Attributes:
    """System attributes of a study without invalid artifacts and those that `serve` writes again."""
    anew = {name for name, file in artifacts.file_names(source.attrs).items() if file in artifacts.MADE_ANEW}
    kept = {key: value for key, value in source.attrs.items() if artifacts.is_kept(key, value)}
    return {key: value for key, value in kept.items() if artifacts.name_in(key) not in anew}


def _write_notes(
    study: optuna.Study, sources: Sequence[Source], numbers: Sequence[Numbers], ids: Sequence[int]
) -> None:
    from atp_tune.dashboard.notes import own_words
    from atp_tune.dashboard.publishing import note_in, note_parts

    notes: dict[int | None, dict[str, None]] = {}
    for source, own in zip(sources, numbers, strict=True):
        notes.setdefault(None, {})[note_in(source.attrs)] = None
        for trial in source.trials:
            notes.setdefault(own[trial.number], {})[note_in(source.attrs, trial._trial_id)] = None
    for number, bodies in notes.items():
        written = [body for body in bodies if body]
        words = written if len(written) == 1 else list(dict.fromkeys(map(own_words, written)))
        if any(words):
            made = note_parts("\n\n".join(words), 1, None if number is None else ids[number])
            for key, value in made.items():
                study._storage.set_study_system_attr(study._study_id, key, value)
