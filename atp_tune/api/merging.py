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
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from atp_tune.config.studyfile import absolute_storage
from atp_tune.errors import UserError
from atp_tune.storage import artifacts, fingerprint, opening, progress
from atp_tune.storage.attributes import TABLES, readable
from atp_tune.storage.database import RetryingDatabase, without_password
from atp_tune.utils.cache import rename_new, temporary_folder
from atp_tune.utils.paths import check_writable

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


@dataclass(eq=False)
class Source:
    """The study in one storage, read once; `address` without password, `trials` finished, `attrs` of the system.

    `numbers`: number of each of its trials → its number in the new study.
    """

    address: str
    study: optuna.Study
    trials: list[FrozenTrial]
    unfinished: int
    attrs: Attributes
    artifacts: Path
    numbers: dict[int, int] = field(default_factory=dict)

    @property
    def kept(self) -> Attributes:
        """System attributes without invalid artifacts and those that `serve` writes again."""
        anew = {name for name, file in artifacts.file_names(self.attrs).items() if file in artifacts.MADE_ANEW}
        kept = {key: value for key, value in self.attrs.items() if artifacts.is_kept(key, value)}
        return {key: value for key, value in kept.items() if artifacts.name_in(key) not in anew}


def merge(places: Sequence[str], out: Path, name: str | None) -> Merged:
    """Merges the study `name`, or the only common one, from files or storage URLs."""
    _check_new(out)
    sources = _open(places, name)
    kept, name = _unite(sources), sources[0].study.study_name
    try:
        with temporary_folder(out) as folder, readable(name):
            _write(folder, sources, kept)
            _check_new(out)
            if (files := folder / "artifacts").exists():
                files.rename(out.with_suffix(".artifacts"))
            rename_new(folder / "new.db", out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    made = opening.find_study(_database(str(out))[0], name)
    assert made is not None
    shares, known = list[Share](), set[int]()
    for source in sources:
        new = {*source.numbers.values()}
        shares.append(Share(source.address, len(source.numbers), len(known & new), source.unfinished))
        known |= new
    return Merged(made, shares)


def _check_new(out: Path) -> None:
    for path in (out, out.with_suffix(".artifacts")):
        if path.exists():
            raise UserError(f"--out {out}: {path} exists; name a new file")
    check_writable(out, named="--out ")


def _database(place: str) -> tuple[BaseStorage, str, str]:
    """The storage of a file or a URL, its URL, and how it is shown; UserError for a file that does not exist."""
    is_url = "://" in place
    address = place if is_url else absolute_storage(f"sqlite:///{place}", Path())
    db = opening.open_storage(address, create=False)
    if db is None:
        raise UserError(f"merge: {place}: no such file")
    return db, address, without_password(place) if is_url else place


def _open(places: Sequence[str], name: str | None) -> list[Source]:
    """Reads the study of each storage; UserError if they hold different ones."""
    databases = [_database(place) for place in places]
    found = [opening.names_in(db) for db, *_ in databases]
    shared = set.intersection(*map(set, found))
    wanted = {name} if name else shared
    if len(wanted) != 1 or not wanted <= shared:
        each = zip(databases, found, strict=True)
        held = "; ".join(f"{shown} holds {', '.join(names) or 'none'}" for (*_, shown), names in each)
        raise UserError(f"merge: which study? Name one that all have with --study NAME; {held}")
    (name,), sources = wanted, []
    for db, address, shown in databases:
        study = opening.find_study(db, name)
        assert study is not None
        with readable(name):
            trials = study.get_trials(deepcopy=False)
            attrs = study._storage.get_study_system_attrs(study._study_id)
        ended = [trial for trial in trials if trial.state.is_finished()]
        folder = opening.artifacts_of(address)
        sources.append(Source(shown, study, ended, len(trials) - len(ended), attrs, folder))
        if "fingerprint" not in study.user_attrs:
            raise UserError(f"merge: {shown}: study {name} has no trials of atp_tune yet")
    first, *others = sources
    for other in others:
        facts = other.study.user_attrs["fingerprint"]
        seed = {key: value for key, value in first.study.user_attrs["fingerprint"].items() if key == SEED}
        if differing := fingerprint.differences(first.study, {**facts, **seed}):
            raise UserError(f"merge: {other.address} holds another study than {first.address}: {differing}")
    return sources


def _unite(sources: Sequence[Source]) -> list[FrozenTrial]:
    """The trials of the new study in order; the sources get the numbers of theirs."""
    kept: list[tuple[Source, FrozenTrial]] = []
    known: dict[object, int] = {}  # trials of earlier sources → their places in `kept`
    for source in sources:
        for trial in source.trials:
            source.numbers[trial.number] = place = known.get(_key(trial), len(kept))
            if place == len(kept):
                kept.append((source, trial))
        known |= {_key(trial): source.numbers[trial.number] for trial in source.trials}
    order = sorted(range(len(kept)), key=lambda place: (kept[place][1].datetime_start or datetime.max, place))
    number_of = {place: number for number, place in enumerate(order)}
    for source in sources:
        source.numbers = {old: number_of[place] for old, place in source.numbers.items()}
    return [_renumbered(kept[place][1], kept[place][0].numbers) for place in order]


def _key(trial: FrozenTrial) -> object:
    """A key that is equal for copies of one trial only."""
    values = tuple(trial.values or ())
    return tuple(sorted(trial.params.items())), values, trial.state, trial.datetime_start, trial.datetime_complete


def _renumbered(trial: FrozenTrial, numbers: Mapping[int, int]) -> FrozenTrial:
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


def _write(folder: Path, sources: Sequence[Source], kept: Sequence[FrozenTrial]) -> None:
    db = opening.open_storage(f"sqlite:///{folder.absolute() / 'new.db'}", create=True)
    assert isinstance(db, RetryingDatabase)
    first = sources[0].study
    study = optuna.create_study(study_name=first.study_name, storage=db, directions=first.directions)
    ids = [study._storage.create_new_trial(study._study_id, trial) for trial in kept]
    # Attributes: the first source overwrites the others.
    merged, system = Attributes(), Attributes()
    by_trial: dict[str, Attributes] = {}
    for source in sources[::-1]:
        merged |= source.study.user_attrs
        names = {"dense": "dense"} | {str(old): str(new) for old, new in source.numbers.items()}
        for key in TABLES:
            stored = source.study.user_attrs.get(key, {})
            by_trial.setdefault(key, {}).update({names[name]: value for name, value in stored.items() if name in names})
        new_ids = {trial._trial_id: ids[source.numbers[trial.number]] for trial in source.trials}
        for key, value in source.kept.items():
            found = artifacts.OF_TRIAL.fullmatch(key)
            if found and int(found["trial"]) in new_ids:
                system[f"{found['head']}{new_ids[int(found['trial'])]}{found['tail']}"] = value
            elif not found and not NOTE.fullmatch(key):
                system[key] = value
    totals = [source.study.user_attrs.get("total", 0) for source in sources]
    merged["total"] = max(sum(map(progress.counts, kept)), *totals)
    merged |= {key: values for key, values in by_trial.items() if values}
    merged.pop("gp_posterior", None)
    posteriors = [source.study.user_attrs.get("gp_posterior") for source in sources]
    valid = [found for found in posteriors if isinstance(found, dict) and isinstance(found.get("before"), int)]
    if valid:
        merged["gp_posterior"] = max(valid, key=lambda found: int(found["before"]))
    if any(NOTE.fullmatch(key) for source in sources for key in source.attrs):
        system |= _notes(sources, ids)
    for key, value in merged.items():
        study.set_user_attr(key, value)
    for key, value in system.items():
        study._storage.set_study_system_attr(study._study_id, key, value)
    # Copies the artifacts of all studies and their trials, without links and invalid ids.
    files = folder / "artifacts"
    for source in sources:
        keys = chain(source.kept, *(trial.system_attrs for trial in source.trials))
        for file in (artifacts.own_file(source.artifacts, artifacts.name_in(key)) for key in keys):
            if file is not None:
                files.mkdir(exist_ok=True)
                shutil.copyfile(file, files / file.name)
    db.close()  # before the file is renamed


def _notes(sources: Sequence[Source], ids: Sequence[int]) -> Attributes:
    """The notes of the study and its trials, with people's words from all sources."""
    from atp_tune.dashboard.notes import own_words
    from atp_tune.dashboard.publishing import note_in, note_parts

    notes: dict[int | None, dict[str, None]] = {}
    for source in sources:
        notes.setdefault(None, {})[note_in(source.attrs)] = None
        for trial in source.trials:
            notes.setdefault(source.numbers[trial.number], {})[note_in(source.attrs, trial._trial_id)] = None
    made = Attributes()
    for number, bodies in notes.items():
        written = [body for body in bodies if body]
        words = written if len(written) == 1 else list(dict.fromkeys(map(own_words, written)))
        if any(words):
            made |= note_parts("\n\n".join(words), 1, None if number is None else ids[number])
    return made
