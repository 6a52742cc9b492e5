import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import psutil
import pytest

from atp_tune import __version__
from atp_tune.process import identity, is_dead, versions

Child = subprocess.Popen[bytes]


@pytest.fixture
def child() -> Iterator[Child]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def identity_of(process: Child) -> dict[str, object]:
    return {**identity(), "pid": process.pid, "process_started": psutil.Process(process.pid).create_time()}


def test_identity_names_this_process() -> None:
    assert identity() == {
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
    }


def test_this_process_lives() -> None:
    assert not is_dead(identity())
    assert not is_dead({**identity(), "process_started": identity()["process_started"] + 0.5})  # clocks drift


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


@pytest.mark.parametrize("key", ["pid", "process_started"])
def test_a_process_that_has_not_said_all_is_not_known_to_be_dead(key: str) -> None:
    """The attributes of a trial are stored one by one, while others look."""
    assert not is_dead({name: value for name, value in identity().items() if name != key})


def test_another_process_with_the_same_id_is_another(child: Child) -> None:
    known = identity_of(child)
    assert is_dead({**known, "process_started": psutil.Process(child.pid).create_time() - 3600})


@pytest.mark.parametrize(
    "unknown", [{}, {"host": platform.node()}, {"pid": 1}, {"host": "elsewhere", "pid": 2**22, "process_started": 0.0}]
)
def test_what_cannot_be_known_is_not_dead(unknown: dict[str, object]) -> None:
    assert not is_dead(unknown)


def test_versions() -> None:
    assert versions() == {
        "atp_tune": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "optuna": version("optuna"),
    }
