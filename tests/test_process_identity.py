import platform
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from atp_tune.storage.progress import identity, is_alive, is_dead

Child = subprocess.Popen[bytes]


@pytest.fixture
def child() -> Iterator[Child]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def identity_of(process: Child) -> dict[str, object]:
    return {**identity(), "pid": process.pid, "process_started": psutil.Process(process.pid).create_time()}


def test_a_clock_that_is_set_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux the times of all processes, which are counted from the boot, move with it."""
    known, booted, began = identity(), psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted - 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: began - 3600)
    assert is_alive(known)
    assert not is_dead(known)
    del known["booted"]  # an early version did not write it
    assert is_dead(known)


def test_a_process_that_ended_is_dead(child: Child) -> None:
    known = identity_of(child)
    assert not is_dead(known)
    child.kill()
    child.wait()
    assert is_dead(known)


def test_a_process_that_was_killed_but_not_fetched_is_dead(child: Child) -> None:
    known = identity_of(child)
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert is_dead(known)


def test_another_process_with_the_same_id_is_another(child: Child) -> None:
    assert is_dead({**identity_of(child), "process_started": psutil.Process(child.pid).create_time() - 3600})


@pytest.mark.parametrize(
    "unknown", [{}, {"host": platform.node()}, {"pid": 1}, {"host": "elsewhere", "pid": 2**22, "process_started": 0.0}]
)
def test_what_cannot_be_known_is_not_dead(unknown: dict[str, object]) -> None:
    assert not is_dead(unknown)
