"""Opening a storage by its URL, the studies that it holds, and the file system that it lies on."""

import warnings
from pathlib import Path
from tempfile import TemporaryFile
from time import sleep
from typing import TypeVar

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from atp_tune.errors import UserError, is_text
from atp_tune.paths import is_special
from atp_tune.storage.database import (
    Database,
    RetryingDatabase,
    engine_options,
    reason_of,
    with_driver,
    without_password,
)
from atp_tune.storage.lost_trials import queue_lost
from atp_tune.storage.process_identity import GRACE, HEARTBEAT
from atp_tune.storage.sqlite_errors import check_whole, way_out
from atp_tune.storage.validation import ValidatedStudy, readable

PAUSES = (0.1, 0.5, 2.0)  # seconds between attempts to make the tables of a new database
# Types of file systems, on which SQLite's locks do not work.
NETWORK = {
    "9p", "acfs", "afp", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse", "gfs",
    "gfs2", "glusterfs", "goofys", "gpfs", "juicefs", "lustre", "mfs", "moosefs", "ncpfs", "nfs", "nfs3",
    "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "rclone", "s3fs", "smb", "smb2", "smb3", "smbfs", "sshfs",
    "webdav", "wekafs",
}  # fmt: skip
Kind = TypeVar("Kind", bound=Database)


def open_storage(address: str, create: bool) -> BaseStorage | None:
    """The storage behind a URL; None if it is a SQLite file that does not exist and may not be made."""
    if is_remote(address):
        from atp_tune.storage.remote import connect

        return connect(address)
    return open_database(address, create, RetryingDatabase)


def is_remote(address: str) -> bool:
    """Whether a storage URL names a server of trials, `tune.py serve` on some machine."""
    return address.startswith(("grpc://", "grpcs://"))


def open_database(address: str, create: bool, kind: type[Kind]) -> Kind | None:
    """The same for a database, as the given kind of storage."""
    address = with_driver(address)
    url = _url(address)
    if url.drivername.startswith("sqlite"):
        check_is_file(url)
        file = Path(str(url.database))
        is_there = file.exists() and file.stat().st_size > 0  # an empty file is one that was about to be made
        if not is_there and not create:
            return None
        if create:
            check_writable(address)
        if is_there:
            check_whole(file)
    try:
        return _opened_after_retries(address, url, kind)
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, OSError) as error:
        way = way_out(error, address)
        reason = reason_of(error) + (f"; {way}" if way else "")
        raise UserError(f"storage {without_password(address)}: {reason}") from None


def _url(address: str) -> URL:
    try:
        if is_text(address):
            return make_url(address)
        raise ValueError(address)
    except (ArgumentError, ValueError):
        raise UserError("storage: not a storage URL; write sqlite:///FILE.db, for example") from None


def check_writable(address: str) -> None:
    """UserError if a SQLite file cannot be written, saying why; SQLite itself says the same for everything."""
    if is_remote(address) or not (url := _url(address)).drivername.startswith("sqlite"):
        return
    check_is_file(url)
    file = Path(str(url.database))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
        else:  # never touch the file itself: another process may be making it right now
            TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(f"storage {file}: {error.strerror}; name another with --storage sqlite:///FILE.db") from None


def check_is_file(url: URL) -> None:
    """UserError if a SQLite database is in memory, or would be where a folder is."""
    if url.database in (None, "", ":memory:"):
        raise UserError("storage: a database in memory is gone at the end; name a file, as in sqlite:///study.db")
    if is_special(Path(url.database)):
        raise UserError(f"storage {url.database}: is no file; name another with --storage sqlite:///FILE.db")
    if Path(url.database).is_dir():
        raise UserError(f"storage {url.database}: is a folder; name a file, as in sqlite:///{url.database}/study.db")


def _opened_after_retries(address: str, url: URL, kind: type[Kind]) -> Kind:
    """Tries again where the tables were not there and others were making them at the same moment."""
    for pause in PAUSES:
        try:
            return _rdb(address, url, kind)
        except DatabaseError as error:
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            sleep(pause)
    return _rdb(address, url, kind)


def _rdb(address: str, url: URL, kind: type[Kind]) -> Kind:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return kind(
            address.replace("{", "{{").replace("}", "}}"),  # Optuna takes it for a template
            engine_kwargs=engine_options(url),
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=queue_lost,
        )


def artifacts_of(address: str) -> Path:
    """The folder of artifacts: NAME.artifacts beside NAME.db, or ./artifacts for a database elsewhere."""
    scheme, _, path = address.partition(":///")
    return Path(path.partition("?")[0]).with_suffix(".artifacts") if scheme.startswith("sqlite") else Path("artifacts")


def find_study(storage: BaseStorage, name: str) -> optuna.Study | None:
    """The study of that name, if the storage has it."""
    try:
        return ValidatedStudy(name, storage)
    except KeyError:
        return None


def names_in(storage: BaseStorage) -> list[str]:
    """The names of all studies that a storage has, in the order in which they were made."""
    with readable("in the storage"):
        return [study.study_name for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id)]


def kind_of(file: Path) -> str:
    """The type of the file system that a file lies on, or would; "" if that is not known."""
    place = file.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return max(reversed(mounts), key=lambda part: len(Path(part.mountpoint).parts)).fstype if mounts else ""


def is_network(kind: str) -> bool:
    """Whether a file system's type is one of a network, also behind FUSE."""
    return kind.lower().removeprefix("fuse.") in NETWORK


def network_warning(address: str) -> str | None:
    """One line for a SQLite file on a network file system, where SQLite's locks do not work; None for any other."""
    file = make_url(address).database if address.startswith("sqlite") else None
    kind = kind_of(Path(file)) if file else ""
    if not is_network(kind):
        return None
    return (
        f"warning: {file} lies on a network file system ({kind}), where SQLite's locks do not work: only one "
        "machine may open it. For several, run `python tune.py serve` on one and give the others --storage "
        "grpc://HOST:13000, or use PostgreSQL (docs/serving.md)"
    )
