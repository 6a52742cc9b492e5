"""Errors of SQLite files and disks, with what to do, in one line instead of SQLAlchemy's and Optuna's tracebacks."""

import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy.engine import make_url

from atp_tune.errors import UserError

BUSY = 60  # seconds that a writer waits for SQLite's lock

_GO_ON = "what is stored is safe, and the same command resumes"
_MEND = (
    "restore a backup, or save what is readable with `sqlite3 {file} .recover | sqlite3 NEW.db` "
    "and go on with --storage sqlite:///NEW.db"
)
WAYS = {  # SQLite's words → what to do
    "is full": f"make room on the disk: {_GO_ON}",
    "disk i/o error": f"check the disk: {_GO_ON}",
    "readonly": "name another with --storage sqlite:///FILE.db",
    "unable to open": "name another with --storage sqlite:///FILE.db",
    "malformed": _MEND,
    "not a database": _MEND,
    "could not decode": _MEND,
    "no such table": _MEND,
    "no such column": _MEND,
}


OPTUNAS = {  # tables of all versions of Optuna's schema
    "studies", "study_directions", "study_user_attributes", "study_system_attributes", "trials",
    "trial_user_attributes", "trial_system_attributes", "trial_params", "trial_values", "version_info",
}  # fmt: skip


def may_pass(error: BaseException) -> bool:
    """Whether a disk is full or fails, which a person may repair while programs wait."""
    return any(sign in str(error).lower() for sign in ("is full", "disk i/o error"))


def way_out(error: BaseException, address: str) -> str | None:
    """What to do about a database's error; None if unknown."""
    way = next((way for sign, way in WAYS.items() if sign in str(error).lower()), None)
    return way and way.format(file=shlex.quote(str(make_url(address).database)))


def check_whole(file: Path) -> None:
    """UserError if a SQLite file is damaged or another program's; without writing to it.

    Optuna creates its tables in any file that it opens, even to read.
    """
    tables, is_made = set[str](), None
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY)) as connection:
            connection.text_factory = lambda text: text.decode(errors="replace")  # results may quote damaged bytes
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            is_made = "version_info" in tables and connection.execute("SELECT 1 FROM version_info").fetchone()
    except sqlite3.OperationalError:  # no damage; opening the storage raises it again
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found == "ok" and tables and not tables & OPTUNAS:
        raise UserError(f"storage {file}: is another program's database; name another with --storage sqlite:///FILE.db")
    if is_made and (missing := sorted(OPTUNAS - tables)):  # Optuna would create it again, empty
        found = f"no such table: {missing[0]}"
    if found != "ok":
        raise UserError(
            f"storage {file}: is damaged ({' '.join(found.split())}); {_MEND.format(file=shlex.quote(str(file)))}"
        )
