"""Trials in real databases: a PostgreSQL server that is killed, and SQLite with many workers."""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from pathlib import Path

import optuna
import psycopg
import pytest
from crews import LONG as LASTING
from expect import parametrize, slow
from optuna.storages import get_storage
from optuna.trial import TrialState
from pgserver import URL_PASSWORD, PostgreSQL
from pgserver import running as running_server
from preloaded import add_trials, held
from processes import at_end
from tinystudy import HANGS, CommandLine, finish, hear, quiet, run, settings, start, wait_until

from atp_tune.report.publishing import study_note
from atp_tune.report.servers import Maintenance, ServedDatabase, make_view
from atp_tune.results.summary import summarise
from atp_tune.storage import database, fingerprint, opening
from atp_tune.storage.attributes import PREFIX
from atp_tune.storage.database import Database, is_away, without_password

MEASURES = (
    "SELECT 1 FROM trials JOIN trial_system_attributes USING (trial_id) "
    f"WHERE number >= %s AND state = 'RUNNING' AND key = '{PREFIX}plan'"
)


@pytest.fixture(autouse=True)
def without_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(database, "RETRY_PAUSES", (0.05, 0.2))
    with quiet():
        yield


@pytest.fixture
def frail() -> Iterator[PostgreSQL]:
    """A server of this test alone, to be killed."""
    with running_server() as server:
        yield server


def opened(address: str) -> Database:
    db = opening.open_storage(address, create=True)
    assert isinstance(db, Database)
    at_end(db.engine.dispose)
    return db


def stored(address: str, name: str = "tiny") -> optuna.Study:
    study = opening.find_study(opened(address), name)
    assert study is not None
    return study


def measured(study: optuna.Study) -> list[tuple[object, ...]]:
    return [(t.number, t.params, t.value, t.user_attrs["nlls"]) for t in study.trials if t.state == TrialState.COMPLETE]


# --- PostgreSQL


@slow
def test_a_study_is_the_same_in_postgresql(place: Path, postgres: PostgreSQL) -> None:
    here, address = run(place), postgres.new()
    there = run(place, f"storage={address}")
    assert [(t.params, t.value) for t in there.trials] == [(t.params, t.value) for t in here.trials]
    again = stored(address.replace("+psycopg", ""))
    assert measured(again) == measured(here)
    assert again.user_attrs["test_nlls"] == here.user_attrs["test_nlls"]


@slow
def test_every_command_works_on_postgresql_and_none_shows_the_password(
    place: Path, postgres: PostgreSQL, command: CommandLine
) -> None:
    address = postgres.new()
    words = ["--study", place / "tiny.toml", "--storage", address]
    said = []
    for name in ([], ["status"], ["status", "--json"], ["export"], ["report"], ["report", "--format", "md"]):
        answer = command.ok(*name, *words)
        said.append(answer.out + answer.err)
    command.ok("apply", "--config", place / "tiny.best.json", "--out", place / "sparse")
    study = stored(address)
    attributes = study.user_attrs | study._storage.get_study_system_attrs(study._study_id)
    said += [str(attributes), str([(t.user_attrs, t.system_attrs) for t in study.trials])]
    said += [path.read_text(errors="replace") for path in place.glob("*.*")]
    said.append(study_note(summarise(study), without_password(address)))
    assert "***" in said[-1]
    for text in said:
        assert URL_PASSWORD not in text


@slow
def test_a_dashboard_of_postgresql_keeps_the_password(place: Path, postgres: PostgreSQL, tmp_path: Path) -> None:
    address = postgres.new()
    run(place, f"storage={address}")
    served = opening.open_database(address, False, ServedDatabase)
    assert served is not None
    Maintenance(served, tmp_path, print).turn()
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 2
    shown = json.dumps(dict(make_view(address, get_storage(served)).get_all_studies()[0].system_attrs))
    assert "tuner:***@" in shown
    assert URL_PASSWORD not in shown


# --- a server that is away


def killed(server: PostgreSQL) -> None:
    server.kill()
    wait_until(lambda: refused(server))


def refused(server: PostgreSQL) -> bool:
    try:
        psycopg.connect(server.url("postgres").replace("+psycopg", "")).close()
    except psycopg.OperationalError:
        return True
    return False


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")  # the tests ask and tell by hand


@slow
def test_calls_wait_for_a_server_that_was_killed(frail: PostgreSQL, caplog: pytest.LogCaptureFixture) -> None:
    address = frail.new()
    study = fingerprint.create_study(opened(address), "s", {"sparsity": 0.5})
    trial = study.ask()
    killed(frail)
    with caplog.at_level(logging.WARNING, "atp_tune"), ThreadPoolExecutor() as pool:
        told = pool.submit(lambda: (trial.suggest_float("beta", 0, 1), trial.set_user_attr("a", 1)))
        wait_until(lambda: "trying again" in caplog.text)
        assert not told.done()
        frail.start()
        beta, _ = told.result(HANGS)
    first, last = [record.getMessage() for record in caplog.records if record.name.startswith("atp_tune")]
    assert first.startswith(f"storage {without_password(address)}: ")
    assert first.endswith("; trying again, nothing is lost")
    assert last == f"storage {without_password(address)}: answers again"
    killed(frail)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(study.tell, trial, 2.5)
        frail.start()
        ended.result(HANGS)
    found = stored(address, "s").trials
    assert [(t.params, t.value, t.user_attrs) for t in found] == [({"beta": beta}, 2.5, {"a": 1})]


@slow
def test_no_trial_is_taken_for_lost_soon_after_an_outage(frail: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    db = opened(frail.new())
    study = fingerprint.create_study(db, "s", {})
    trial = study.ask()
    db.record_heartbeat(trial._trial_id)
    killed(frail)
    db.record_heartbeat(trial._trial_id)  # Optuna's thread would end with an error of this
    frail.start()
    with db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = heartbeat - interval '1 hour'")
    assert db._get_stale_trial_ids(study._study_id) == []  # it has seen the outage itself
    other = opened(db.url)
    assert other._get_stale_trial_ids(study._study_id) == []  # the server says so
    monkeypatch.setattr(database, "YOUNG", "SELECT false")
    assert other._get_stale_trial_ids(study._study_id) == [trial._trial_id]


@slow
def test_a_worker_gives_up_in_one_line(
    place: Path, frail: PostgreSQL, monkeypatch: pytest.MonkeyPatch, command: CommandLine
) -> None:
    address = frail.new()
    suggest = optuna.Trial.suggest_float

    def kill(self: optuna.Trial, *arguments: object, **options: object) -> float:
        if self.number == 1:
            killed(frail)
            monkeypatch.setattr(database, "RETRY_SECONDS", 0.3)
        return suggest(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(optuna.Trial, "suggest_float", kill)
    answer = command("--study", place / "tiny.toml", "--storage", address)
    frail.start()
    assert answer.error.endswith(
        "for 0 minutes now. All earlier results are stored; the same command resumes the study"
    )


@slow
@parametrize("kind", ["postgresql", "sqlite"])
def test_attributes_are_stored_together_or_not_at_all(kind: str, postgres: PostgreSQL, tmp_path: Path) -> None:
    address = postgres.new() if kind == "postgresql" else f"sqlite:///{tmp_path}/s.db"
    study = fingerprint.create_study(opened(address), "s", {})
    trial = study.ask()
    database.set_attributes(trial, {"a": 1, "b": [1.5]})
    database.set_attributes(trial, {"b": [2.5]})
    with pytest.raises(TypeError):
        database.set_attributes(trial, {"c": 1, "d": object()})
    assert trial.user_attrs == stored(address, "s").trials[0].user_attrs == {"a": 1, "b": [2.5]}
    study.tell(trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        database.set_attributes(trial, {"a": 2})


@slow
def test_a_mistake_is_no_outage(postgres: PostgreSQL) -> None:
    db = opened(postgres.new())
    study = fingerprint.create_study(db, "s", {})
    with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
        study.set_user_attr("k" * 3000, 1)
    assert not is_away(caught.value)


@slow
def test_a_worker_that_is_gone_keeps_no_lock(postgres: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine says nothing any more, in the middle of a transaction."""
    monkeypatch.setitem(database.LIBPQ, "options", database.LIBPQ["options"].replace("=60s", "=1s"))  # type: ignore[union-attr]
    address = postgres.new()
    study = fingerprint.create_study(opened(address), "s", {})
    with opened(address).engine.connect() as gone:
        gone.exec_driver_sql("SELECT * FROM studies FOR UPDATE")
        with ThreadPoolExecutor() as pool:
            assert pool.submit(study.ask).result(HANGS).number == 0
        gone.invalidate()


@slow
def test_a_server_killed_in_the_middle_of_a_trial_costs_nothing(place: Path, frail: PostgreSQL) -> None:
    address, overrides = frail.new(), (*LASTING, "search.trials=5")
    words = ("--study", place / "tiny.toml", "--storage", address, *settings(*overrides))
    worker = start(*words, inject=partial(held, place, 1, 3))
    heard = ""
    for number in (1, 3):
        wait_for(address, number)
        killed(frail)
        (place / f"go-{number}").touch()
        heard += hear(worker, "; trying again, nothing is lost")
        frail.start()
        heard += hear(worker, "answers again")
    answer = finish(worker)
    assert answer.code == 0
    assert (heard + answer.out).count("; trying again, nothing is lost") == 2
    assert URL_PASSWORD not in heard + answer.out + answer.err
    study = stored(address)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 5
    assert measured(study) == measured(run(place, *overrides))


def wait_for(address: str, number: int) -> None:
    """Returns when trial `number` has its plan and is being measured; over one connection."""
    with psycopg.connect(address.replace("+psycopg", ""), autocommit=True) as connection:
        wait_until(lambda: measures(connection, number))


def measures(connection: "psycopg.Connection[tuple[object, ...]]", number: int) -> bool:
    try:
        return connection.execute(MEASURES, (number,)).fetchone() is not None
    except psycopg.errors.UndefinedTable:  # they are being made
        return False


# --- many workers


def together(address: str, workers: int, trials: int) -> list[str]:
    """What workers that start at the same moment say on stderr."""
    started = [start(inject=partial(add_trials, address, trials)) for _ in range(workers)]
    return [finish(process).err for process in started]


@slow
@parametrize("kind", ["postgresql", "sqlite"])
def test_eight_workers_on_an_empty_database(kind: str, postgres: PostgreSQL, tmp_path: Path) -> None:
    """They make the tables, the study and its trials at the same moments."""
    address = postgres.new() if kind == "postgresql" else f"sqlite:///{tmp_path}/many.db"
    assert together(address, 8, 10) == [""] * 8
    trials = stored(address, "s").trials
    assert [t.number for t in trials] == list(range(80))
    assert {t.state for t in trials} == {TrialState.COMPLETE}


@slow
@parametrize("kind", ["postgresql", "sqlite"])
def test_a_queued_trial_is_taken_once(kind: str, postgres: PostgreSQL, tmp_path: Path) -> None:
    address = postgres.new() if kind == "postgresql" else f"sqlite:///{tmp_path}/queue.db"
    study = fingerprint.create_study(opened(address), "s", {})
    workers = [opened(address) for _ in range(4)]
    for turn in range(20):
        study.enqueue_trial({"beta": turn / 20})
        take = methodcaller("set_trial_state_values", study.trials[-1]._trial_id, TrialState.RUNNING)
        with ThreadPoolExecutor() as pool:
            taken = list(pool.map(take, workers))
        assert sorted(taken) == [False, False, False, True]
