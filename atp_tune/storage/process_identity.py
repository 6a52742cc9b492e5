"""The process that runs a trial: its identity, whether it is alive, and its versions."""

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import psutil

from atp_tune import __version__

PACKAGES = ("torch", "transformers", "optuna")
HEARTBEAT = 15  # seconds between heartbeats of a running trial
GRACE = 60  # seconds without a heartbeat after which a trial is lost


def identity() -> dict[str, Any]:
    """Host, process id and start time of this process, and the boot time of its host.

    Times are in seconds since 1970 by the host's clock, which may be set while the process runs.
    """
    began, booted = psutil.Process().create_time(), psutil.boot_time()
    return {"host": platform.node(), "pid": os.getpid(), "process_started": began, "booted": booted}


def is_dead(identity: Mapping[str, Any]) -> bool:
    """Whether the process ran on this host and has ended; False for processes of other hosts."""
    return _is_known(identity) and not is_alive(identity)


def is_alive(identity: Mapping[str, Any]) -> bool:
    """Whether the process runs on this host; False for processes of other hosts."""
    if not _is_known(identity):
        return False
    try:
        process = psutil.Process(identity["pid"])
        began, state = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    return state != psutil.STATUS_ZOMBIE and _is_same(began, identity)


def has_rebooted(identity: Mapping[str, Any]) -> bool:
    """Whether this host was booted after the process began, or its clock was set by more than `GRACE`."""
    return abs(psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))) > GRACE


def _is_known(identity: Mapping[str, Any]) -> bool:
    return identity.get("host") == platform.node() and "pid" in identity and "process_started" in identity


def _is_same(began: float, identity: Mapping[str, Any]) -> bool:
    """Whether a process's start time is that of the identity, by the clock or by the time since boot.

    On Linux, setting the clock moves the start times of all processes, on macOS it does not.
    """
    moved = psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))
    differs = began - float(identity["process_started"])
    return min(abs(differs), abs(differs - moved)) <= 1


def versions() -> dict[str, str]:
    """Versions of the packages that affect a value's last digits."""
    return {"atp_tune": __version__, **{name: version_of(name) for name in PACKAGES}}


@cache
def version_of(package: str) -> str:
    """The version of an installed package, read once: each reading parses all its metadata."""
    return version(package)
