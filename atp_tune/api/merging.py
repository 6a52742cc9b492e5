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
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from atp_tune.config.studyfile import absolute_storage
from atp_tune.errors import UserError
from atp_tune.storage import database, fingerprint, opening, progress
from atp_tune.storage.attributes import TABLES, readable
from atp_tune.storage.database import Database, without_password
from atp_tune.storage.progress import trials_in
from atp_tune.utils.cache import rename_new, temporary_folder
from atp_tune.utils.system import check_writable

Attributes = dict[str, Any]
NOTE = re.compile(r"dashboard:(\d+:)?note_(ver|str:\d+)")
SEED = "search.seed"  # may differ: it affects which points are tried, not their values
AS_BEFORE = re.compile(r"(?<=^failed before, as trial )[0-9]{1,9}(?![0-9])")


@dataclass(eq=False)
class Share:
    """The study in one storage, read once; trials that are finished, in an earlier storage too (`known`), unfinished.

    `address` without password; `user`, `attrs`: attributes of the study, and of the system; `artifacts`: their folder;
    `numbers`: number of each finished trial → its number in the new study.
    """

    address: str
    trials: list[FrozenTrial]
    unfinished: int
    user: Attributes
    attrs: Attributes
    artifacts: Path
    known: int = 0
    numbers: dict[int, int] = field(default_factory=dict)


def merge(sources: Sequence[str], out: Path, name: str | None) -> tuple[optuna.Study, list[Share]]:
    """Merges the study `name`, or the only common one, from files or storage URLs: the new study, and each share."""
    _check_new(out)
    first, shares = _open(sources, name)
    name = first.study_name
    # Trials of two storages are one if they are equal, also in how many equal ones their storage has before them.
    entries = dict[object, tuple[Share, FrozenTrial]]()
    keys = list[dict[int, object]]()  # of each share, by trial
    for share in shares:
        equal: Counter[object] = Counter()
        keys.append({})
        for trial in share.trials:
            values, when = tuple(trial.values or ()), (trial.datetime_start, trial.datetime_complete)
            same = tuple(sorted(trial.params.items())), values, trial.state, when
            equal[same] += 1
            key = keys[-1][trial.number] = same, equal[same]
            share.known += key in entries
            entries.setdefault(key, (share, trial))
    order = sorted(entries, key=lambda key: entries[key][1].datetime_start or datetime.max)
    number_of = {key: number for number, key in enumerate(order)}
    for share, own in zip(shares, keys, strict=True):
        share.numbers = {old: number_of[key] for old, key in own.items()}
    try:
        with temporary_folder(out) as folder, readable(name):
            _write(folder, first, shares, [_renumbered(entries[key][1], entries[key][0].numbers) for key in order])
            _check_new(out)  # another process may have made it meanwhile
            if (files := folder / "artifacts").exists():
                files.rename(out.with_suffix(".artifacts"))
            rename_new(folder / "new.db", out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return _open([str(out)], name)[0], shares


def _check_new(out: Path) -> None:
    for path in (out, out.with_suffix(".artifacts")):
        if path.exists():
            raise UserError(f"--out {out}: {path} exists; name a new file")
    check_writable(out, named="--out ")


def _open(sources: Sequence[str], name: str | None) -> tuple[optuna.Study, list[Share]]:
    """The study in the first storage, and each share; UserError if they hold different ones, or a file is missing."""
    opened = []
    for source in sources:
        is_url = "://" in source
        address = source if is_url else absolute_storage(f"sqlite:///{source}", Path())
        if (db := opening.open_storage(address, create=False)) is None:
            raise UserError(f"merge: {source}: no such file")
        opened.append((without_password(source) if is_url else source, db, opening.artifact_folder(address)))
    studies = [opening.names_in(db) for _, db, _ in opened]
    shared = set.intersection(*map(set, studies))
    wanted = {name} if name else shared
    if len(wanted) != 1 or not wanted <= shared:
        held = "; ".join(
            f"{at} holds {', '.join(names) or 'none'}" for (at, *_), names in zip(opened, studies, strict=True)
        )
        raise UserError(f"merge: which study? Name one that all have with --study NAME; {held}")
    (name,), shares, first = wanted, list[Share](), None
    for at, db, folder in opened:
        study = opening.find_study(db, name)
        assert study is not None
        with readable(name):
            trials, attrs = trials_in(study), db.get_study_system_attrs(study._study_id)
        user = study.user_attrs
        ended = [trial for trial in trials if trial.state.is_finished()]
        shares.append(Share(at, ended, len(trials) - len(ended), user, attrs, folder))
        if (facts := user.get("fingerprint")) is None:
            raise UserError(f"merge: {at}: study {name} has no trials of atp_tune yet")
        first = first or study
        seed = {key: value for key, value in shares[0].user["fingerprint"].items() if key == SEED}
        if differing := fingerprint.differences(first, {**facts, **seed}):
            raise UserError(f"merge: {at} holds another study than {opened[0][0]}: {fingerprint.in_words(differing)}")
    assert first is not None
    return first, shares


def _renumbered(trial: FrozenTrial, numbers: dict[int, int]) -> FrozenTrial:
    """The trial with new numbers in its attributes."""
    trial, user = copy(trial), dict(trial.user_attrs)
    system = {key: value for key, value in trial.system_attrs.items() if database.is_kept(key, value)}
    for attributes, key in ((user, "repeats"), (system, "failed_trial")):
        if attributes.get(key) in numbers:
            attributes[key] = numbers[attributes[key]]
    if "failure" in user:
        user["failure"] = AS_BEFORE.sub(lambda match: str(numbers.get(int(match[0]), match[0])), user["failure"])
    if "retry_history" in system:
        system["retry_history"] = [numbers[old] for old in system["retry_history"] if old in numbers]
    trial.user_attrs, trial.system_attrs = user, system
    return trial


def _write(folder: Path, first: optuna.Study, shares: Sequence[Share], trials: Sequence[FrozenTrial]) -> None:
    from atp_tune.report.publishing import note_in, note_parts, own_words

    db = opening.open_storage(f"sqlite:///{folder.absolute() / 'new.db'}", create=True)
    assert isinstance(db, Database)
    study = optuna.create_study(study_name=first.study_name, storage=db, directions=first.directions)
    ids = [db.create_new_trial(study._study_id, trial) for trial in trials]
    user, system = Attributes(), Attributes()
    tables: dict[str, Attributes] = {key: {} for key in TABLES}
    files = folder / "artifacts"
    for share in shares[::-1]:  # the first overwrites the others
        user |= share.user
        names = {"dense": "dense"} | {str(old): str(new) for old, new in share.numbers.items()}
        for key, table in tables.items():
            table |= {names[row]: value for row, value in share.user.get(key, {}).items() if row in names}
        # Attributes of the system, without invalid artifacts and those that `serve` makes anew.
        new_ids = {trial._trial_id: ids[share.numbers[trial.number]] for trial in share.trials}
        anew = {of for of, file in database.file_names(share.attrs).items() if file in database.MADE_ANEW}
        own = {
            key
            for key, value in share.attrs.items()
            if database.is_kept(key, value) and database.name_in(key) not in anew and not NOTE.fullmatch(key)
        }
        for key in own:
            match = database.OF_TRIAL.fullmatch(key)
            if match and int(match["trial"]) in new_ids:
                system[f"{match['head']}{new_ids[int(match['trial'])]}{match['tail']}"] = share.attrs[key]
            elif not match:
                system[key] = share.attrs[key]
        # Artifacts of the study and its trials, without links and invalid ids.
        keys = chain(own, *(trial.system_attrs for trial in share.trials))
        for file in filter(None, (database.own_file(share.artifacts, database.name_in(key)) for key in keys)):
            files.mkdir(exist_ok=True)
            shutil.copyfile(file, files / file.name)
    user["total"] = max(sum(map(progress.counts, trials)), *(share.user.get("total", 0) for share in shares))
    user |= {key: table for key, table in tables.items() if table}
    # Notes of the study and its trials, with people's words from all storages.
    notes = dict[int | None, dict[str, None]]()
    for share in shares:
        notes.setdefault(None, {})[note_in(share.attrs)[0]] = None
        for trial in share.trials:
            notes.setdefault(ids[share.numbers[trial.number]], {})[note_in(share.attrs, trial._trial_id)[0]] = None
    for of, bodies in notes.items():
        written = [body for body in bodies if body]
        words = written if len(written) == 1 else list(dict.fromkeys(map(own_words, written)))
        if any(words):
            system |= note_parts("\n\n".join(words), 1, of)
    for key, value in user.items():
        study.set_user_attr(key, value)
    for key, value in system.items():
        db.set_study_system_attr(study._study_id, key, value)
    db.close()  # before the file is renamed
