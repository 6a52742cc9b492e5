"""Where trials are kept: Optuna's storage, the study in it, and the facts that its values depend on."""

import json
import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from time import sleep
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from atp_tune.compat.optuna_storages import is_heartbeat_enabled
from atp_tune.errors import UserError, is_text
from atp_tune.paths import is_special
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import BOS, called_now
from atp_tune.trials import trace
from atp_tune.trials.cutoffs import MOST, SAME, CutOff, why_given_up
from atp_tune.trials.damage import check_whole, way_out
from atp_tune.trials.database import Database, PatientDatabase, engine_options, reason_of, with_driver, without_password
from atp_tune.trials.process import GRACE, HEARTBEAT, has_rebooted, is_dead
from atp_tune.trials.stored import CheckedStudy, checked_trial, readable

START = "start"  # attribute of the trials that a study begins with
INTERRUPTED = "interrupted"  # what the attribute `lost` says after Ctrl-C
SURPLUS = "not needed: other workers reached the total, or have it"
DTYPE = "model.dtype"
OBJECTIVE = "search.objective"
PERPLEXITY = ("perplexity",)  # the objective of studies that are older than the key
LACKING = {BOS: False}  # what a fact is where a study is older than it
MIX = "--allow-device-change"
PAUSES = (0.1, 0.5, 2.0)  # seconds between attempts to make the tables of a new database

Facts = Mapping[str, Any]
Kind = TypeVar("Kind", bound=Database)


def open_storage(address: str, create: bool) -> BaseStorage | None:
    """The storage behind a URL; None if it is a SQLite file that does not exist and may not be made."""
    if is_remote(address):
        from atp_tune.trials.remote import connect

        return connect(address)
    return open_database(address, create, PatientDatabase)


def is_remote(address: str) -> bool:
    """Whether a storage URL names a server of trials, `tune.py serve` on some machine."""
    return address.startswith(("grpc://", "grpcs://"))


def open_database(address: str, create: bool, kind: type[Kind]) -> Kind | None:
    """The same for a database, as the given kind of storage."""
    address = with_driver(address)
    url = _url(address)
    if url.drivername.startswith("sqlite"):
        check_is_file(url)
        file = Path(str(url.database))
        is_there = file.exists() and file.stat().st_size > 0  # an empty file is one that was about to be made
        if not is_there and not create:
            return None
        if create:
            check_writable(address)
        if is_there:
            check_whole(file)
    try:
        return _patiently(address, url, kind)
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, OSError) as error:
        way = way_out(error, address)
        reason = reason_of(error) + (f"; {way}" if way else "")
        raise UserError(f"storage {without_password(address)}: {reason}") from None


def _url(address: str) -> URL:
    try:
        if is_text(address):
            return make_url(address)
        raise ValueError(address)
    except (ArgumentError, ValueError):
        raise UserError("storage: not a storage URL; write sqlite:///FILE.db, for example") from None


def check_writable(address: str) -> None:
    """UserError if a SQLite file cannot be written, saying why; SQLite itself says the same for everything."""
    if is_remote(address) or not (url := _url(address)).drivername.startswith("sqlite"):
        return
    check_is_file(url)
    file = Path(str(url.database))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
        else:  # never touch the file itself: another process may be making it right now
            TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(f"storage {file}: {error.strerror}; name another with --storage sqlite:///FILE.db") from None


def check_is_file(url: URL) -> None:
    """UserError if a SQLite database is in memory, or would be where a folder is."""
    if url.database in (None, "", ":memory:"):
        raise UserError("storage: a database in memory is gone at the end; name a file, as in sqlite:///study.db")
    if is_special(Path(url.database)):
        raise UserError(f"storage {url.database}: is no file; name another with --storage sqlite:///FILE.db")
    if Path(url.database).is_dir():
        raise UserError(f"storage {url.database}: is a folder; name a file, as in sqlite:///{url.database}/study.db")


def _patiently(address: str, url: URL, kind: type[Kind]) -> Kind:
    """Tries again where the tables were not there and others were making them at the same moment."""
    for pause in PAUSES:
        try:
            return _rdb(address, url, kind)
        except DatabaseError as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            sleep(pause)
    return _rdb(address, url, kind)


def _rdb(address: str, url: URL, kind: type[Kind]) -> Kind:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind(
            address.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
            engine_kwargs=engine_options(url),
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=queue_lost,
        )


def artifacts_of(address: str) -> Path:
    """The folder of artifacts: NAME.artifacts beside NAME.db, or ./artifacts for a database elsewhere."""
    scheme, _, path = address.partition(":///")
    return Path(path.partition("?")[0]).with_suffix(".artifacts") if scheme.startswith("sqlite") else Path("artifacts")


def find_study(storage: BaseStorage, name: str) -> optuna.Study | None:
    """The study of that name, if the storage has it."""
    try:
        return CheckedStudy(name, storage)
    except KeyError:
        return None


def names_in(storage: BaseStorage) -> list[str]:
    """The names of all studies that a storage has, in the order in which they were made."""
    with readable("in the storage"):
        return [study.study_name for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id)]


def create_study(storage: BaseStorage, name: str, facts: Facts, any_dtype: bool = False) -> optuna.Study:
    """The study of that name with its facts, made if need be; UserError if it was made with others.

    `any_dtype`: another number format is none.
    """
    goals = goals_of(facts)
    minimise = [StudyDirection.MINIMIZE] * len(goals)
    study = optuna.create_study(study_name=name, storage=storage, directions=minimise, load_if_exists=True)
    if is_new(study):
        if len(study.directions) != len(goals):  # its process died before it wrote its facts
            raise UserError(f"study {name}: was begun with another {OBJECTIVE}; start another with --study-name NAME")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(list(goals))  # for the axes of Optuna's plots
        study.set_user_attr("fingerprint", dict(facts))
    study = CheckedStudy(name, study._storage)
    check_facts(study, facts, any_dtype=any_dtype)
    return study


def bos_of(spec: Study, study: optuna.Study | None) -> bool | None:
    """Whether windows begin with BOS: as the study file says, else as the study was begun; None if it is to be measured
    because there is none yet.
    """
    if spec.bos is not None or study is None or is_new(study):
        return spec.bos
    return has_bos(study)


def has_bos(study: optuna.Study) -> bool:
    """Whether the windows of a study, as it was begun, begin with BOS."""
    return bool(_fact(study.user_attrs.get("fingerprint", {}), BOS))


def goals_of(facts: Facts) -> tuple[str, ...]:
    """What a study of these facts minimises, in the order of its trials' values."""
    found = facts.get(OBJECTIVE)
    return tuple(found) if found in (["kl"], ["perplexity", "kl"]) else PERPLEXITY


def is_new(study: optuna.Study) -> bool:
    """Whether a study has a name and nothing else: its process is about to write its facts, or died before it did."""
    return "fingerprint" not in study.user_attrs and not study.get_trials(deepcopy=False)


def check_facts(study: optuna.Study, facts: Facts, partly: bool = False, any_dtype: bool = False) -> None:
    """UserError if a fact differs from what the study was made with; the keys are named.

    `partly`: only the facts of the study file are known yet, not the contents, which take the model to find out.
    `any_dtype`: where nothing else differs, the number format may.
    """
    differing = differences(study, facts, partly)
    is_dtype = list(_differing(study, facts, partly)) == [DTYPE]
    if differing and not (is_dtype and any_dtype):
        mix = f", or mix them in this one with {MIX}" if is_dtype else ""
        raise UserError(
            f"study {study.study_name}: {differing}. Put it back, or start another study with --study-name NAME{mix}"
        )


def differences(study: optuna.Study, facts: Facts, partly: bool = False) -> str:
    """The facts that are not as the study was made with, with both values; "" if there are none."""
    found = _differing(study, facts, partly)
    shown = "; ".join(f"{key} is {here}, was {there}" for key, (here, there) in list(found.items())[:3])
    return shown + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _differing(study: optuna.Study, facts: Facts, partly: bool) -> dict[str, tuple[str, str]]:
    stored = dict(study.user_attrs.get("fingerprint", {}))
    if partly:
        stored = {key: value for key, value in stored.items() if key in facts or not _is_content(key)}
    keys = [key for key in sorted({*facts, *stored}) if _fact(facts, key) != _fact(stored, key)]
    return {key: (_shown(facts, key), _shown(stored, key)) for key in keys}


def check_device(study: optuna.Study, here: str) -> None:
    """UserError if a device, as trials record it, is of another kind than the one on which the study began."""
    began, kind = device_of(study), device_kind(here)
    if began is not None and began != kind:
        raise UserError(
            f"study {study.study_name}: its trials ran on {began}, here is {kind}. Go on there, start another study "
            f"with --study-name NAME, or mix them in this one with {MIX}"
        )


def device_of(study: optuna.Study) -> str | None:
    """The kind of device on which a study began: that of its first measured trial."""
    known = [trial for trial in measured(study) if "device" in trial.user_attrs]
    first = min(known, key=lambda trial: trial.number, default=None)
    return device_kind(first.user_attrs["device"]) if first else None


def device_kind(name: str) -> str:
    """A device's name without the number of its threads, which decides no value."""
    return re.sub(r" \(\d+ threads\)$", "", name)


def batches_of(study: optuna.Study) -> dict[str, int]:
    """In what batches the trials of a study begin: the windows of each text that go through a block at a time.

    They are those of its first measured trial, of which earlier versions stored the calibration text's; empty where
    there is none.
    """
    attrs = study.user_attrs
    facts, stored = attrs.get("fingerprint", {}), attrs.get("batches")
    first = min(measured(study), key=lambda trial: trial.number, default=None) if stored is None else None
    return dict(stored or (batches_in(first, facts) if first else {}))


def batches_in(trial: FrozenTrial, facts: Facts) -> dict[str, int]:
    """In what batches a trial ended; `facts` are those of its study."""
    windows, most = trial.user_attrs.get("batch_windows"), facts.get("texts.calibration.windows")
    former = {"calibration": min(windows, most) if isinstance(most, int) else windows} if windows else {}
    return dict(trial.user_attrs.get("batches", former))


def _is_content(key: str) -> bool:
    return key.endswith(".content") or key in (DTYPE, BOS)


def _fact(facts: Facts, key: str) -> Any:
    return facts.get(key, LACKING.get(key))


def _shown(facts: Facts, key: str) -> str:
    if key not in {**LACKING, **facts}:
        return "not set"
    value = called_now(key, _fact(facts, key))
    return json.dumps(value, ensure_ascii=False)


def set_attributes(trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
    """Stores user attributes of a running trial: all of them or none, where the storage is a database."""
    db = getattr(trial.storage, "_backend", trial.storage)  # behind Optuna's cache
    if not isinstance(db, Database):
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        return
    db.set_trial_user_attrs(trial._trial_id, attributes)
    trial._cached_frozen_trial.user_attrs.update(attributes)  # as `set_user_attr` does


def recover(study: optuna.Study, trials: Sequence[FrozenTrial] | None = None) -> list[int]:
    """Ends the RUNNING trials that nobody runs any more, and queues them again but for those that are given up, and
    those that a process ended and did not live to queue; the numbers of all of them.

    `trials`: all of the study, if they were read just now.
    """
    db = study._storage
    silent: list[int] = db._get_stale_trial_ids(study._study_id) if is_heartbeat_enabled(db) else []  # type: ignore[attr-defined]
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    dead = [trial for trial in trials if trial.state == TrialState.RUNNING and _is_left(trial, silent)]
    for trial in dead:
        is_silent = trial._trial_id in silent and not is_dead(trial.user_attrs)
        _fail(study, trial, "gave no sign of life" if is_silent else "its process died", dead)
    trials = study.get_trials(deepcopy=False) if dead else trials
    queued = {number for trial in trials for number in _history(trial)}
    orphans = [trial for trial in trials if is_lost(trial) and trial.number not in queued]
    for trial in orphans:
        queue_again(study, trial)
    _end_doubles(study, study.get_trials(deepcopy=False) if orphans else trials)
    ended = [trials[trial.number] for trial in dead if is_given_up(trials[trial.number])]
    return sorted(trial.number for trial in (*orphans, *ended))


def _end_doubles(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Ends what waits though it is queued already: two processes that find the same lost trial both queue it."""
    for number, trial in enumerate(trials):
        if trial.state != TrialState.WAITING or not _is_double(trials, number):
            continue
        try:
            study._storage.set_trial_user_attr(trial._trial_id, "lost", SURPLUS)
            if study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):  # nobody has taken it
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            continue


def _is_left(trial: FrozenTrial, silent: Container[int]) -> bool:
    """Whether nobody runs a trial any more that is said to run."""
    return trial._trial_id in silent or is_dead(trial.user_attrs) or _is_nameless(trial)


def _fail(study: optuna.Study, trial: FrozenTrial, reason: str, dead: Sequence[FrozenTrial]) -> None:
    """Ends a trial whose process died, one of those that are found dead, unless another process has done so."""
    found = _found(study.study_name, trial, dead)
    try:
        study._storage.set_trial_user_attr(trial._trial_id, "cut_off", found.stored())
        study._storage.set_trial_user_attr(trial._trial_id, "lost", reason)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return
    trace.forget(study.study_name, trial.number, trial.user_attrs.get("pid", 0))


def _found(study: str, trial: FrozenTrial, dead: Sequence[FrozenTrial]) -> CutOff:
    """What can be seen from here of the end of a trial's process: nothing if it ran on another host."""
    attrs = trial.user_attrs
    if not is_dead(attrs):
        return CutOff()
    others = {_process(other) for other in dead if is_dead(other.user_attrs)} - {_process(trial)}
    place, crash = trace.left_of(study, trial.number, attrs["pid"])
    return CutOff(place, crash, alone=not (others or has_rebooted(attrs)))


def _process(trial: FrozenTrial) -> tuple[Any, ...]:
    return tuple(trial.user_attrs.get(key) for key in ("pid", "process_started"))


def _is_nameless(trial: FrozenTrial) -> bool:
    """Whether a trial's process did not say for `GRACE` seconds who it is, which takes it milliseconds."""
    began = trial.datetime_start
    named = "process_started" in trial.user_attrs
    return not named and began is not None and abs((datetime.now() - began).total_seconds()) > GRACE


def queue_lost(study: optuna.Study, trial: FrozenTrial) -> None:
    """What Optuna calls with a trial that it ended for want of a sign of life: queued again, unless it is given up."""
    trial = checked_trial(trial, len(study.directions))
    if is_lost(trial):
        queue_again(study, trial)


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queues a lost trial with the same parameters."""
    history, cut_offs = [*_history(trial), trial.number], [one.stored() for one in cut_offs_of(trial)]
    attributes = {**trial.system_attrs, "failed_trial": history[0], "retry_history": history, "cut_offs": cut_offs}
    attributes.pop("deaths", None)
    again = optuna.create_trial(
        state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, system_attrs=attributes
    )
    study.add_trial(again)


def _history(trial: FrozenTrial) -> list[int]:
    """Numbers of the lost trials that this one takes the place of, under Optuna's name for them."""
    history: list[int] = trial.system_attrs.get("retry_history", [])
    return history


def place_of(study: optuna.Study, trial: FrozenTrial) -> int:
    """The number that a trial would have if none had been lost; what is queued again keeps the place of the first."""
    trials = study.get_trials(deepcopy=False)
    first = next(iter(_history(trials[trial.number])), trial.number)
    return sum(not _history(other) for other in trials[:first])


def cut_offs_of(trial: FrozenTrial) -> list[CutOff]:
    """The times that a trial was cut off, the earliest first: those it takes the place of, and itself if it was.

    Of those of an earlier version no more is known than how many they were.
    """
    before = [CutOff()] * min(MOST, trial.system_attrs.get("deaths", 0))
    before += map(CutOff.read, trial.system_attrs.get("cut_offs", []))
    return [*before, CutOff.read(trial.user_attrs.get("cut_off", {}))] if _is_cut_off(trial) else before


def _is_cut_off(trial: FrozenTrial) -> bool:
    """Whether a trial has no value, for no reason of its own; a person's Ctrl-C is one."""
    known = "failure" in trial.user_attrs or trial.user_attrs.get("lost") in (INTERRUPTED, SURPLUS)
    return trial.state == TrialState.FAIL and not known


def given_up(trial: FrozenTrial) -> str:
    """Why a trial that was cut off is not run again, as in `cut off …`; empty for any other.

    Earlier versions gave up each one at the third time, and such studies are complete.
    """
    if not _is_cut_off(trial):
        return ""
    formerly = "cut_off" not in trial.user_attrs and trial.system_attrs.get("deaths", 0) >= SAME - 1
    return why_given_up(cut_offs_of(trial)) or (f"{SAME} times" if formerly else "")


def is_given_up(trial: FrozenTrial) -> bool:
    """Whether a trial was cut off and is not run again: it would end its process for ever."""
    return bool(given_up(trial))


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial was ended without a value and not by itself, and is to be run again."""
    own = "failure" in trial.user_attrs or trial.user_attrs.get("lost") == SURPLUS
    return trial.state == TrialState.FAIL and not own and not is_given_up(trial)


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's total: it has a value, failed by itself, or was given up."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ("failure" in trial.user_attrs or is_given_up(trial))
    )


def counted(study: optuna.Study) -> int:
    """Number of trials that count towards the total."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def settle(study: optuna.Study, asked: int) -> None:
    """Lowers the total of a study that was asked for so many trials to those that it has, and those that run."""
    have = counted(study) + len(running(study))
    study.set_user_attr("settled", [asked, have])
    study.set_user_attr("total", have)


def total_of(study: optuna.Study, asked: int, goes_on: bool = False) -> int:
    """The total of a study that is asked for so many trials: fewer, if it settled before, unless it `goes_on` all the
    same; more than it was asked for then go on.
    """
    limit, have = study.user_attrs.get("settled", (0, 0))
    return int(have) if asked <= limit and not goes_on else asked


def is_repetition(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether a trial is one that the study begins with, and an earlier one has measured or measures it: two workers
    that begin a study at the same moment both queue its first trials.
    """
    before, trial = trials[:number], trials[number]
    queued = trial.system_attrs.get("fixed_params")
    same = (other for other in before if queued in (other.params, other.system_attrs.get("fixed_params")))
    return START in trial.user_attrs and any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same)


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether the total is reached without this trial, or another takes the place of the same lost one: two workers may
    both begin what they take for the last one, and both queue what a third one has lost.

    Numbers are given out one by one, so that all workers agree on which trials are too many.
    """
    begun = sum(counts(trial) or trial.state == TrialState.RUNNING for trial in trials[:number])
    return begun >= total or _is_double(trials, number)


def _is_double(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether an earlier trial takes the place of the same lost one."""
    history = _history(trials[number])
    return bool(history) and any(history == _history(trial) for trial in trials[:number])


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that run now, here or elsewhere."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def measured(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were measured in full, the best first."""
    return ranked(study.get_trials(deepcopy=False))


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those of the trials that were measured in full, the lowest value first; of two values the first counts."""
    done = (trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values is not None)
    return sorted((trial for trial in done if "stopped_after" not in trial.user_attrs), key=values_of)


def values_of(trial: FrozenTrial) -> list[float]:
    """A trial's values, none where it has none: Optuna's own property fails where there are two."""
    return trial.values or []


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study of several objectives that no other beats in one value without losing in another (the
    Pareto front), the lowest perplexity first; none of a study that has one.
    """
    if len(study.directions) == 1:
        return []
    with readable(study.study_name):
        return [trial for trial in ranked(study.best_trials) if "repeats" not in trial.user_attrs]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best trial among those measured in full, if there is one: the lowest value, of two values the first."""
    return next(iter(measured(study)), None)
