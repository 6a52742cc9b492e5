"""Optuna's own tests of storages, run on each of ours as workers see it."""

from collections.abc import Iterator
from contextlib import closing

import pytest
from optuna.storages import BaseStorage, get_storage
from optuna.testing.pytest_storages import StorageTestCase
from pgserver import PostgreSQL

from atp_tune.report.servers import ServedDatabase, proxy
from atp_tune.storage.database import Database
from atp_tune.storage.opening import Kind, open_database
from atp_tune.storage.remote import connect

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_optuna")]


def opened(address: str, kind: type[Kind]) -> Kind:
    database = open_database(address, True, kind)
    assert database is not None
    return database


def emptied(storage: BaseStorage) -> Iterator[BaseStorage]:
    """The storage for one test: to make another would take longer than most of them."""
    yield storage
    for study in storage.get_all_studies():
        storage.delete_study(study._study_id)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return opened(f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/study.db", Database)


@pytest.fixture(scope="module")
def postgresql(postgres: PostgreSQL) -> Database:
    return opened(postgres.new(), Database)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of what `serve` runs for workers."""
    served = opened(f"sqlite:///{tmp_path_factory.mktemp('served')}/study.db", ServedDatabase)
    with proxy(get_storage(served), "127.0.0.1", 0) as port:
        yield f"grpc://127.0.0.1:{port}"


class TestSQLite(StorageTestCase):
    @pytest.fixture
    def storage(self, sqlite: Database) -> Iterator[BaseStorage]:
        yield from emptied(get_storage(sqlite))


class TestServer(StorageTestCase):
    @pytest.fixture
    def storage(self, server: str) -> Iterator[BaseStorage]:
        with closing(connect(server)) as storage:
            yield from emptied(storage)


class TestPostgreSQL(StorageTestCase):
    @pytest.fixture
    def storage(self, postgresql: Database) -> Iterator[BaseStorage]:
        yield from emptied(get_storage(postgresql))
