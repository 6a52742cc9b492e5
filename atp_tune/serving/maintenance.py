"""What a server does for its studies: queues lost trials again, and keeps artifacts current."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage

from atp_tune.dashboard.publishing import attach, config_of
from atp_tune.errors import UserError
from atp_tune.report import gather, html
from atp_tune.results.summary import final_numbers, summarise
from atp_tune.storage import artifacts, lost_trials, opening, progress
from atp_tune.storage.database import reason_of


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
                self._recover(study)
                attached = attached or self._attach(study)  # one per round: a report takes half a second and 5 MB
            except UserError as error:
                if self._told.get(name) != str(error):
                    self._tell(f"warning: {error}")
                self._told[name] = str(error)

    def _recover(self, study: optuna.Study) -> None:
        """Queues lost trials again, since workers on other machines cannot detect that a trial is lost."""
        for number in lost_trials.recover(study):
            trial = study.get_trials(deepcopy=False)[number]
            reason, why = trial.user_attrs.get("lost", "sent no heartbeat"), lost_trials.given_up(trial)
            end = f"cut off {why}, it is given up" if why else "it is queued again"
            self._tell(f"{study.study_name}: trial {number}: {reason}; {end}")

    def _attach(self, study: optuna.Study) -> bool:
        """Attaches best configuration and report if best trial, front or final numbers changed; whether it did."""
        best = progress.best_trial(study)
        front = [trial.number for trial in progress.front_of(study)]
        state = best and (best.number, final_numbers(study), front)
        if best is None or self._seen.get(study._study_id) == state:
            return False
        attach(study, self._folder, artifacts.REPORT, html.make([gather(study, datetime.now())]))
        if (config := config_of(study, summarise(study))) is not None:
            attach(study, self._folder, artifacts.CONFIG, config)
        self._seen[study._study_id] = state
        return True
