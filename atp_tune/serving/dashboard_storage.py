"""The storage as the dashboard sees it: with notes, figures and readable columns.

Notes and figures are made when the dashboard asks for them, and are not stored. So they are always current and whole,
cost a trial no time, and do not depend on the machine that ran it.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, cast

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from atp_tune.compat import FrozenStudy
from atp_tune.dashboard.notes import columns, facts_of, study_note, trial_note
from atp_tune.dashboard.publishing import PREFIX, attach, config_of, figures_of, note_of, without_rests
from atp_tune.errors import UserError
from atp_tune.report import gather, html
from atp_tune.results.goals import best_trial, front_of
from atp_tune.results.summary import final_numbers, summarise
from atp_tune.storage import artifacts, lost_trials, opening
from atp_tune.storage.database import Database, reason_of, without_password
from atp_tune.storage.opening import open_database
from atp_tune.storage.validation import ValidatedStudy

Attributes = Mapping[str, Any]


def make_view(address: str, storage: BaseStorage, join: str = "grpc://HOST:13000") -> "DashboardView":
    """The view of an existing database; `storage`: the same without additions; `join`: its URL for workers."""
    view = open_database(address, False, DashboardView)
    assert view is not None
    view.additions = Additions(storage, without_password(address), join)
    return view


class DashboardView(Database):
    """A database with notes and figures on its studies, and with attributes that fit the columns of a table."""

    additions: "Additions"

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies; notes and figures are made when they are read."""
        studies = super().get_all_studies()
        for study in studies:
            study.user_attrs = facts_of(study.user_attrs)
            study.system_attrs = cast(dict[str, Any], self._with_additions(study._study_id, study.system_attrs))
        return studies

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """System attributes of a study, with its notes and figures."""
        return dict(self._with_additions(study_id, super().get_study_system_attrs(study_id)))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials, with the attributes for the table."""
        return [_in_columns(trial) for trial in super().get_all_trials(study_id, True, states)]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial, with the attributes for the table."""
        return _in_columns(super().get_trial(trial_id))

    def _with_additions(self, study_id: int, stored: Attributes) -> "Later":
        return Later(stored, lambda: self.additions.of(study_id, stored))


def _in_columns(trial: FrozenTrial) -> FrozenTrial:
    trial.user_attrs = columns(trial)
    trial.values = trial.values and [round(value, 4) for value in trial.values]  # the page prints all digits
    return trial


class Later(Mapping[str, Any]):
    """Stored attributes, and additions that are made when one of them, or the whole mapping, is first read.

    The dashboard's list of studies reads one stored attribute of each study, and need not draw figures.
    """

    def __init__(self, stored: Attributes, make: Callable[[], Attributes]) -> None:
        self._stored = stored
        self._make = make
        self._all: Attributes | None = None

    def __getitem__(self, key: str) -> Any:
        return self._made()[key] if key.startswith(PREFIX) else self._stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def _made(self) -> Attributes:
        if self._all is None:
            self._all = {**self._stored, **self._make()}
        return self._all


class Additions:
    """Notes and figures of studies, remade when a study has changed; thread-safe."""

    def __init__(self, storage: BaseStorage, address: str, join: str) -> None:
        self._storage = storage
        self._address = address
        self._join = join
        self._lock = Lock()
        self._made: dict[int, tuple[object, Attributes]] = {}
        self._changes = 0

    def of(self, study_id: int, stored: Attributes) -> Attributes:
        """The notes and figures of a study, as system attributes in the dashboard's format."""
        with self._lock:
            study = ValidatedStudy(self._storage.get_study_name_from_id(study_id), self._storage)
            state = _state(study, stored)
            if study_id not in self._made or self._made[study_id][0] != state:
                self._changes += 1
                self._made[study_id] = state, self._make(study, stored)
            return self._made[study_id][1]

    def _make(self, study: Study, stored: Attributes) -> Attributes:
        summary = summarise(study)
        text = study_note(summary, self._address, self._join)
        notes = note_of(text, stored, step=self._changes)
        for trial in summary.trials:
            notes |= note_of(trial_note(trial, summary), stored, trial._trial_id, self._changes)
        return without_rests(figures_of(summary) | notes, stored)


def _state(study: Study, stored: Attributes) -> object:
    """A value that changes when notes or figures must be remade."""
    trials = [(trial.state, len(trial.user_attrs)) for trial in study.get_trials(deepcopy=False)]
    attrs = study.user_attrs
    own = {key: value for key, value in stored.items() if key.startswith(PREFIX)}
    return trials, attrs.get("total"), final_numbers(study), attrs.get("gp_posterior"), own


# --- What a server does for its studies: queues lost trials again, and keeps artifacts current.


class Maintenance:
    """Maintains all studies of a storage; `artifacts` is the folder of the files that the dashboard offers."""

    def __init__(self, storage: BaseStorage, artifacts: Path, tell: Callable[[str], None]) -> None:
        self._storage = storage
        self._folder = artifacts
        self._tell = tell
        self._seen: dict[int, object] = {}
        self._trouble = ""
        self._told: dict[str, str] = {}

    def turn(self) -> None:
        """One round over all studies; an error is reported once, and retried in the next round."""
        try:
            self._look()
            trouble = ""
        except (OSError, StorageInternalError, UserError) as error:
            trouble = f"warning: {reason_of(error)}"
        if trouble and trouble != self._trouble:
            self._tell(trouble)
        self._trouble = trouble

    def _look(self) -> None:
        attached = False
        for name in opening.names_in(self._storage):
            study = opening.find_study(self._storage, name)
            if study is None or "fingerprint" not in study.user_attrs:
                continue
            try:
                # Queues lost trials again, since workers on other machines cannot detect that a trial is lost.
                for number in lost_trials.recover(study):
                    trial = study.get_trials(deepcopy=False)[number]
                    reason, why = trial.user_attrs.get("lost", "sent no heartbeat"), lost_trials.given_up(trial)
                    end = f"cut off {why}, it is given up" if why else "it is queued again"
                    self._tell(f"{study.study_name}: trial {number}: {reason}; {end}")
                attached = attached or self._attach(study)  # one per round: a report takes half a second and 5 MB
            except UserError as error:
                if self._told.get(name) != str(error):
                    self._tell(f"warning: {error}")
                self._told[name] = str(error)

    def _attach(self, study: optuna.Study) -> bool:
        """Attaches best configuration and report if best trial, front or final numbers changed; whether it did."""
        best = best_trial(study)
        front = [trial.number for trial in front_of(study)]
        state = best and (best.number, final_numbers(study), front)
        if best is None or self._seen.get(study._study_id) == state:
            return False
        attach(study, self._folder, artifacts.REPORT, html.make([gather(study, datetime.now())]))
        if (config := config_of(study, summarise(study))) is not None:
            attach(study, self._folder, artifacts.CONFIG, config)
        self._seen[study._study_id] = state
        return True
