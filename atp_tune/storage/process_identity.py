"""Which process runs a trial, and whether it still lives."""

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import psutil

from atp_tune import __version__

PACKAGES = ("torch", "transformers", "optuna")
HEARTBEAT = 15  # seconds between signs of life of a running trial
GRACE = 60  # seconds without one after which a trial counts as lost


def identity() -> dict[str, Any]:
    """Host, process id and when it began, which together name one process; `booted`: when the host did.

    Both times are in seconds since 1970 by the host's clock, which may be set while the process runs.
    """
    began, booted = psutil.Process().create_time(), psutil.boot_time()
    return {"host": platform.node(), "pid": os.getpid(), "process_started": began, "booted": booted}


def is_dead(identity: Mapping[str, Any]) -> bool:
    """Whether the process ran on this host and is gone; False for what cannot be known from here."""
    return _is_known(identity) and not is_alive(identity)


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether the process runs on this host; False for what cannot be known from here."""
    if not _is_known(identity):
        return False
    try:
        process = psutil.Process(identity["pid"])
        began, state = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    return state != psutil.STATUS_ZOMBIE and _is_same(began, identity)


def has_rebooted(identity: Mapping[str, Any]) -> bool:
    """Whether this host was booted again since the process began; also where its clock was set by more than `GRACE`."""
    return abs(psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))) > GRACE


def _is_known(identity: Mapping[str, Any]) -> bool:
    return identity.get("host") == platform.node() and "pid" in identity and "process_started" in identity


def _is_same(began: float, identity: Mapping[str, Any]) -> bool:
    """Whether it is the process that was written down, by the clock or by the time since the host was booted.

    On Linux a clock that is set moves the beginning of all processes with it, on macOS it does not.
    """
    moved = psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))
    differs = began - float(identity["process_started"])
    return min(abs(differs), abs(differs - moved)) <= 1


def versions() -> dict[str, str]:
    """Versions of what decides a value's last digits."""
    return {"atp_tune": __version__, **_installed()}


@cache
def _installed() -> dict[str, str]:
    """Read once, as the packages themselves are: each reading parses the whole of their metadata."""
    return {name: version(name) for name in PACKAGES}
