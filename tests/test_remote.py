"""Workers and a server in this process, over real gRPC and a real SQLite file."""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import optuna
import pytest
from expect import refused, slow
from optuna.storages import get_storage
from optuna.trial import TrialState
from tinystudy import HANGS, run, wait_until

from atp_tune.errors import UserError
from atp_tune.events import Event, Message, TrialStarted
from atp_tune.report.servers import ServedDatabase, proxy
from atp_tune.storage import database, fingerprint, opening, progress, remote
from atp_tune.storage.progress import SAME, identity
from atp_tune.storage.remote import connect


class Server:
    """A server that can be stopped and started again on the same port."""

    def __init__(self, database: Path) -> None:
        served = opening.open_database(f"sqlite:///{database}", True, ServedDatabase)
        assert served is not None
        self.database = served
        self.port = 0
        self._running = ExitStack()
        self.start()

    @property
    def address(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.port = self._running.enter_context(proxy(get_storage(self.database), "127.0.0.1", self.port))

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "served.db")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST", 1)
    monkeypatch.setattr(database, "RETRY_PAUSES", (0.05,))


def started(server: Server) -> tuple[optuna.Study, optuna.Trial]:
    study = optuna.create_study(study_name="s", storage=connect(server.address))
    return study, study.ask()


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # the tests ask and tell by hand


@slow
def test_requests_wait_for_a_server_that_comes_back(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.startswith("atp_tune")]

    study, trial = started(server)
    server.stop()
    with caplog.at_level(logging.WARNING, "atp_tune"), ThreadPoolExecutor() as pool:
        sent = pool.submit(study.tell, trial, 2.5)
        wait_until(said)
        assert not sent.done()
        server.start()
        sent.result(HANGS)
    assert said() == [
        f"{server.address} does not answer; trying again, nothing is lost",
        f"{server.address} answers again",
    ]
    stored = opening.find_study(server.database, "s")
    assert stored is not None
    assert stored.trials[0].value == 2.5


@slow
def test_a_worker_gives_up_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "RETRY_SECONDS", 0.3)
    study, trial = started(server)
    server.stop()
    with refused(r"does not answer, for 0 minutes now\. All earlier results are stored"):
        study.tell(trial, 2.5)
    server.start()


@slow
def test_parameters_keep_their_order(server: Server) -> None:
    """Whether a worker draws them, or stores a trial that has them."""
    study, trial = started(server)
    names = list("hgfedcba")
    for name in names:
        trial.suggest_float(name, 0, 1)
    study.add_trial(study.trials[0])
    stored = opening.find_study(server.database, "s")
    assert stored is not None
    there = study._storage
    for found in [*study.trials, *stored.trials, there.get_trial(trial._trial_id)]:
        assert list(found.params) == list(found.distributions) == names
    assert [found.system_attrs for found in (*study.trials, *stored.trials)] == [{}] * 4


@pytest.mark.filterwarnings("ignore:GrpcStorageProxy is experimental")
def test_a_plain_client_of_optuna_reads_and_writes_too(server: Server) -> None:
    _, trial = started(server)
    trial.suggest_float("b", 0, 1)
    trial.suggest_float("a", 0, 1)
    client = optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=server.port)
    plain = optuna.load_study(study_name="s", storage=client)
    plain.add_trial(plain.trials[0])
    assert [found.params for found in plain.trials] == [trial.params] * 2
    stored = opening.find_study(server.database, "s")
    assert stored is not None
    assert [found.system_attrs for found in stored.trials] == [{}] * 2
    assert list(stored.trials[1].params) == ["b", "a"]


def test_a_server_says_what_is_wrong_with_its_database(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What may pass is waited for; what will not ends the worker in one line."""
    said = ["storage x.db: database or disk is full; make room", "storage x.db: is damaged; restore a backup"]
    left = [*said]

    def fails(*_: object) -> None:
        raise UserError(left.pop(0))

    study, _ = started(server)
    monkeypatch.setattr(server.database, "set_study_user_attr", fails)
    with caplog.at_level(logging.WARNING, "atp_tune"), pytest.raises(UserError) as caught:
        study.set_user_attr("a", 1)
    assert str(caught.value) == f"{server.address}: its database: {said[1]}"
    assert f"says of its database: {said[0]}; trying again, nothing is lost" in caplog.text


@slow
def test_what_a_process_of_this_host_left_is_known_to_the_server(server: Server) -> None:
    study = fingerprint.create_study(connect(server.address), "s", {"sparsity": 0.5})
    study.enqueue_trial({})
    for number in range(SAME):
        trial = study.ask()
        for name, value in {**identity(), "process_started": 0.0}.items():
            trial.set_user_attr(name, value)
        progress._file("s", number, os.getpid()).write_bytes(b"after prune 1 of 2")
        assert progress.requeue_lost(study) == [number]
    there = opening.find_study(server.database, "s")
    assert there is not None
    assert [progress.given_up(trial) for trial in there.trials] == ["", "", "3 times in a row after prune 1 of 2"]


@slow
def test_a_trial_that_was_taken_for_lost_is_run_again(place: Path, server: Server) -> None:
    """As after a network that was away for longer than the server waits for a heartbeat."""
    notes: list[str] = []

    def watch(event: Event) -> None:
        match event:
            case Message(text):
                notes.append(text)
            case TrialStarted("trial 1", _):
                study = opening.find_study(server.database, "tiny")
                assert study is not None
                study.tell(1, state=TrialState.FAIL)
                progress.queue_again(study, study.trials[1])

    study = run(place, f"storage={server.address}", watch=watch)
    assert "trial 1 sent no heartbeat for 60 s: it is run again" in notes
    assert progress.counted(study) == 3
    assert [t.state for t in study.trials].count(TrialState.FAIL) == 1
    again = study.trials[2]
    assert again.params == study.trials[1].params
    assert again.state == TrialState.COMPLETE
