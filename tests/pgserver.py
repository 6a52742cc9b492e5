"""A real PostgreSQL server for the tests, which can be killed and started again."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from tinystudy import HANGS, free_port, wait_until

USER, PASSWORD = "tuner", "s3:cr@t/é"
URL_PASSWORD = "s3%3Acr%40t%2F%C3%A9"


class PostgreSQL:
    """A server of its own data, on a port of its own; as root it runs as another user, since it refuses root."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._data = folder / "data"
        self._owner = None if os.geteuid() else "nobody"
        if self._owner:
            shutil.chown(folder, self._owner)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        words = f"-D {self._data} -U {USER} -A scram-sha-256 --pwfile {secret} -E UTF8 --no-locale --no-sync"
        subprocess.run([program("initdb"), *words.split()], user=self._owner, check=True, capture_output=True)
        self.start()

    def start(self) -> None:
        """Starts the server; one that was killed leaves processes that it must wait for."""
        wait_until(self._starts)

    def _starts(self) -> bool:
        words = f"-D {self._data} -p {self.port} -h 127.0.0.1 -k {self._data.parent} -F"
        log = (self._data.parent / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [program("postgres"), *words.split()], user=self._owner, stdout=log, stderr=log, cwd="/"
            )
        wait_until(lambda: self._process.poll() is not None or self._answers())
        return self._process.poll() is None

    def _answers(self) -> bool:
        try:
            self._run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """As a power cut does; its children see that and end."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(HANGS)

    def url(self, database: str, password: str = URL_PASSWORD) -> str:
        return f"postgresql+psycopg://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def new(self) -> str:
        """The URL of a new, empty database."""
        name = f"trials_{uuid4().hex}"
        self._run(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def _run(self, statement: str) -> None:
        place = {"host": "127.0.0.1", "port": self.port, "dbname": "postgres"}
        with psycopg.connect(**place, user=USER, password=PASSWORD, autocommit=True) as connection:  # type: ignore[arg-type]
            connection.execute(statement)


def program(name: str) -> str:
    """A program of the server: Debian keeps them where no PATH leads."""
    folders = [os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=":".join(folders)) or ""


@contextmanager
def running() -> Iterator[PostgreSQL]:
    """A server; CI has its programs, elsewhere a test that needs them is skipped."""
    if not program("initdb") and "CI" not in os.environ:
        pytest.skip("needs postgresql")
    assert program("initdb")
    with tempfile.TemporaryDirectory(
        prefix="pg", ignore_cleanup_errors=True
    ) as folder:  # its path is short enough for a socket
        server = PostgreSQL(Path(folder))
        try:
            yield server
        finally:
            server.stop()
