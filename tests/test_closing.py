"""Connections to databases are closed by whoever opened them, not by chance when Python finds them lying about."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from expect import parametrize, slow
from pgserver import PostgreSQL
from sqlalchemy import event
from sqlalchemy.pool import Pool
from synthetic import made_up, new_study
from tinystudy import CommandLine, quiet, run, wait_until

from atp_tune.api.merging import merge
from atp_tune.storage.opening import find_study, open_storage


@pytest.fixture
def connections() -> Iterator[list[Any]]:
    """Those that were opened and have not been closed; what Python clears away itself is not closed."""
    gc.collect()  # what earlier tests left is closed before, not while it is counted
    opened: list[Any] = []

    def connect(connection: Any, _: Any) -> None:
        opened.append(connection)

    def close(connection: Any, _: Any) -> None:
        opened.remove(connection)

    event.listen(Pool, "connect", connect)
    event.listen(Pool, "close", close)
    yield opened
    event.remove(Pool, "connect", connect)
    event.remove(Pool, "close", close)
    for connection in opened:
        connection.close()


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is let go in these tests is gone at once, or never."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
def test_a_storage_goes_with_the_last_study_of_it(tmp_path: Path, connections: list[Any]) -> None:
    with quiet():
        study: Any = new_study(tmp_path / "a.db")
        study.add_trial(made_up(0.0))
        checked: Any = find_study(study._storage, study.study_name)
    assert connections
    del study
    assert checked.trials and connections
    del checked
    assert not connections


COMMANDS = ("", "status", "status --json", "report --format md", "export", "plan", "studies")


@slow
@parametrize("words", COMMANDS)
def test_commands_close_theirs(
    words: str, done: Path, command: CommandLine, connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    study = [] if words == "studies" else ["--study", "tiny.toml"]
    command.ok(*words.split(), *study)
    gc.collect()
    assert not connections


@slow
def test_merge_closes_all_but_the_new_one(tmp_path: Path, connections: list[Any]) -> None:
    with quiet():
        for name in ("a", "b"):
            new_study(tmp_path / f"{name}.db").add_trial(made_up(0.0 if name == "a" else 0.01))
        made: Any = merge([str(tmp_path / "a.db"), str(tmp_path / "b.db")], tmp_path / "c.db", None)
    gc.collect()
    files = {row[2] for connection in connections for row in connection.execute("PRAGMA database_list")}
    assert files == {str(tmp_path / "c.db")}
    del made
    gc.collect()
    assert not connections


@slow
def test_a_server_counts_no_more_than_one_connection_for_a_study(place: Path, postgres: PostgreSQL) -> None:
    address = postgres.new()
    study: Any = run(place, f"storage={address}")
    asking: Any = open_storage(address, create=False)
    with asking.engine.connect() as connection:
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        others = connection.exec_driver_sql(count).scalar() - 1
        assert others >= 1
        del study
        gc.collect()

        def left() -> bool:
            """The server takes a moment to end the process of a connection that was closed."""
            connection.rollback()
            return connection.exec_driver_sql(count).scalar() == 1

        wait_until(left)
