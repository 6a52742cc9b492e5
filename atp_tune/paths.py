"""Paths in study files and configurations."""

import stat
from pathlib import Path

from atp_tune.errors import UserError


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


def check_free(out: Path) -> None:
    """UserError if `out` exists and is not an empty folder; called before any work."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"--out {out}: is there already; choose another folder or remove it")
