"""Which process runs a trial, and whether it still lives."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import psutil

from atp_tune import __version__

PACKAGES = ("torch", "transformers", "optuna")
HEARTBEAT = 15  # seconds between signs of life of a running trial
GRACE = 60  # seconds without one after which a trial counts as lost


def identity() -> dict[str, Any]:
    """Host, process id and when it began (seconds since 1970), which together name one process."""
    return {"host": platform.node(), "pid": os.getpid(), "process_started": psutil.Process().create_time()}


def is_dead(identity: Mapping[str, Any]) -> bool:
    """Whether the process ran on this host and is gone; False for what cannot be known from here."""
    if identity.get("host") != platform.node() or not {"pid", "process_started"} <= set(identity):
        return False
    try:
        process = psutil.Process(identity["pid"])
        began, state = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return True
    return state == psutil.STATUS_ZOMBIE or abs(began - float(identity["process_started"])) > 1


def versions() -> dict[str, str]:
    """Versions of what decides a value's last digits."""
    return {"atp_tune": __version__, **{name: version(name) for name in PACKAGES}}
