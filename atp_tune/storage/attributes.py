"""Optuna's storage, with attributes that people read apart from details that only the program reads.

Optuna's dashboard shows each user attribute of a trial as a column, and all of a study's on its page. So details, which
are lists, tables and identities, are stored as system attributes, their names after `PREFIX`. `AttributeStorage`
separates them when it writes and joins them when it reads: to all other modules they are user attributes.
"""

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from copy import deepcopy as deepcopied
from math import inf, isfinite, isnan
from typing import Annotated, Any, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError
from sqlalchemy.dialects import postgresql, sqlite

from atp_tune.config.best import Batch, Found
from atp_tune.config.plugged import PluginRef
from atp_tune.errors import UserError
from atp_tune.measures import MEASURES
from atp_tune.metrics import BosEffect
from atp_tune.plan import METHODS, Bits, Plan, Share
from atp_tune.utils.compat import (
    FrozenStudy,
    StudySystemAttributeModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    transaction,
)
from atp_tune.utils.registry import Table

# --- What a study keeps of each trial, and of itself: a field for each attribute, with its type.
#
# The database may be a stranger's, or a later version's: each attribute is validated alone, and those of the wrong type
# count as missing. Optuna's dashboard has a column for each that is `SHOWN`; the others lie apart.


def _written(text: str) -> str:
    text.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return text


def _nll(value: float) -> float:
    if not (isnan(value) or value == inf or -1 < value < 1e6):
        raise ValueError
    return value


def _effect(effect: Table) -> Table:
    _written(BosEffect.model_validate(effect).token)  # ValidationError is a ValueError
    return effect


def _planned(fields: Table) -> Table:
    plan = Plan.model_validate(fields)
    _written(plan.method + plan.allocation + "".join(plan.parameters))
    return fields


T = TypeVar("T")
SHOWN = "shown"
Words = Annotated[str, AfterValidator(_written)]
ShownWords = Annotated[Words, SHOWN]
Count = Annotated[int, Field(ge=0, lt=2**63)]
ShownCount = Annotated[Count, SHOWN]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Positive = Annotated[float, Field(gt=0, lt=1e15)]
Total = Annotated[int, Field(ge=0, lt=10**9)]
Some = Annotated[list[T], Field(min_length=1)]
Two = Annotated[list[T], Field(min_length=2, max_length=2)]
Nlls = Some[Annotated[float, AfterValidator(_nll)]]
Kls = Some[Amount]
Ranks = Some[Annotated[int, Field(ge=0, lt=10**6)]]
Role = Annotated[str, Field(pattern=r"^(dense|[0-9]{1,9})$")]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Batches = dict[Words, Batch]
CutOff = dict[Words, Words | bool]
FOUND = ("zero_shot", "speed", "continuations", "answers", "recovered")
ITEMS: Table = {by.items: {"nlls": Nlls, "ranks": Ranks}.get(by.items, Kls) for by in MEASURES.values()}
SCORES: Table = {  # of a study: the dense model's items, and by trial those of the test text, and findings
    **{by.dense_items: ITEMS[by.items] for by in MEASURES.values()},
    **{f"test_{key}": dict[Role, kind] for key, kind in ITEMS.items()},  # type: ignore[valid-type]
    **dict.fromkeys(FOUND, dict[Role, Found]),
}
TABLES = (*(f"test_{key}" for key in ITEMS), "draws", "refits", *FOUND)  # by trial, each row stored apart


class TrialRecord(BaseModel):
    """Attributes of a trial: its plan, what was measured beside `ITEMS`, and who ran it."""

    plan: Annotated[Table, AfterValidator(_planned)]
    realised: Share
    packed_bytes: Count
    quantized_bytes: Count
    effective_bits: Annotated[float, Field(ge=0, le=64), SHOWN]
    stderr: Annotated[float, Field(ge=0)]
    errors: list[float]
    misses: Some[Annotated[int, Field(ge=0, le=1)]]
    accuracies: dict[Words, Two[Amount]]
    experts_without_tokens: list[Words]
    # The run.
    device: ShownWords
    host: ShownWords
    dtype: Words
    versions: dict[Words, Words]
    batches: Batches
    seconds: dict[Words, Amount]
    peak_bytes: dict[Words, Count]
    start: bool
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    process_started: Amount
    booted: Amount
    # Why it has no value, or another trial's.
    failure: ShownWords
    lost: ShownWords
    cut_off: CutOff
    repeats: ShownCount
    stopped_after: ShownCount


class StudyRecord(BaseModel):
    """Attributes of a study beside `SCORES`: facts of its model and texts, and how far it is."""

    fingerprint: dict[Words, Words | int | float | bool | list[Words] | list[float]]
    made_from: Table
    sizes: Some[Size]
    dense_bytes: Count
    blocks: Words
    linears: list[list[Words]]
    conv1d: bool
    bos: Annotated[dict[Words, Any], AfterValidator(_effect)]
    batches: Batches
    kinds: Some[Words]
    limit: Annotated[dict[Words, Positive | dict[Words, Share]], Field(min_length=1, max_length=1)]
    plugins: Annotated[dict[Words, PluginRef], SHOWN]
    screens: Words
    total: Total
    terminated_early: Two[Total]
    gp_posterior: Table
    training: dict[Words, Words | int | float]
    draws: dict[Number, dict[Number, Nlls]]
    refits: dict[Number, dict[Number, dict[Number, Nlls]]]  # by trial, number of draws, and draw
    fitted_to: dict[Number, Two[Count]]  # by number of draws


class SystemRecord(BaseModel):
    """System attributes of a trial: what Optuna says of its repetition, and our own."""

    fixed_params: dict[Words, Any]
    failed_trial: Count
    retry_history: list[Count]
    cut_offs: list[CutOff]


def kinds(model: type[BaseModel], more: Mapping[str, Any]) -> dict[str, TypeAdapter[Any]]:
    """The type of each attribute: the fields of a model, and `more` by name."""
    own = {name: field.rebuild_annotation() for name, field in model.model_fields.items()}
    return {name: TypeAdapter(kind) for name, kind in {**own, **more}.items()}


def shown(model: type[BaseModel]) -> set[str]:
    """The attributes that people read."""
    return {name for name, field in model.model_fields.items() if SHOWN in field.metadata}


# --- Validation of stored studies.
#
# Attributes of the wrong type are ignored. A trial that atp_tune cannot have made counts as failed.
# Errors: UserError if Optuna itself cannot read the study.

GONE = "does not exist"  # in Optuna's KeyError for a missing study
FOREIGN = "it was not written by atp_tune"
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RecursionError)


Attributes = Mapping[str, Any]  # of a trial or a study, by name
FACTS = kinds(  # of a fingerprint, of the facts that others read
    BaseModel,
    {
        "sparsity": Share | Two[Share],
        "bits": Bits | Two[Bits],
        "model.content": Words,
        "model.dtype": Words,
    },
)
TRIAL, STUDY, SYSTEM = kinds(TrialRecord, ITEMS), kinds(StudyRecord, SCORES), kinds(SystemRecord, {})
WORDS, NUMBER = TypeAdapter(Words), TypeAdapter(float)


def folded(attrs: Attributes) -> Table:
    """The attributes with a table `test_nlls` instead of its rows `test_nlls:dense`, `test_nlls:12` …, and so on.

    Rows are stored separately because two hosts may add to one table at the same moment. Earlier versions stored whole
    tables, to which the rows are added. Tables and rows of the wrong type are ignored.
    """
    attributes = checked(attrs, {table: STUDY[table] for table in TABLES})
    for name in sorted(attrs):
        table, *path = name.split(":")
        if table in TABLES and path:
            row = attributes.pop(name)
            if checked({table: _with({}, path, row)}, STUDY):
                attributes[table] = _with(attributes.get(table), path, row)
    return attributes


def _with(table: Any, path: Sequence[str], row: Any) -> Table:
    """A table with a row at the end of a path, in the place of what was there."""
    rows = dict(table) if isinstance(table, dict) else {}
    rows[path[0]] = row if len(path) == 1 else _with(rows.get(path[0]), path[1:], row)
    return rows


class ValidatedStudy(optuna.Study):
    """An Optuna study whose attributes and trials are validated; `is_stopped`: a callback called its `stop`."""

    is_stopped = False

    def __init__(self, study_name: str, storage: optuna.storages.BaseStorage) -> None:
        self._checked = dict[int, tuple[FrozenTrial, FrozenTrial]]()
        with readable(study_name, is_new=True):
            super().__init__(study_name, storage)

    def stop(self) -> None:
        """Ends `optimize` after the running trial."""
        self.is_stopped = True
        super().stop()

    @property
    def user_attrs(self) -> Table:
        """The study's valid attributes."""
        with readable(self.study_name):
            attrs = checked(folded(super().user_attrs), STUDY)
        if "fingerprint" in attrs:
            attrs["fingerprint"] = checked(attrs["fingerprint"], FACTS)
        return attrs

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """The validated trials, in any of these states."""
        with readable(self.study_name):
            trials = [self._check(trial) for trial in super().get_trials(deepcopy)]
        return [trial for trial in trials if states is None or trial.state in states]

    def _pop_waiting_trial_id(self) -> int | None:
        """Takes the waiting trial whose place is first: what repeats a lost trial, such as uniform, keeps its place."""
        queue = self.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        for trial in sorted(queue, key=lambda one: (one.system_attrs.get("retry_history") or [one.number])[0]):
            with suppress(UpdateFinishedTrialError):  # another process was faster
                if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    return trial._trial_id
        return None

    def _check(self, trial: FrozenTrial) -> FrozenTrial:
        original, result = self._checked.get(trial._trial_id, (None, trial))
        if original is trial:
            return result
        result = checked_trial(trial, len(self.directions))
        if trial.state.is_finished():
            self._checked[trial._trial_id] = trial, result
        return result


class StudySnapshot(optuna.Study):
    """A study as it is at one moment: attributes and trials are read once. To be read only."""

    def __init__(self, study: optuna.Study) -> None:
        vars(self).update(vars(study))
        self._attrs = study.user_attrs
        self._all = study.get_trials(deepcopy=False)

    @property
    def user_attrs(self) -> Table:
        """The attributes."""
        return dict(self._attrs)

    def get_trials(self, deepcopy: bool = True, states: Container[TrialState] | None = None) -> list[FrozenTrial]:
        """The trials in any of these states."""
        trials = [trial for trial in self._all if states is None or trial.state in states]
        return deepcopied(trials) if deepcopy else trials


def checked_trial(trial: FrozenTrial, values: int) -> FrozenTrial:
    """The trial itself if it is valid, else a copy with its valid parts; `values`: number of its study's objectives."""
    user, system = checked(trial.user_attrs, TRIAL), checked(trial.system_attrs, SYSTEM)
    # Whether a trial's parameters and values can be atp_tune's; only a KL may be 0.
    names = {name: value for name, value in trial.params.items() if name in (*METHODS, "allocation")}
    numbers = [value for name, value in trial.params.items() if name not in names]
    is_ours = (
        all(_is(WORDS, word) for word in (*names.values(), *trial.params))
        and all(_is(NUMBER, value) and isfinite(value) for value in numbers)
        and (trial.values is None or len(trial.values) == values)
        and all(value > 0 or (value == 0 and "kls" in user) for value in trial.values or [])
    )
    if is_ours and (user, system) == (trial.user_attrs, trial.system_attrs):
        return trial
    trial = copy(trial)
    trial.user_attrs, trial.system_attrs = user, system
    if is_ours:
        return trial
    trial.state, trial.values = TrialState.FAIL, None
    trial._params, trial._distributions, trial.user_attrs = {}, {}, {"failure": FOREIGN}
    return trial


def _is(kind: TypeAdapter[Any], value: Any) -> bool:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def checked(attrs: Attributes, kinds: Mapping[str, TypeAdapter[Any]]) -> Table:
    """The attributes without those of the wrong type; attributes without a type in `kinds` stay."""
    return {name: value for name, value in attrs.items() if name not in kinds or _is(kinds[name], value)}


@contextmanager
def readable(name: str, is_new: bool = False) -> Iterator[None]:
    """Turns Optuna's failures to read a study into UserError; KeyError for a missing study passes."""
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, KeyError) and (is_new or GONE in str(error)):
            raise
        raise unreadable(name, error) from None


def unreadable(name: str, error: Exception) -> UserError:
    """The error for a study with rows that Optuna cannot read."""
    reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]
    return UserError(f"study {name}: Optuna cannot read what is stored ({reason}); restore a backup")


UPSERTS: dict[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

PREFIX = "atp_tune:"
APART = TRIAL.keys() - shown(TrialRecord), STUDY.keys() - shown(StudyRecord)  # what is stored apart


def joined(user: Attributes, system: Attributes) -> tuple[Table, Table]:
    """User and system attributes as they were before details were separated; a detail replaces a user attribute."""
    details = {key.removeprefix(PREFIX): value for key, value in system.items() if key.startswith(PREFIX)}
    return {**user, **details}, {key: value for key, value in system.items() if not key.startswith(PREFIX)}


class AttributeStorage(RDBStorage):
    """A storage of Optuna's that stores several attributes in one transaction, and details apart."""

    def set_trial_user_attrs(self, trial_id: int, attributes: Attributes) -> None:
        """Stores several attributes in one transaction: each transaction waits for the disk."""
        with transaction(self.scoped_session, True) as session:
            if self.engine.name not in UPSERTS:
                for key, value in attributes.items():
                    self._set_trial_attr_without_commit(session, TrialUserAttributeModel, trial_id, key, value)
                return
            state: Any = TrialModel.find_or_raise_by_id(trial_id, session).state
            self.check_trial_is_updatable(trial_id, state)
            details = {PREFIX + key: value for key, value in attributes.items() if key in APART[0]}
            shown = {key: value for key, value in attributes.items() if key not in APART[0]}
            self._upsert(session, TrialUserAttributeModel, "trial_id", trial_id, shown)
            self._upsert(session, TrialSystemAttributeModel, "trial_id", trial_id, details)

    def set_study_system_attrs(self, study_id: int, attributes: Attributes) -> None:
        """Stores several system attributes of a study in one transaction, so that readers see all or none."""
        if self.engine.name not in UPSERTS:
            for key, value in attributes.items():
                self.set_study_system_attr(study_id, key, value)
            return
        with transaction(self.scoped_session, True) as session:
            self._upsert(session, StudySystemAttributeModel, "study_id", study_id, attributes)

    def _upsert(self, session: Any, model: Any, owner: str, id_: int, attributes: Attributes) -> None:
        if attributes:
            rows = [{owner: id_, "key": key, "value_json": json.dumps(value)} for key, value in attributes.items()]
            insert = UPSERTS[self.engine.name](model).values(rows)
            new = {"value_json": insert.excluded.value_json}
            session.execute(insert.on_conflict_do_update(index_elements=[owner, "key"], set_=new))

    def _set_trial_attr_without_commit(self, session: Any, model_cls: Any, trial_id: int, key: str, value: Any) -> None:
        if model_cls is TrialUserAttributeModel and key in APART[0]:
            model_cls, key = TrialSystemAttributeModel, PREFIX + key
        super()._set_trial_attr_without_commit(session, model_cls, trial_id, key, value)

    def _build_frozen_trial_from_trial_model(self, trial: Any) -> FrozenTrial:
        frozen = super()._build_frozen_trial_from_trial_model(trial)
        frozen.user_attrs, frozen.system_attrs = joined(frozen.user_attrs, frozen.system_attrs)
        return frozen

    def get_trial_user_attrs(self, trial_id: int) -> Table:
        """The attributes of a trial, with the details."""
        return joined(super().get_trial_user_attrs(trial_id), super().get_trial_system_attrs(trial_id))[0]

    def get_trial_system_attrs(self, trial_id: int) -> Table:
        """The system attributes, without the details."""
        return joined({}, super().get_trial_system_attrs(trial_id))[1]

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Stores an attribute; a detail apart."""
        if key.partition(":")[0] in APART[1]:  # also a row of a table, as test_nlls:12
            super().set_study_system_attr(study_id, PREFIX + key, value)
        else:
            super().set_study_user_attr(study_id, key, value)

    def get_study_user_attrs(self, study_id: int) -> Table:
        """The attributes with the details; the parts of the dashboard's figures, which may be long, are not read."""
        details = (StudySystemAttributeModel.study_id == study_id, StudySystemAttributeModel.key.startswith(PREFIX))
        with transaction(self.scoped_session) as session:
            rows = session.query(StudySystemAttributeModel).filter(*details).all()
            system = {str(row.key): json.loads(str(row.value_json)) for row in rows}
        return joined(super().get_study_user_attrs(study_id), system)[0]

    def get_study_system_attrs(self, study_id: int) -> Table:
        """The system attributes, without the details."""
        return joined({}, super().get_study_system_attrs(study_id))[1]

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies; details are user attributes."""
        studies = super().get_all_studies()
        for study in studies:
            study.user_attrs, study.system_attrs = joined(study.user_attrs, study.system_attrs)
        return studies
