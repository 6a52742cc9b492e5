"""Optuna's storage in SQLite or PostgreSQL, for many workers and a server that may be unreachable for a while.

Each call is one transaction, and is retried until the server is back. If a transaction was committed but its answer
was lost, then the retry of

- attributes, intermediate values and heartbeats writes the same again,
- parameters is refused (the row exists), which Optuna takes for success,
- a trial's end is refused, which is no error if the stored state and values are those of the call,
- a new trial, or one taken from the queue, leaves a running trial without a process, which
  `progress.requeue_lost` queues again.
"""

import json
import logging
import math
import re
import shlex
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from threading import Lock, local
from time import monotonic
from typing import Any, BinaryIO, ClassVar, TypeVar
from weakref import finalize

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from sqlalchemy import event, func, select
from sqlalchemy.engine import URL, ExceptionContext, make_url
from sqlalchemy.exc import DBAPIError, OperationalError, PendingRollbackError, SQLAlchemyError

from atp_tune.errors import UserError
from atp_tune.storage.attributes import Attributes, AttributeStorage, unreadable
from atp_tune.storage.progress import GRACE, is_alive
from atp_tune.utils.compat import TrialHeartbeatModel, TrialModel, transaction
from atp_tune.utils.system import as_typed, pause

# --- Retries of calls to a server that is unreachable, with a warning when an outage begins and ends.
#
# So no network failure or restart of the server costs a worker its result.

RETRY_SECONDS = 3600  # seconds of an outage after which a worker gives up
RETRY_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts; the last one repeats

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Retrying:
    """Retries calls to one server (`name` in messages), from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._lock = Lock()
        self._thread = local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Retrying, (self._name,)  # a copy begins without an outage

    def ask(self, attempt: Callable[[], tuple[Answer, str]]) -> Answer:
        """The first answer that comes without a reason to ask again; UserError after `RETRY_SECONDS` of one outage.

        The limit is for the outage, not the call: after a run has given up, its last calls do not wait again.
        """
        pauses, has_repeated = chain(RETRY_PAUSES, repeat(RETRY_PAUSES[-1])), False
        try:
            while reason := (answered := attempt())[1]:
                with self._lock:
                    if self._since is None:
                        self._since = monotonic()
                        log.warning("%s %s; trying again, nothing is lost", self._name, reason)
                if monotonic() - self._since >= RETRY_SECONDS:
                    raise UserError(
                        f"{self._name} {reason}, for {RETRY_SECONDS / 60:.0f} minutes now. All earlier results are "
                        "stored; the same command resumes the study"
                    )
                pause(next(pauses))
                has_repeated = True
        finally:
            self._thread.has_repeated = has_repeated  # set at the end: an attempt may make a call of its own
        with self._lock:
            if self._since is not None:
                self._since = None
                log.warning("%s answers again", self._name)
        return answered[0]

    def tell(
        self,
        attempt: Callable[[], bool],
        storage: BaseStorage,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> bool:
        """The answer of `attempt`, which tells a trial; no error if an earlier one has told it the same unseen."""
        try:
            return attempt()
        except UpdateFinishedTrialError:
            trial = storage.get_trial(trial_id) if getattr(self._thread, "has_repeated", False) else None
            if trial is None or (trial.state, trial.values) != (state, list(values) if values else None):
                raise
            return True


# --- Errors of SQLite files and disks, with what to do, in one line instead of SQLAlchemy's and Optuna's tracebacks.

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
    """A way out of a database's error; None if unknown."""
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
            state = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            is_made = "version_info" in tables and connection.execute("SELECT 1 FROM version_info").fetchone()
    except sqlite3.OperationalError:  # no damage; opening the storage raises it again
        return
    except sqlite3.DatabaseError as error:
        state = str(error)
    if state == "ok" and tables and not tables & OPTUNAS:
        raise UserError(f"storage {file}: is another program's database; name another with --storage sqlite:///FILE.db")
    if is_made and (missing := sorted(OPTUNAS - tables)):  # Optuna would create it again, empty
        state = f"no such table: {missing[0]}"
    if state != "ok":
        raise UserError(
            f"storage {file}: is damaged ({' '.join(state.split())}); {_MEND.format(file=shlex.quote(str(file)))}"
        )


# One connection stays open, more while threads need them: 90 workers fit into PostgreSQL's limit of 100.
POOL = {"pool_pre_ping": True, "pool_size": 1, "max_overflow": 15}
# Options of libpq. With its defaults a worker would notice a cut cable after 15 minutes, and the server would hold the
# locks of a vanished worker for two hours.
LIBPQ = {
    "options": f"-c idle_in_transaction_session_timeout={GRACE}s", "connect_timeout": 10,
    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}  # fmt: skip
YOUNG = f"SELECT now() - pg_postmaster_start_time() < interval '{GRACE} seconds'"
HINTS = {
    "No module named 'psycopg": "run: pip install -e '.[postgres]', and write postgresql+psycopg://",
    "authentication failed": "put the right user and password into the URL, or the password into PGPASSWORD",
    "no password supplied": "put it into the URL, or into PGPASSWORD",
    "does not exist": "make it with: createdb NAME",
    "refused": "does the server run there?",
}
# All calls of one transaction, except `set_trial_state_values` and `record_heartbeat`, which handle retries themselves,
# and `delete_study`, which no worker makes.
CALLS = (
    "create_new_study", "get_all_studies", "get_study_directions", "get_study_id_from_name", "get_study_name_from_id",
    "get_study_system_attrs", "get_study_user_attrs", "set_study_system_attr", "set_study_user_attr",
    "_create_new_trial", "get_trial", "_get_trials", "_get_best_trial_id", "get_trial_id_from_study_id_trial_number",
    "get_trial_param", "get_trial_system_attrs", "get_trial_user_attrs",
    "_set_trial_param", "set_trial_intermediate_value", "set_trial_system_attr", "set_trial_user_attr",
    "set_trial_user_attrs", "set_study_system_attrs", "_get_stale_trial_ids",
)  # fmt: skip


def without_password(address: str) -> str:
    """A storage URL without its password."""
    url = make_url(address)
    hidden = {key: "***" for key in url.query if "password" in key.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def with_driver(address: str) -> str:
    """The URL with psycopg as PostgreSQL's driver if the URL names none."""
    return re.sub("^postgresql:", "postgresql+psycopg:", address)


def engine_options(url: URL) -> dict[str, Any]:
    """SQLAlchemy's engine options for many workers with short transactions."""
    if url.drivername.startswith("sqlite"):
        return {"connect_args": {"timeout": BUSY}}
    if url.get_driver_name() not in ("psycopg", "psycopg2"):
        return {"pool_pre_ping": True}
    return {**POOL, "connect_args": {key: value for key, value in LIBPQ.items() if key not in url.query}}


def error_reason(error: BaseException) -> str:
    """A database error in one line, with what to do, if known."""
    words = str(_cause(error)).strip().splitlines()[0]
    return next((f"{words}; {as_typed(hint)}" for part, hint in HINTS.items() if part in words), words)


def _cause(error: BaseException) -> BaseException:
    """The driver's error inside SQLAlchemy's and Optuna's."""
    if isinstance(error, StorageInternalError | ImportError) and error.__cause__ is not None:
        error = error.__cause__
    return error.orig if isinstance(error, DBAPIError) and error.orig is not None else error


def is_away(error: BaseException) -> bool:
    """Whether a retry may succeed: the server is unreachable or has no free connection, or the file is locked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if "sqlite" in type(_cause(error)).__module__:
        return "is locked" in str(_cause(error))
    lost = isinstance(cause, DBAPIError) and cause.connection_invalidated
    return lost or isinstance(cause, OperationalError | PendingRollbackError)


class Errors:
    """Handles an engine's errors; without a reference to the storage, which the engine would keep alive."""

    def __init__(self, url: str) -> None:
        self.last = -math.inf  # when the database last failed to answer, by `monotonic`
        self._url = url

    def note(self, context: ExceptionContext) -> None:
        """Raises UserError for a broken file or disk; records when a server did not answer."""
        if context.is_disconnect or isinstance(context.sqlalchemy_exception, OperationalError):
            self.last = monotonic()
        error = context.original_exception
        if way := way_out(error, self._url):
            raise UserError(f"storage {without_password(self._url)}: {str(error).splitlines()[0]}; {way}") from None


class Database(AttributeStorage):
    """A storage of Optuna's for several workers that take trials from the queue, and for outages: calls are retried.

    A broken file or disk gives a UserError, and a trial whose process lives is not failed. Connections close by `close`
    or with the last reference to the storage.
    """

    retries: ClassVar[bool] = True  # while the server is unreachable, as a worker needs it

    def __init__(self, url: str, *arguments: Any, **options: Any) -> None:
        self._retrying = Retrying(f"storage {without_password(url)}:")
        try:
            super().__init__(url, *arguments, **options)
        except BaseException:
            if hasattr(self, "engine"):
                self.close()
            raise
        self._listen()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return partial(self._ask, value) if name in CALLS else value

    def _ask(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer of a call of one transaction, after retries."""
        if not self.retries:
            return call(*arguments, **options)

        def attempt() -> tuple[Any, str]:
            try:
                return call(*arguments, **options), ""
            except (StorageInternalError, SQLAlchemyError) as error:
                if not is_away(error):
                    raise
                return None, error_reason(error)

        return self._retrying.ask(attempt)

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._listen()

    def _listen(self) -> None:
        self._seen = dict[int, tuple[datetime, float]]()  # trial id → heartbeat in the future, and when it was read
        self._errors = Errors(self.url)
        event.listen(self.engine, "handle_error", self._errors.note)
        finalize(self, self.engine.dispose)

    def close(self) -> None:
        """Closes the connections that are not in use; the next call opens a new one."""
        self.engine.dispose()

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Ends or takes a trial under a lock: SQLite ignores Optuna's own, and two workers would take one trial.

        No error if a first attempt, whose answer was lost, told it the same.
        """
        tell = super().set_trial_state_values

        def locked() -> bool:
            if self.engine.name != "sqlite":
                return tell(trial_id, state, values)
            with transaction(self.scoped_session) as session:
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
                return tell(trial_id, state, values)

        return self._retrying.tell(lambda: bool(self._ask(locked)), self, trial_id, state, values)

    def record_heartbeat(self, trial_id: int) -> None:
        """Sends a heartbeat; an error does not end the heartbeat thread, since the next heartbeat may succeed."""
        try:
            super().record_heartbeat(trial_id)
        except (UserError, StorageInternalError, SQLAlchemyError) as error:
            log.debug("no heartbeat for trial id %d: %s", trial_id, error_reason(error))

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        """Trials without a heartbeat for the grace period whose process is not alive, as far as this host knows.

        A process of this host may be suspended, or hold Python's lock for long. A trial of a host with a heartbeat from
        another trial is left to that host, which can tell. None soon after an outage, which blocks all heartbeats.
        """
        # Id of each running trial, its last heartbeat, and the database's present time.
        running = (TrialModel.study_id == study_id) & (TrialModel.state == TrialState.RUNNING)
        beats = select(TrialHeartbeatModel.trial_id, TrialHeartbeatModel.heartbeat, func.now()).join(TrialModel)
        try:
            with self.engine.connect() as connection:
                rows = connection.execute(beats.where(running)).all()
        except (ValueError, TypeError) as error:  # SQLite stores any value in a column of times
            raise unreadable(self.get_study_name_from_id(study_id), error) from None
        assert self.grace_period is not None
        silences = [(trial, self._silence(trial, beat, now.replace(tzinfo=None))) for trial, beat, now in rows]
        silent = [trial for trial, seconds in silences if seconds > self.grace_period]
        attrs = {trial: self.get_trial(trial).user_attrs for trial, _ in silences} if silent else {}
        heard = [attrs[trial]["host"] for trial in attrs if trial not in silent and "host" in attrs[trial]]
        stale = [trial for trial in silent if attrs[trial].get("host") not in heard and not is_alive(attrs[trial])]
        return [] if stale and (monotonic() - self._errors.last < GRACE or self._is_young()) else stale

    def _silence(self, trial: int, beat: datetime, now: datetime) -> float:
        """Seconds since a heartbeat; since it was first read if it lies in the future (a clock was set back)."""
        if beat <= now:
            return (now - beat).total_seconds()
        if trial not in self._seen or self._seen[trial][0] != beat:
            self._seen[trial] = beat, monotonic()
        return monotonic() - self._seen[trial][1]

    def _is_young(self) -> bool:
        """Whether the server started so recently that workers may not have reconnected."""
        if self.engine.name != "postgresql":
            return False
        with self.engine.connect() as connection:
            return bool(connection.exec_driver_sql(YOUNG).scalar())


def set_attributes(trial: optuna.Trial, attributes: Attributes) -> None:
    """Stores user attributes of a running trial, in one transaction if the storage is a database."""
    db = getattr(trial.storage, "_backend", trial.storage)  # the storage behind Optuna's cache
    if not isinstance(db, Database):
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        return
    db.set_trial_user_attrs(trial._trial_id, attributes)
    trial._cached_frozen_trial.user_attrs.update(attributes)  # as `set_user_attr` does


# --- Artifacts: the files that the dashboard offers with a study, in NAME.artifacts beside NAME.db.
#
# Database and folder may be a stranger's. Only artifact ids of Optuna's form are accepted, so that each names a file of
# the folder, and no links are read.

CONFIG, REPORT = MADE_ANEW = ("best.json", "report.html")  # files that `serve` updates
OF_STUDY = "artifacts:"  # prefix of system attributes of studies and trials; the artifact's id follows
OF_TRIAL = re.compile(r"(?P<head>dashboard:artifacts:)(?P<trial>\d{1,18})(?P<tail>:.*)", re.ASCII | re.DOTALL)
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def refuse_link(folder: Path) -> None:
    """UserError if the folder of artifacts is a link, which a stranger may have made."""
    if folder.is_symlink():
        raise UserError(
            f"{folder}: is a link to {folder.resolve()}, where files would be written; name that folder with "
            "--artifacts DIR, or remove the link"
        )


def is_name(name: object) -> bool:
    """Whether a name has the form of Optuna's artifact ids."""
    return isinstance(name, str) and UUID.fullmatch(name) is not None


def name_in(key: str) -> str | None:
    """The artifact id in an attribute's key, unchecked; None for other keys."""
    return key.rpartition(":")[2] if key.startswith(OF_STUDY) or OF_TRIAL.fullmatch(key) else None


def own_file(folder: Path, name: object) -> Path | None:
    """An artifact's file; None for an invalid id, a missing file, or a link."""
    if not is_name(name):
        return None
    path = folder / str(name)
    return path if path.is_file() and not path.is_symlink() else None


def is_kept(key: str, value: object) -> bool:
    """Whether an attribute is no artifact's, or is valid metadata of one (null: removed)."""
    name = name_in(key)
    if name is None:
        return True
    if not is_name(name):
        return False
    try:
        meta = json.loads(value) if isinstance(value, str) else ()
    except (ValueError, RecursionError):
        return False
    return meta is None or (
        isinstance(meta, dict)
        and meta.get("artifact_id") == name
        and all(isinstance(meta.get(key), str) for key in ("filename", "mimetype"))
        and isinstance(meta.get("encoding"), str | None)
    )


def file_names(attributes: Attributes) -> dict[str, str]:
    """The file names of a study's artifacts by id, from the study's system attributes."""
    own = [key for key in attributes if key.startswith(OF_STUDY) and is_kept(key, attributes[key])]
    return {str(name_in(key)): meta["filename"] for key in own if (meta := json.loads(attributes[key]))}


class Store(FileSystemArtifactStore):
    """A store of Optuna's in a folder, without access to files outside."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def has(self, name: object) -> bool:
        """Whether an artifact with this id can be read."""
        return own_file(self._folder, name) is not None

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's bytes; ArtifactNotFound if there is none."""
        path = own_file(self._folder, artifact_id)
        if path is None:
            raise ArtifactNotFound("not found")
        return path.open("rb")
