"""Optuna's storage, with attributes that people read apart from details that only the program reads.

Optuna's dashboard shows each user attribute of a trial as a column, and all of a study's on its page. So details, which
are lists, tables and identities, are stored as system attributes, their names after `PREFIX`. `AttributeStorage`
separates them when it writes and joins them when it reads: to all other modules they are user attributes.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from sqlalchemy.dialects import postgresql, sqlite

from atp_tune.compat import (
    FrozenStudy,
    StudySystemAttributeModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    transaction,
)
from atp_tune.storage.validation import STUDY, TRIAL

UPSERTS: dict[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

PREFIX = "atp_tune:"
# Attributes of a trial or a study that are shown: all others with a type in `validation` are stored apart.
SHOWN = {
    "device",
    "host",
    "failure",
    "lost",
    "repeats",
    "stopped_after",
    "effective_bits",
    "plugins",
}


def is_of_trial(key: str) -> bool:
    """Whether a trial's user attribute is stored apart."""
    return key in TRIAL and key not in SHOWN


def is_of_study(key: str) -> bool:
    """Whether a study's user attribute is stored apart, also with a row's name after a colon, as in test_nlls:12."""
    return key.partition(":")[0] in STUDY and key not in SHOWN


def joined(user: Mapping[str, Any], system: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """User and system attributes as they were before details were separated; a detail replaces a user attribute."""
    details = {key.removeprefix(PREFIX): value for key, value in system.items() if key.startswith(PREFIX)}
    others = {key: value for key, value in system.items() if not key.startswith(PREFIX)}
    return {**user, **details}, others


class AttributeStorage(RDBStorage):
    """Optuna's storage, which stores several attributes in one transaction, and details apart."""

    def set_trial_user_attrs(self, trial_id: int, attributes: Mapping[str, Any]) -> None:
        """Stores several attributes in one transaction: each transaction waits for the disk."""
        with transaction(self.scoped_session, True) as session:
            if self.engine.name not in UPSERTS:
                for key, value in attributes.items():
                    self._set_trial_attr_without_commit(session, TrialUserAttributeModel, trial_id, key, value)
                return
            state: Any = TrialModel.find_or_raise_by_id(trial_id, session).state
            self.check_trial_is_updatable(trial_id, state)
            details = {PREFIX + key: value for key, value in attributes.items() if is_of_trial(key)}
            shown = {key: value for key, value in attributes.items() if not is_of_trial(key)}
            for model, values in ((TrialUserAttributeModel, shown), (TrialSystemAttributeModel, details)):
                self._upsert(session, model, "trial_id", trial_id, values)

    def set_study_system_attrs(self, study_id: int, attributes: Mapping[str, Any]) -> None:
        """Stores several system attributes of a study in one transaction, so that readers see all or none."""
        if self.engine.name not in UPSERTS:
            for key, value in attributes.items():
                self.set_study_system_attr(study_id, key, value)
            return
        with transaction(self.scoped_session, True) as session:
            self._upsert(session, StudySystemAttributeModel, "study_id", study_id, attributes)

    def _upsert(self, session: Any, model: Any, owner: str, id_: int, attributes: Mapping[str, Any]) -> None:
        if attributes:
            rows = [{owner: id_, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
            insert = UPSERTS[self.engine.name](model).values(rows)
            new = {"value_json": insert.excluded.value_json}
            session.execute(insert.on_conflict_do_update(index_elements=[owner, "key"], set_=new))

    def _set_trial_attr_without_commit(self, session: Any, model_cls: Any, trial_id: int, key: str, value: Any) -> None:
        if model_cls is TrialUserAttributeModel and is_of_trial(key):
            model_cls, key = TrialSystemAttributeModel, PREFIX + key
        super()._set_trial_attr_without_commit(session, model_cls, trial_id, key, value)

    def _build_frozen_trial_from_trial_model(self, trial: Any) -> FrozenTrial:
        found = super()._build_frozen_trial_from_trial_model(trial)
        found.user_attrs, found.system_attrs = joined(found.user_attrs, found.system_attrs)
        return found

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        """Optuna's, with the details."""
        return joined(super().get_trial_user_attrs(trial_id), super().get_trial_system_attrs(trial_id))[0]

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        """Optuna's, without the details."""
        return joined({}, super().get_trial_system_attrs(trial_id))[1]

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Optuna's; a detail is stored apart."""
        if is_of_study(key):
            super().set_study_system_attr(study_id, PREFIX + key, value)
        else:
            super().set_study_user_attr(study_id, key, value)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Optuna's, with the details; the parts of the dashboard's figures, which may be long, are not read."""
        details = (StudySystemAttributeModel.study_id == study_id, StudySystemAttributeModel.key.startswith(PREFIX))
        with transaction(self.scoped_session) as session:
            found = session.query(StudySystemAttributeModel).filter(*details).all()
            system = {str(row.key): json.loads(str(row.value_json)) for row in found}
        return joined(super().get_study_user_attrs(study_id), system)[0]

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Optuna's, without the details."""
        return joined({}, super().get_study_system_attrs(study_id))[1]

    def get_all_studies(self) -> list[FrozenStudy]:
        """Optuna's; details are user attributes."""
        studies = super().get_all_studies()
        for study in studies:
            study.user_attrs, study.system_attrs = joined(study.user_attrs, study.system_attrs)
        return studies
