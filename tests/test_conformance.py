"""Optuna's own tests of storages, run on each of ours."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.storages import BaseStorage, get_storage
from optuna.testing.pytest_storages import StorageTestCase
from pgserver import PostgreSQL

from atp_tune.serving.servers import ServedDatabase, proxy
from atp_tune.trials.database import Database, PatientDatabase
from atp_tune.trials.remote import connect
from atp_tune.trials.storage import open_database


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "empty.db"
    opened(f"sqlite:///{path}", Database).engine.dispose()
    return path


def opened(address, kind):
    db = open_database(address, True, kind)
    assert db is not None
    return db


@pytest.fixture
def file(empty: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(empty, tmp_path / 'study.db')}"


class TestSQLite(StorageTestCase):
    @pytest.fixture
    def storage(self, file) -> Iterator[BaseStorage]:
        db = opened(file, PatientDatabase)
        yield db
        db.engine.dispose()


class TestCached(StorageTestCase):
    @pytest.fixture
    def storage(self, file) -> Iterator[BaseStorage]:
        db = opened(file, PatientDatabase)
        yield get_storage(db)
        db.engine.dispose()


class TestServed(StorageTestCase):
    @pytest.fixture
    def storage(self, file) -> Iterator[BaseStorage]:
        db = opened(file, ServedDatabase)
        yield get_storage(db)
        db.engine.dispose()


class TestRemote(StorageTestCase):
    @pytest.fixture
    def storage(self, file) -> Iterator[BaseStorage]:
        db = opened(file, ServedDatabase)
        with proxy(get_storage(db), "127.0.0.1", 0) as port:
            remote = connect(f"grpc://127.0.0.1:{port}")
            yield remote
            remote.close()
        db.engine.dispose()


class TestPostgreSQL(StorageTestCase):
    @pytest.fixture
    def storage(self, postgres: PostgreSQL) -> Iterator[BaseStorage]:
        db = opened(postgres.new(), PatientDatabase)
        yield get_storage(db)
        db.engine.dispose()
