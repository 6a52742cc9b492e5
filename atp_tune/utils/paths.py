"""Paths in study files and configurations."""

import errno
import os
import platform
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from atp_tune.errors import UserError

# Characters that the cache adds to the names of temporary files.
TEMPORARY = len(f"..{platform.node()}-1234567-1234567890-12345678-12345678")


def written(text: str, base: Path, key: str) -> Path:
    """The path of a text, relative to `base`, with ~ expanded.

    UserError, with the key's name, for an invalid path or an unknown user after ~.
    """
    try:
        path = base / Path(text).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = text if len(text) < 100 else f"{text[:99]}…"
        raise UserError(f'{key}: "{shown}": {_reason(error)}; give another path') from None
    return path


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):  # Python's own message differs between versions
        return "has a character that no path can have"
    return str(error.strerror if isinstance(error, OSError) else error)


def is_special(path: Path) -> bool:
    """Whether a path is a pipe, device or socket, of which reading may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_free(out: Path, size: float = 0) -> None:
    """UserError unless a new folder of `size` bytes can be written to `out`; called before any work."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; choose another folder or remove it")
    check_writable(out, size, "--out ")


def check_writable(path: Path, size: float = 0, named: str = "", instead: str = "choose another place") -> None:
    """UserError unless a file or folder of `size` bytes can be written to `path`; called before any work.

    `named`, `instead`: how the message begins, and what it advises.
    """
    place = path.absolute()
    try:
        os.lstat(f"{place}{'x' * TEMPORARY}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{named}{path.name[:20]}…: cannot be written: its name is too long; {instead}") from None
    there = next(parent for parent in (*place.parents, place) if os.path.lexists(parent))  # / has no parent
    if not there.is_dir():
        raise UserError(f"{named}{path}: cannot be written: {there} is no folder; {instead}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{named}{path}: cannot be written: {there} does not let you write; {instead}")
    if size > (free := shutil.disk_usage(there).free):
        needs = f"needs {size / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free there"
        raise UserError(f"{named}{path}: {needs}; make room, or {instead}")


def format_of(given: str | None, out: Path | None, formats: Mapping[str, tuple[str, object]]) -> str:
    """The name of a format: as given, else by the ending of `out`, else the first; UserError if it is unknown.

    `formats`: an ending, and what else belongs to it, by name.
    """
    if given is not None and given not in formats:
        raise UserError(f"--format {given}: must be one of {', '.join(formats)}")
    if given is not None or out is None or not out.suffix:
        return given or next(iter(formats))
    fitting = [(len(ending), kind) for kind, (ending, _) in formats.items() if out.name.lower().endswith(ending)]
    if not fitting:
        endings = ", ".join(ending for ending, _ in formats.values())
        raise UserError(f"--out {out}: must end in one of {endings}, or give --format")
    return max(fitting)[1]
