"""DeepSparse's own environment in the user's cache: `setup` makes it, if necessary with an older Python.

Version 1.8.0 is the last that runs (1.9.0 is an empty stub). DeepSparse is no dependency, because it is proprietary,
licensed for evaluation only, and no longer developed.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from atp_tune.cache import cache_dir, folder_atomically
from atp_tune.checkpoints.devices import cpu_flags
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message

VERSION = "1.8.0"
PACKAGES = (f"deepsparse=={VERSION}", "numpy<2")  # it needs onnx < 1.15 itself, which needs numpy 1
PYTHONS = ("3.11", "3.10", "3.9", "3.8")
LICENCE = (
    "DeepSparse is proprietary: its Community License allows evaluation, not production; read LICENSE in it. It is no "
    "longer developed. It is installed in an environment of its own, and its telemetry is turned off."
)
SETUP = "python tune.py speedup --engine deepsparse --setup"


def python_of() -> Path:
    """The environment's Python; UserError if DeepSparse cannot run here or is not installed."""
    check_machine()
    python = _python_in(_home())
    if not python.exists():
        raise UserError(f"--engine deepsparse: is not installed; run: {SETUP}")
    return python


def setup(watch: EventHandler) -> Path:
    """Makes the environment unless it exists, and returns its folder; UserError if it cannot be made."""
    check_machine()
    home = _home()
    watch(Message(LICENCE))
    if not _python_in(home).exists():
        python = find_python()
        watch(Message(f"installing DeepSparse {VERSION} by {python} into {home}"))
        with folder_atomically(home) as folder:
            _run([str(python), "-m", "venv", str(folder)])
            quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
            _run([str(_python_in(folder)), "-m", "pip", "install", *quiet, *PACKAGES])
    return home


def check_machine() -> None:
    """UserError if DeepSparse does not support the system or the CPU."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise UserError(
            f"--engine deepsparse: runs on Linux on x86-64, this is {sys.platform} on {platform.machine()}; "
            "--engine torch runs here"
        )
    if "avx2" not in cpu_flags():
        raise UserError("--engine deepsparse: needs a CPU with AVX2 or AVX-512; --engine torch runs here")


def find_python() -> Path:
    """A Python that DeepSparse supports: this one or one in PATH; UserError if there is none."""
    own = ".".join(map(str, sys.version_info[:2]))
    if own in PYTHONS:
        return Path(sys.executable)
    found = next(filter(None, (shutil.which(f"python{version}") for version in PYTHONS)), None)
    if found is None:
        raise UserError(
            f"--engine deepsparse: needs Python {PYTHONS[-1]} to {PYTHONS[0]}, this is {own}; install python3.11 so "
            f"that it is in PATH, then run: {SETUP}"
        )
    return Path(found)


def _home() -> Path:
    return cache_dir("engines") / f"deepsparse-{VERSION}"


def _python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"--engine deepsparse: cannot be installed: {said[-1]}; the network is needed once")
