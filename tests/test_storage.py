import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import parametrize, refusal, slow
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy.exc import IntegrityError, OperationalError

from atp_tune.results.formatting import trial_remark, why_lost
from atp_tune.storage import database, opening, progress
from atp_tune.storage.fingerprint import check_facts, create_study
from atp_tune.storage.opening import check_writable, find_study, open_storage
from atp_tune.storage.progress import (
    START,
    counted,
    identity,
    is_repetition,
    is_surplus,
    queue_again,
    requeue_lost,
    running,
)
from atp_tune.utils.cache import cache_dir

FACTS = {"sparsity": 0.5, "prune.pruners": ["wanda"], "model.content": "ab", "model.dtype": "float32"}
DEAD = {**identity(), "process_started": 0.0}


pytestmark = pytest.mark.usefixtures("without_warnings")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def db(file: Path) -> RDBStorage:
    made = open_storage(f"sqlite:///{file}", create=True)
    assert made
    return made


@pytest.fixture
def study(db: RDBStorage) -> optuna.Study:
    return create_study(db, "s", FACTS)


def add(study: optuna.Study, value: float | None = None, state: TrialState | None = None, **attributes: Any) -> int:
    """A trial of one parameter; without value and state it runs."""
    study.enqueue_trial({"beta": len(study.trials) / 100})
    trial = study.ask()
    trial.suggest_float("beta", 0, 1)
    for name, attribute in attributes.items():
        trial.set_user_attr(name, attribute)
    if value is not None or state is not None:
        study.tell(trial, value, state)
    return trial.number


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


# --- opening


def test_a_file_that_is_not_there_is_made_only_if_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "new" / "study.db"
    assert open_storage(f"sqlite:///{file}", create=False) is None
    assert not file.parent.exists()
    assert open_storage(f"sqlite:///{file}", create=True)
    assert file.exists()
    assert open_storage(f"sqlite:///{file}", create=False)


def test_looking_does_not_touch_what_another_process_makes_meanwhile(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exists(path: Path) -> bool:
        found = path in before
        if path == file and not found:  # right after the look, another process makes its database
            before.append(file)
            file.write_text("precious")
        return found

    before: list[Path] = []
    monkeypatch.setattr(Path, "exists", exists)
    check_writable(f"sqlite:///{file}")
    assert file.read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_file_without_the_right_to_write(file: Path) -> None:
    file.write_bytes(b"")
    file.chmod(0o444)
    assert refusal(open_storage, f"sqlite:///{file}", True) == (
        f"storage {file}: Permission denied; name another with --storage sqlite:///FILE.db"
    )


@parametrize(
    ("address", "reason"),
    [
        ("mysql://me:secret@localhost/x", "No module named 'MySQLdb'"),
        ("nosuch://me:secret@localhost/x", "Can't load plugin: sqlalchemy.dialects:nosuch"),
    ],
)
def test_a_database_that_this_python_cannot_reach_without_its_password(address: str, reason: str) -> None:
    assert refusal(open_storage, address, True).startswith(f"storage {address.replace('secret', '***')}: {reason}")


def test_tables_that_another_process_makes_at_the_same_moment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rdb(*arguments: Any, **options: Any) -> RDBStorage:
        tries.append(arguments)
        if len(tries) < 3:
            raise errors[len(tries) - 1]
        return made(*arguments, **options)

    made, tries = opening.Database, []  # type: ignore[var-annotated]
    errors = [
        OperationalError("CREATE TABLE", None, Exception("table studies already exists")),
        IntegrityError("INSERT", None, Exception("UNIQUE constraint failed")),
    ]
    monkeypatch.setattr(opening, "Database", rdb)
    monkeypatch.setattr(opening, "PAUSES", (0.0, 0.0))
    assert open_storage(f"sqlite:///{file}", create=True)
    assert len(tries) == 3
    tries.clear()
    errors[0] = OperationalError("SELECT", None, Exception("no such table"))
    assert "no such table" in refusal(open_storage, f"sqlite:///{file}", True)
    assert len(tries) == 1


# --- the study in it


def test_a_study_keeps_the_facts_it_was_made_with(db: RDBStorage, study: optuna.Study) -> None:
    assert study.user_attrs == {"fingerprint": FACTS}
    assert study.direction.name == "MINIMIZE"
    found = find_study(db, "s")
    assert found
    assert found.user_attrs == study.user_attrs
    assert create_study(db, "s", FACTS).user_attrs == study.user_attrs
    assert find_study(db, "other") is None


def differs(study: optuna.Study, facts: dict[str, Any]) -> str:
    text = refusal(check_facts, study, facts, False).removesuffix(
        ", or mix them in this one with --allow-device-change"
    )
    end = ". Put it back, or start another study with --study-name NAME"
    assert text.startswith("study s: ")
    assert text.endswith(end)
    return text.removeprefix("study s: ").removesuffix(end)


@parametrize(
    ("changes", "said"),
    [
        ({"sparsity": 0.6}, "sparsity is 0.6, was 0.5"),
        ({"prune.pruners": ["wanda", "magnitude"]}, 'prune.pruners is ["wanda", "magnitude"], was ["wanda"]'),
        ({"model.content": "cd"}, 'model.content is "cd", was "ab"'),
        ({"model.dtype": "bfloat16"}, 'model.dtype is "bfloat16", was "float32"'),
        ({"texts.validation.config": "ü"}, 'texts.validation.config is "ü", was not set'),
        ({"a": 1, "b": 2, "c": True, "d": 4, "e": 5},
         "a is 1, was not set; b is 2, was not set; c is true, was not set; and 2 more"),
    ],
)  # fmt: skip
def test_a_fact_that_differs_is_named(study: optuna.Study, changes: dict[str, Any], said: str) -> None:
    assert differs(study, {**FACTS, **changes}) == said


# --- trials that are lost, that run, that count


@slow
def test_a_trial_whose_process_is_dead_is_queued_again(study: optuna.Study) -> None:
    number = add(study, **DEAD, realised=0.5)
    add(study, **identity())
    add(study, host="elsewhere", pid=1, process_started=0.0)
    add(study)
    assert requeue_lost(study) == [number]
    assert states(study) == ["FAIL", "RUNNING", "RUNNING", "RUNNING", "WAITING"]
    lost, again = study.trials[0], study.trials[4]
    assert lost.user_attrs == {**DEAD, "realised": 0.5, "lost": "its process died", "cut_off": {"alone": True}}
    assert again.params == lost.params
    assert again.user_attrs == {}
    assert requeue_lost(study) == []
    assert study.ask().suggest_float("beta", 0, 1) == lost.params["beta"]


def test_a_trial_that_never_said_who_runs_it_is_lost_after_a_while(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(study)
    assert requeue_lost(study) == []
    monkeypatch.setattr(progress, "GRACE", -1)
    add(study, **identity())
    assert requeue_lost(study) == [0]
    assert states(study) == ["FAIL", "RUNNING", "WAITING"]


def die(study: optuna.Study, left: bytes = b"", **identity: Any) -> int:
    """A trial, one from the queue if there is any, that a process of this host runs, and leaves a trace of; it is gone.

    Its number.
    """
    if not study.get_trials(states=(TrialState.WAITING,)):
        study.enqueue_trial({"beta": len(study.trials) / 100})
    trial = study.ask()
    trial.suggest_float("beta", 0, 1)
    for name, value in {**DEAD, **identity}.items():
        trial.set_user_attr(name, value)
    if left:
        progress._file(study.study_name, trial.number, identity.get("pid", DEAD["pid"])).write_bytes(left)
    return trial.number


PRUNE = b"after prune 12 of 30".ljust(progress.WIDTH)


def test_a_trial_that_dies_at_the_same_place_is_queued_again_twice(study: optuna.Study) -> None:
    for number in range(3):
        assert die(study, PRUNE) == number
        assert requeue_lost(study) == [number]
        assert not list(cache_dir("running").iterdir())
    assert states(study) == ["FAIL"] * 3
    assert counted(study) == 1
    assert requeue_lost(study) == []
    died = "its process died after prune 12 of 30"
    given_up = f"{died}, cut off 3 times in a row after prune 12 of 30: given up"
    assert [trial_remark(trial) for trial in study.trials] == [died, died, given_up]
    assert [why_lost(trial) for trial in study.trials] == [
        "trial 0 was lost with its process: it is run again",
        "trial 1 was lost with its process: it is run again, cut off 2 times by now",
        "trial 2 was lost with its process: cut off 3 times in a row after prune 12 of 30, it is given up",
    ]
    assert {trial.params["beta"] for trial in study.trials} == {0.0}


@slow
def test_a_trial_that_crashes_is_given_up_wherever_it_does(study: optuna.Study) -> None:
    for number in range(3):
        place = f"after prune {number} of 30".encode().ljust(progress.WIDTH)
        die(study, place + b"Fatal Python error: Aborted\n\nCurrent thread 0x00007f5c8ade9990:\n")
        requeue_lost(study)
    assert trial_remark(study.trials[2]) == (
        "its process died after prune 2 of 30 (Aborted), cut off 3 times by itself (Aborted): given up"
    )


@slow
def test_what_dies_with_others_or_with_its_machine_is_run_again(study: optuna.Study) -> None:
    """Two processes of this host at once, one before it was booted again, and ones of another host."""
    booted = DEAD["booted"] - 3600
    for _ in range(3):
        dead = [die(study, PRUNE, pid=2**22), die(study, PRUNE, pid=2**22 + 1)]
        assert requeue_lost(study) == dead
        dead = [die(study, PRUNE, booted=booted), study.ask().number]
        assert requeue_lost(study) == dead[:1]
        study.tell(dead[1], state=TrialState.COMPLETE, values=1.0)
    lost = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["cut_off"] for trial in lost] == [{"place": "after prune 12 of 30", "alone": False}] * 9
    assert not any(progress.given_up(trial) for trial in lost)


@slow
def test_what_a_process_ended_and_did_not_live_to_queue_is_queued(study: optuna.Study) -> None:
    """Between a trial's end and its place in the queue lies a moment in which a process can be killed."""
    add(study, state=TrialState.FAIL, lost="its process died")
    add(study, state=TrialState.FAIL)  # an error that nobody expected
    add(study, state=TrialState.FAIL, failure="out of memory")
    add(study, state=TrialState.FAIL, lost=progress.SURPLUS)
    assert requeue_lost(study) == [0, 1]
    assert requeue_lost(study) == []
    assert states(study)[4:] == ["WAITING"] * 2


@slow
def test_of_two_that_take_the_place_of_one_the_second_is_too_many(study: optuna.Study) -> None:
    add(study, state=TrialState.FAIL, lost="its process died")
    for _ in range(2):  # two processes at the same moment
        queue_again(study, study.trials[0])
    for _ in range(2):
        study.ask()
    assert [is_surplus(study.trials, number, 9) for number in range(3)] == [False, False, True]


def test_a_lost_trial_keeps_its_place_in_the_queue(study: optuna.Study) -> None:
    """After Ctrl-C in the first trials uniform, with which the others are compared, was measured last."""
    for beta in (0.0, 0.1, 0.2, 0.3):
        study.enqueue_trial({"beta": beta})
    for number in (study.ask().number, study.ask().number):  # of two workers
        progress.end_interrupted(study, number)
    assert [study.ask().suggest_float("beta", 0, 1) for _ in range(4)] == [0.0, 0.1, 0.2, 0.3]


def test_what_is_queued_twice_does_not_wait_for_ever(study: optuna.Study) -> None:
    """Others may reach the total with the first of the two, and then nobody takes the second."""
    add(study, state=TrialState.FAIL, lost="its process died")
    for _ in range(2):
        queue_again(study, study.trials[0])
    assert requeue_lost(study) == []
    assert states(study)[1:] == ["WAITING", "FAIL"]
    assert study.trials[2].user_attrs["lost"] == progress.SURPLUS
    assert requeue_lost(study) == []  # and it is not queued again
    study.ask()
    queue_again(study, study.trials[0])  # a third one is late: the first runs
    requeue_lost(study)
    assert states(study)[1:] == ["RUNNING", "FAIL", "FAIL"]


@parametrize("last", [0, 1, 2, 3])
def test_a_process_killed_while_it_says_who_it_is_leaves_a_trial_that_is_found(
    study: optuna.Study, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(study, **dict(list(DEAD.items())[: last + 1]))
    assert requeue_lost(study) == ([0] if last >= 2 else [])
    monkeypatch.setattr(progress, "GRACE", -1)
    assert requeue_lost(study) == ([] if last >= 2 else [0])


def test_a_clock_that_was_set_back_does_not_hide_a_trial_without_a_name(study: optuna.Study, file: Path) -> None:
    add(study)
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE trials SET datetime_start = datetime('now', 'localtime', '+1 hour')")
    assert requeue_lost(study) == [0]


def beat(file: Path, when: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', ?)", (when,))


@slow
def test_signs_of_life(study: optuna.Study, db: RDBStorage, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process on this host that lives and is silent keeps its trial; one elsewhere does not."""
    elsewhere = {"host": "elsewhere", "pid": 1, "process_started": 0.0}
    for attributes in (identity(), elsewhere):
        number = add(study, **attributes)
        db.record_heartbeat(study.trials[number]._trial_id)
    assert requeue_lost(study) == []
    beat(file, "+1 hour")  # the clock was set back since
    now = database.monotonic()
    monkeypatch.setattr(database, "monotonic", lambda: now)
    assert requeue_lost(study) == []
    monkeypatch.setattr(database, "monotonic", lambda: now + 61)
    assert requeue_lost(study) == [1]
    number = add(study, **elsewhere)
    db.record_heartbeat(study.trials[number]._trial_id)
    beat(file, "-61 seconds")
    assert requeue_lost(study) == [number]
    assert study.trials[number].user_attrs["lost"] == "sent no heartbeat"
    assert study.trials[0].state == TrialState.RUNNING


@slow
def test_what_optuna_itself_finds_silent_is_given_up_too(
    study: optuna.Study, db: RDBStorage, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each trial Optuna ends those without a heartbeat: they come again, but not for ever."""
    monkeypatch.setattr(progress, "MOST", 4)
    add(study, **{"host": "elsewhere", "pid": 1, "process_started": 0.0})
    for number in range(4):
        db.record_heartbeat(study.trials[number]._trial_id)
        beat(file, "-61 seconds")
        optuna.storages.fail_stale_trials(study)
        if number < 3:
            study.ask()
    assert states(study) == ["FAIL"] * 4
    assert counted(study) == 1
    assert requeue_lost(study) == []
    assert trial_remark(study.trials[3]) == "sent no heartbeat, cut off 4 times: given up"


@slow
def test_a_silent_trial_is_left_to_its_host_while_that_lives(study: optuna.Study, db: RDBStorage, file: Path) -> None:
    """Another process there sees that it is gone, and what it left, which nobody else can."""
    for pid in (1, 2):
        number = add(study, host="elsewhere", pid=pid, process_started=0.0)
        db.record_heartbeat(study.trials[number]._trial_id)
        if pid == 1:
            beat(file, "-61 seconds")
    assert requeue_lost(study) == []
    beat(file, "-61 seconds")
    assert requeue_lost(study) == [0, 1]
    assert [trial.user_attrs["cut_off"] for trial in study.trials[:2]] == [{"alone": False}] * 2


def test_a_silent_trial_that_two_workers_find_is_queued_once(
    study: optuna.Study, db: RDBStorage, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(study, host="elsewhere", pid=1, process_started=0.0)
    db.record_heartbeat(study.trials[0]._trial_id)
    beat(file, "-61 seconds")
    other, find = find_study(db, "s"), db._get_stale_trial_ids

    def find_together(study_id: int) -> list[int]:
        found = find(study_id)
        monkeypatch.setattr(db, "_get_stale_trial_ids", find)
        optuna.storages.fail_stale_trials(other)
        return found

    monkeypatch.setattr(db, "_get_stale_trial_ids", find_together)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == ["FAIL", "WAITING"]


@slow
def test_what_counts(study: optuna.Study) -> None:
    add(study, 1.0)
    add(study, 2.0, stopped_after=4)
    add(study, state=TrialState.FAIL, failure="out of memory")
    assert counted(study) == 3
    add(study, state=TrialState.FAIL, lost="interrupted")
    add(study, state=TrialState.FAIL)
    assert [trial.number for trial in running(study)] == []
    number = add(study)
    study.enqueue_trial({"beta": 0.5})
    assert counted(study) == 3
    assert [trial.number for trial in running(study)] == [number]


def test_all_workers_agree_on_which_trials_are_too_many() -> None:
    """Of a total of 3: lost trials do not count, running ones do, and so only the last one here is surplus."""
    study = optuna.create_study()
    failed, lost = {"failure": "inf"}, {"lost": "its process died"}
    states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL, TrialState.RUNNING, TrialState.RUNNING)
    for state, attrs in zip(states, ({}, lost, failed, {}, {}), strict=True):
        value = 1.0 if state == TrialState.COMPLETE else None
        study.add_trial(optuna.create_trial(state=state, value=value, user_attrs=attrs))
    assert [is_surplus(study.trials, number, 3) for number in range(5)] == [False, False, False, False, True]


def test_what_is_queued_twice_is_measured_once() -> None:
    study = optuna.create_study()
    for beta in (0.0, 0.1, 0.0, 0.1, 0.2):
        study.enqueue_trial({"beta": beta}, {START: True})
    study.ask().suggest_float("beta", 0, 1)  # runs
    study.tell(study.ask(), state=TrialState.FAIL)  # lost before it drew anything
    assert [is_repetition(study.trials, number) for number in range(5)] == [False, False, True, False, False]
    study.tell(0, 1.0)
    assert is_repetition(study.trials, 2)
    assert not is_repetition(study.trials, study.ask().number + 2)
    study.enqueue_trial({"beta": 0.0})  # by a person
    assert not is_repetition(study.trials, 5)
