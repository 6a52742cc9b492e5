"""Paths that others wrote down, in a study file or a configuration, and what lies there."""

import stat
from pathlib import Path

from atp_tune.errors import UserError


def written(text: str, base: Path, key: str) -> Path:
    """The path of that text: a relative one starts at `base`, and ~ is a user's home.

    UserError, which names the key, for what no file can be called, and for the home of a user who is none.
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
    if isinstance(error, ValueError):  # Python's own words name the call, and change
        return "has a character that no path can have"
    return str(error.strerror if isinstance(error, OSError) else error)


def is_special(path: Path) -> bool:
    """Whether a path leads to a pipe, a device or a socket: reading one may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
