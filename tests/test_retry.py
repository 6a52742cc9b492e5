"""Calls that are made again since their answer was lost, over SQLite, PostgreSQL and a server."""

import inspect
import os
import pickle
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from expect import parametrize, slow
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from tinystudy import HANGS

from atp_tune.report.servers import ServedDatabase, proxy
from atp_tune.storage import database
from atp_tune.storage.database import CALLS
from atp_tune.storage.opening import open_database, open_storage
from atp_tune.storage.remote import connect
from atp_tune.utils.system import interruptible

pytestmark = pytest.mark.usefixtures("quiet_optuna")
END = (TrialState.COMPLETE, [1.5])


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RETRY_PAUSES", (0.001,))


@pytest.fixture(params=["sqlite", "postgresql", "server"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    """A storage as a worker has it."""
    file = f"sqlite:///{tmp_path}/study.db"
    if request.param != "server":
        made = open_storage(file if request.param == "sqlite" else request.getfixturevalue("postgres").new(), True)
        assert made
        yield made
        return
    served = open_database(file, True, ServedDatabase)
    assert served
    with proxy(get_storage(served), "127.0.0.1", 0) as port, closing(connect(f"grpc://127.0.0.1:{port}")) as remote:
        yield remote


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Loses the answer of the database to the next end of a trial; something may happen `meanwhile`, before it."""
    tell = RDBStorage.set_trial_state_values

    def lose_next(meanwhile: Callable[..., Any] = tell) -> None:
        def once(self: RDBStorage, *arguments: Any) -> bool:
            monkeypatch.setattr(RDBStorage, "set_trial_state_values", tell)
            meanwhile(self, *arguments)
            raise StorageInternalError from OperationalError("", {}, sqlite3.OperationalError("database is locked"))

        monkeypatch.setattr(RDBStorage, "set_trial_state_values", once)

    return lose_next


def begun(storage: BaseStorage) -> int:
    return storage.create_new_trial(storage.create_new_study([StudyDirection.MINIMIZE]))


@slow
def test_a_call_that_is_made_again_finds_what_it_has_told(storage: BaseStorage, lose: Callable[..., None]) -> None:
    trial = begun(storage)
    lose()
    assert storage.set_trial_state_values(trial, *END)
    assert storage.get_trial(trial).value == 1.5


def test_a_trial_is_told_once(storage: BaseStorage, lose: Callable[..., None]) -> None:
    trial = begun(storage)
    lose()
    storage.set_trial_state_values(trial, *END)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, *END)


def test_a_trial_that_another_ended_meanwhile(storage: BaseStorage, lose: Callable[..., None]) -> None:
    tell = RDBStorage.set_trial_state_values
    trial = begun(storage)
    lose(lambda database, trial, *_: tell(database, trial, TrialState.FAIL))
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_state_values(trial, *END)
    assert storage.get_trial(trial).state == TrialState.FAIL


@slow
def test_a_pickled_storage_is_as_patient(storage: BaseStorage, lose: Callable[..., None]) -> None:
    trial = begun(storage)
    restored = pickle.loads(pickle.dumps(storage))
    lose()
    assert restored.set_trial_state_values(trial, *END)
    assert storage.get_trial(trial).value == 1.5


def test_every_transaction_of_optuna_s_is_made_again() -> None:
    own = {name: inspect.getsource(made) for name, made in vars(RDBStorage).items() if inspect.isfunction(made)}
    transactions = {name for name, source in own.items() if "with _create_scoped_session(" in source}
    assert transactions - set(CALLS) == {"set_trial_state_values", "record_heartbeat", "delete_study"}


def test_an_interruption_waits_for_the_answer_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised within a request, it would leave a channel behind whose next request may never be answered."""
    done, store = list[str](), RDBStorage.set_trial_user_attr

    def interrupted(self: RDBStorage, trial_id: int, **given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        sleep(0.2)  # the main thread has taken the signal, if it does so while it waits
        store(self, trial_id, **given)
        done.append("stored")

    served = open_database(f"sqlite:///{tmp_path}/study.db", True, ServedDatabase)
    assert served
    with proxy(get_storage(served), "127.0.0.1", 0) as port, closing(connect(f"grpc://127.0.0.1:{port}")) as remote:
        trial = remote.create_new_trial(remote.create_new_study([StudyDirection.MINIMIZE], "s"))
        monkeypatch.setattr(RDBStorage, "set_trial_user_attr", interrupted)
        with interruptible(signal.SIGINT), pytest.raises(KeyboardInterrupt):
            remote.set_trial_user_attr(trial, "a", 1)
            done.append("answered")
            sleep(HANGS)
        monkeypatch.undo()
        remote.set_trial_user_attr(trial, "b", 2)
        assert remote.get_trial(trial).user_attrs == {"a": 1, "b": 2}
    assert done == ["stored", "answered"]


class Finalised:
    """Is interrupted while it is deleted."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def deleted() -> Iterator[None]:
    """Is interrupted while it is deleted, without a name that says so."""
    try:
        yield
    finally:
        signal.raise_signal(signal.SIGINT)


@parametrize("kind", ["finaliser", "generator"])
def test_an_interruption_that_python_swallows_comes_again(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    once: list[str] = []

    def first() -> None:
        once.append("told")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command line does: a second Ctrl-C ends the process

    with interruptible(signal.SIGINT, once=first), pytest.raises(KeyboardInterrupt):
        if kind == "finaliser":
            Finalised()
        else:
            next(deleted())
        sleep(HANGS)
    assert once == (["told"] if kind == "finaliser" else ["told"] * 2)
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == (hook, handler)
    assert capsys.readouterr().err == ""
