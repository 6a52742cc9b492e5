"""Where trials are kept: Optuna's storage, the study in it, and the facts that its values depend on."""

import json
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from time import sleep
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from atp_tune.errors import UserError
from atp_tune.process import GRACE, HEARTBEAT, is_dead

RETRIES = 2  # of a trial whose process died
BUSY = 60  # seconds that a writer waits for SQLite's lock
PAUSES = (0.1, 0.5, 2.0)  # seconds between attempts to make the tables of a new database

Facts = Mapping[str, Any]
Database = TypeVar("Database", bound=RDBStorage)


def open_storage(address: str, create: bool) -> BaseStorage | None:
    """The storage behind a URL; None if it is a SQLite file that does not exist and may not be made."""
    if is_remote(address):
        from atp_tune.remote import connect

        return connect(address)
    return open_database(address, create, RDBStorage)


def is_remote(address: str) -> bool:
    """Whether a storage URL names a server of trials, `tune.py serve` on some machine."""
    return address.startswith(("grpc://", "grpcs://"))


def open_database(address: str, create: bool, kind: type[Database]) -> Database | None:
    """The same for a database, as the given kind of storage."""
    url = _url(address)
    if url.drivername.startswith("sqlite"):
        file = Path(url.database or "")
        if not file.exists() and not create:
            return None
        check_writable(address)
    try:
        return _patiently(address, url, kind)
    except (SQLAlchemyError, ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"storage {without_password(address)}: {reason}") from None


def without_password(address: str) -> str:
    """A storage URL as it may be shown."""
    return make_url(address).render_as_string(hide_password=True)


def _url(address: str) -> URL:
    try:
        return make_url(address)
    except (ArgumentError, ValueError):
        raise UserError("storage: not a storage URL; write sqlite:///FILE.db, for example") from None


def check_writable(address: str) -> None:
    """UserError if a SQLite file cannot be written, saying why; SQLite itself says the same for everything."""
    if is_remote(address) or not (url := _url(address)).drivername.startswith("sqlite"):
        return
    if url.database in (None, "", ":memory:"):
        raise UserError("storage: a database in memory is gone at the end; name a file, as in sqlite:///study.db")
    file = Path(url.database)
    if file.is_dir():
        raise UserError(f"storage {file}: is a folder; name a file, as in sqlite:///{file}/study.db")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
        else:  # never touch the file itself: another process may be making it right now
            TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(f"storage {file}: {error.strerror}; name another with --storage sqlite:///FILE.db") from None


def _patiently(address: str, url: URL, kind: type[Database]) -> Database:
    """Tries again where the tables were not there and others were making them at the same moment."""
    for pause in PAUSES:
        try:
            return _rdb(address, url, kind)
        except DatabaseError as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            sleep(pause)
    return _rdb(address, url, kind)


def _rdb(address: str, url: URL, kind: type[Database]) -> Database:
    wait = {"connect_args": {"timeout": BUSY}} if url.drivername.startswith("sqlite") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind(
            address,
            engine_kwargs=wait,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=queue_again,
        )


def find_study(storage: BaseStorage, name: str) -> optuna.Study | None:
    """The study of that name, if the storage has it."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return None


def create_study(storage: BaseStorage, name: str, facts: Facts) -> optuna.Study:
    """The study of that name with its facts, made if need be; UserError if it was made with others."""
    study = optuna.create_study(study_name=name, storage=storage, direction="minimize", load_if_exists=True)
    if is_new(study):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(["perplexity"])  # for the axes of Optuna's plots
        study.set_user_attr("fingerprint", dict(facts))
    check_facts(study, facts)
    return study


def is_new(study: optuna.Study) -> bool:
    """Whether a study has a name and nothing else: its process is about to write its facts, or died before it did."""
    return "fingerprint" not in study.user_attrs and not study.get_trials(deepcopy=False)


def check_facts(study: optuna.Study, facts: Facts, partly: bool = False) -> None:
    """UserError if a fact differs from what the study was made with; the keys are named.

    `partly`: only the facts of the study file are known yet, not the contents, which take the model to find out.
    """
    stored = dict(study.user_attrs.get("fingerprint", {}))
    if partly:
        stored = {key: value for key, value in stored.items() if key in facts or not _is_content(key)}
    differing = [key for key in sorted({*facts, *stored}) if facts.get(key) != stored.get(key)]
    if differing:
        shown = "; ".join(f"{key} is {_shown(facts, key)}, was {_shown(stored, key)}" for key in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"study {study.study_name}: {shown}{more}. Put it back, or start another study with --study-name NAME"
        )


def _is_content(key: str) -> bool:
    return key.endswith(".content") or key == "model.dtype"


def _shown(facts: Facts, key: str) -> str:
    return json.dumps(facts[key], ensure_ascii=False) if key in facts else "not set"


def recover(study: optuna.Study) -> list[int]:
    """Ends the RUNNING trials whose process on this host is dead and queues them again; their numbers."""
    lost = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if (is_dead(trial.user_attrs) or _is_nameless(trial)) and _fail(study, trial):
            queue_again(study, study.trials[trial.number])
            lost.append(trial.number)
    return lost


def _fail(study: optuna.Study, trial: FrozenTrial) -> bool:
    """Ends a trial whose process died; False where another process has done so."""
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "lost", "its process died")
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _is_nameless(trial: FrozenTrial) -> bool:
    """Whether a trial's process did not say for `GRACE` seconds who it is, which takes it milliseconds."""
    began = trial.datetime_start
    return (
        "process_started" not in trial.user_attrs
        and began is not None
        and (datetime.now() - began).total_seconds() > GRACE
    )


def queue_again(study: optuna.Study, trial: FrozenTrial, interrupted: bool = False) -> None:
    """Queues a lost trial with the same parameters, unless it was lost more than `RETRIES` times.

    One that was `interrupted` is queued however often that happens: it may be preempted again and again.
    """
    trial = copy(trial)
    trial.user_attrs = {}  # they tell of the process that was lost
    if interrupted:
        trial.system_attrs = {key: value for key, value in trial.system_attrs.items() if key != "retry_history"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback(RETRIES)(study, trial)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's total: it has a value, or failed by itself."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and "failure" in trial.user_attrs
    )


def counted(study: optuna.Study) -> int:
    """Number of trials that count towards the total."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def is_repetition(study: optuna.Study, number: int) -> bool:
    """Whether a queued trial is one that an earlier one has measured or measures now: two workers that begin a study
    at the same moment both queue its first trials, and two that miss a dead worker both queue its trial again.
    """
    *before, trial = study.get_trials(deepcopy=False)[: number + 1]
    queued = trial.system_attrs.get("fixed_params")
    same = (other for other in before if queued in (other.params, other.system_attrs.get("fixed_params")))
    return bool(queued) and any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same)


def is_surplus(study: optuna.Study, number: int, total: int) -> bool:
    """Whether the total is reached without this trial: two workers may both begin what they take for the last one.

    Numbers are given out one by one, so that all workers agree on which trials are too many.
    """
    before = study.get_trials(deepcopy=False)[:number]
    return sum(counts(trial) or trial.state == TrialState.RUNNING for trial in before) >= total


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that run now, here or elsewhere."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def measured(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were measured in full, the lowest perplexity first."""
    return ranked(study.get_trials(deepcopy=False))


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those of the trials that were measured in full, the lowest perplexity first."""
    done = (trial for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None)
    return sorted(
        (trial for trial in done if "stopped_after" not in trial.user_attrs), key=lambda trial: trial.value or 0.0
    )


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The trial with the lowest perplexity among those measured in full, if there is one."""
    return next(iter(measured(study)), None)
