"""Optuna's database, made to outlive what happens to disks, files, clocks and busy processes.

Errors: UserError in one line for a disk that is full, a file that cannot be written or is damaged, a server that is
gone. It is raised where the database says so, in place of what SQLAlchemy and Optuna make of it.
"""

import logging
import shlex
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialHeartbeatModel, TrialModel
from optuna.trial import TrialState
from sqlalchemy import event, func, select
from sqlalchemy.engine import ExceptionContext, make_url

from atp_tune.errors import UserError
from atp_tune.process import is_alive

BUSY = 60  # seconds that a writer waits for SQLite's lock

_GO_ON = "what is stored is safe, and the same command goes on"
_MEND = (
    "put a copy in its place, or save what can be read with `sqlite3 {file} .recover | sqlite3 NEW.db` "
    "and go on with --storage sqlite:///NEW.db"
)
WAYS = {  # SQLite's words → what to do
    "is full": f"make room on the disk: {_GO_ON}",
    "disk i/o error": f"look after the disk: {_GO_ON}",
    "readonly": "name another with --storage sqlite:///FILE.db",
    "unable to open": "name another with --storage sqlite:///FILE.db",
    "malformed": _MEND,
    "not a database": _MEND,
    "could not decode": _MEND,
}

log = logging.getLogger(__name__)


class Database(RDBStorage):
    """Optuna's storage, which says in one line what is wrong with it and does not give up trials that live."""

    def __init__(self, url: str, **options: Any) -> None:
        self._seen: dict[int, tuple[datetime, float]] = {}
        super().__init__(url, **options)
        event.listen(self.engine, "handle_error", self._explain)

    def record_heartbeat(self, trial_id: int) -> None:
        """As Optuna's; one that fails does not end the thread of heartbeats: the next one may be heard."""
        try:
            super().record_heartbeat(trial_id)
        except (UserError, StorageInternalError) as error:
            log.debug("no heartbeat for trial id %d: %s", trial_id, error)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials without a sign of life for the grace period, but for those whose process lives on this host.

        One that is suspended, or busy for long in a call that holds Python's lock, has not lost its trial.
        """
        running = (TrialModel.study_id == study_id) & (TrialModel.state == TrialState.RUNNING)
        beats = select(TrialHeartbeatModel.trial_id, TrialHeartbeatModel.heartbeat, func.now()).join(TrialModel)
        with self.engine.connect() as connection:
            rows = connection.execute(beats.where(running)).all()
        assert self.grace_period is not None
        found = [(trial, self._silence(trial, beat, now.replace(tzinfo=None))) for trial, beat, now in rows]
        silent = [trial for trial, seconds in found if seconds > self.grace_period]
        return [trial for trial in silent if not is_alive(self.get_trial(trial).user_attrs)]

    def _silence(self, trial: int, beat: datetime, now: datetime) -> float:
        """Seconds since a sign of life; if it lies in the future, as after a clock was set back, since it was seen."""
        if beat <= now:
            return (now - beat).total_seconds()
        if trial not in self._seen or self._seen[trial][0] != beat:
            self._seen[trial] = beat, monotonic()
        return monotonic() - self._seen[trial][1]

    def _explain(self, context: ExceptionContext) -> None:
        """Raises what is wrong in one line, unless it is something that Optuna deals with."""
        error = context.original_exception
        way = "start the server again" if context.is_disconnect else way_out(error, self.url)
        if way:
            raise UserError(f"storage {without_password(self.url)}: {str(error).splitlines()[0]}; {way}") from None


def without_password(address: str) -> str:
    """A storage URL as it may be shown."""
    return make_url(address).render_as_string(hide_password=True)


def way_out(error: BaseException, address: str) -> str | None:
    """What to do where a database says this; None where it is not known."""
    way = next((way for sign, way in WAYS.items() if sign in str(error).lower()), None)
    return way and way.format(file=shlex.quote(str(make_url(address).database)))


def check_whole(file: Path) -> None:
    """UserError if a SQLite file is damaged: it is looked through before anything is written to it."""
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY)) as connection:
            connection.text_factory = lambda text: text.decode(errors="replace")  # it quotes what it finds
            found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:  # no damage: opening it in earnest will say what it is
        return
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise UserError(
            f"storage {file}: is damaged ({' '.join(found.split())}); {_MEND.format(file=shlex.quote(str(file)))}"
        )
