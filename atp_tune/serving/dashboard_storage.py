"""What the dashboard sees of a storage: the trials as they are, with notes, figures and columns for people.

Notes and figures are made when somebody looks, from what is stored at that moment. Nothing is written for it: they
cannot be out of date or half-written, a trial does not wait for them, and it does not matter which machine ran it.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from threading import Lock
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState
from optuna_dashboard import get_note, save_note, save_plotly_graph_object

from atp_tune.compat import FrozenStudy
from atp_tune.figures import draw
from atp_tune.results.summary import Summary, final_numbers, summarise
from atp_tune.serving.notes import columns, facts_of, study_note, trial_note, with_own_words
from atp_tune.storage.database import Database, without_password
from atp_tune.storage.opening import open_database
from atp_tune.storage.validation import ValidatedStudy

DASHBOARD = "dashboard:"  # what its attributes begin with
Attributes = Mapping[str, Any]


def make_view(address: str, storage: BaseStorage, join: str = "grpc://HOST:13000") -> "DashboardView":
    """The view of a database that exists; `storage` is the same one as it is, `join` where workers reach it."""
    view = open_database(address, False, DashboardView)
    assert view is not None
    view.additions = Additions(storage, without_password(address), join)
    return view


class DashboardView(Database):
    """A database whose studies have notes and figures, and whose attributes fit a table's columns."""

    additions: "Additions"

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies; the notes and figures of each are made when they are read."""
        studies = super().get_all_studies()
        for study in studies:
            study.user_attrs = facts_of(study.user_attrs)
            study.system_attrs = cast(dict[str, Any], self._with_additions(study._study_id, study.system_attrs))
        return studies

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """System attributes of a study, its notes and figures among them."""
        return dict(self._with_additions(study_id, super().get_study_system_attrs(study_id)))

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """All trials with the attributes that are worth a column."""
        return [_in_columns(trial) for trial in super().get_all_trials(study_id, True, states)]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """A trial with the attributes that are worth a column."""
        return _in_columns(super().get_trial(trial_id))

    def _with_additions(self, study_id: int, stored: Attributes) -> "Later":
        return Later(stored, lambda: self.additions.of(study_id, stored))


def _in_columns(trial: FrozenTrial) -> FrozenTrial:
    trial.user_attrs = columns(trial)
    trial.values = trial.values and [round(value, 4) for value in trial.values]  # the page prints all that there are
    return trial


class Later(Mapping[str, Any]):
    """Stored attributes, and additions that are made once someone asks for one of them, or for all.

    The dashboard's list of studies reads one attribute of each study: no reason to draw the figures of all.
    """

    def __init__(self, stored: Attributes, make: Callable[[], Attributes]) -> None:
        self._stored = stored
        self._make = make
        self._all: Attributes | None = None

    def __getitem__(self, key: str) -> Any:
        return self._made()[key] if key.startswith(DASHBOARD) else self._stored[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())

    def _made(self) -> Attributes:
        if self._all is None:
            self._all = {**self._stored, **self._make()}
        return self._all


class Additions:
    """Notes and figures of studies, made anew when a study has changed; any thread may ask."""

    def __init__(self, storage: BaseStorage, address: str, join: str) -> None:
        self._storage = storage
        self._address = address
        self._join = join
        self._lock = Lock()
        self._made: dict[int, tuple[object, Attributes]] = {}
        self._changes = 0

    def of(self, study_id: int, stored: Attributes) -> Attributes:
        """System attributes that hold the notes and figures of one study, in the dashboard's format."""
        with self._lock:
            study = ValidatedStudy(self._storage.get_study_name_from_id(study_id), self._storage)
            state = _state(study, stored)
            if study_id not in self._made or self._made[study_id][0] != state:
                self._changes += 1
                self._made[study_id] = state, self._make(study, stored)
            return self._made[study_id][1]

    def _make(self, study: Study, stored: Attributes) -> Attributes:
        summary = summarise(study)
        return _figures(summary) | self._notes(study, summary, stored)

    def _notes(self, study: Study, summary: Summary, stored: Attributes) -> dict[str, Any]:
        notes = self._note(study, study_note(summary, self._address, self._join), stored, "")
        for trial in summary.trials:
            owner = SimpleNamespace(storage=study._storage, study=study, _trial_id=trial._trial_id)
            notes |= self._note(cast(Trial, owner), trial_note(trial, summary), stored, f"{trial._trial_id}:")
        return notes

    def _note(self, owner: Study | Trial, text: str, stored: Attributes, infix: str) -> dict[str, Any]:
        """A note of ours above what people wrote, one version above what they saw last."""
        version = f"{DASHBOARD}{infix}note_ver"
        written = get_note(owner) if version in stored else ""
        shadow = optuna.create_study()
        target = shadow if isinstance(owner, Study) else SimpleNamespace(
            storage=shadow._storage, study=shadow, _trial_id=owner._trial_id
        )  # fmt: skip
        save_note(cast(Trial, target), with_own_words(text, written))
        made = shadow._storage.get_study_system_attrs(shadow._study_id)
        return {**made, version: int(stored.get(version, 0)) + self._changes}


def _figures(summary: Summary) -> dict[str, Any]:
    shadow = optuna.create_study()
    for name, figure in draw(summary).items():
        save_plotly_graph_object(shadow, figure, graph_object_id=name)
    return dict(shadow._storage.get_study_system_attrs(shadow._study_id))


def _state(study: Study, stored: Attributes) -> object:
    """What differs when notes or figures have to be made anew."""
    trials = [(trial.state, len(trial.user_attrs)) for trial in study.get_trials(deepcopy=False)]
    attrs = study.user_attrs
    own = {key: value for key, value in stored.items() if key.startswith(DASHBOARD)}
    return trials, attrs.get("total"), final_numbers(study), attrs.get("gp_posterior"), own
