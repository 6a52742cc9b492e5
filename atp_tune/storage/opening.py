"""Opening a storage by its URL, and the checks of its file and file system."""

import re
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from time import sleep
from typing import TypeVar
from weakref import WeakValueDictionary

import optuna
import psutil
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, SQLAlchemyError

from atp_tune.errors import UserError, is_text
from atp_tune.storage.attributes import ValidatedStudy, readable
from atp_tune.storage.database import (
    Database,
    check_whole,
    engine_options,
    error_reason,
    way_out,
    with_driver,
    without_password,
)
from atp_tune.storage.progress import GRACE, HEARTBEAT, experimental, queue_lost
from atp_tune.utils.system import is_special

# --- Storages in the memory of this process, by addresses that studies can name: memory://1.

MEMORY = "memory://"

_storages: WeakValueDictionary[str, BaseStorage] = WeakValueDictionary()
_numbers = count(1)


def new_storage() -> tuple[str, BaseStorage]:
    """A new storage and its address, by which it is found as long as the caller holds the storage."""
    storage = InMemoryStorage()
    address = f"{MEMORY}{next(_numbers)}"
    _storages[address] = storage
    return address, storage


PAUSES = (0.1, 0.5, 2.0)  # seconds between attempts to create the tables of a new database
# Types of network file systems, on which SQLite's locks do not work.
NETWORK = re.compile(
    "9p|acfs|afp|afpfs|afs|beegfs|ceph|cifs|coda|davfs2?|gcsfuse|gfs2?|glusterfs|goofys|gpfs|juicefs|lustre|mfs|moosefs|"
    "ncpfs|nfs[34]?|ocfs2|orangefs|panfs|pvfs2|rclone|s3fs|smb[23]?|smbfs|sshfs|webdav|wekafs"
)
Kind = TypeVar("Kind", bound=Database)


def open_storage(address: str, create: bool) -> BaseStorage | None:
    """The storage of a URL; None for a SQLite file that does not exist, without `create`."""
    if is_remote(address):
        from atp_tune.storage.remote import connect

        return connect(address)
    if address.startswith(MEMORY):
        if (storage := _storages.get(address)) is None:
            raise UserError(
                f"storage {address}: is gone with its Python process; name a file, as in sqlite:///study.db"
            )
        return storage
    return open_database(address, create, Database)


def is_remote(address: str) -> bool:
    """Whether a storage URL names a gRPC server (`tune.py serve`)."""
    return address.startswith(("grpc://", "grpcs://"))


def open_database(address: str, create: bool, kind: type[Kind]) -> Kind | None:
    """`open_storage` for a database, with this class of storage."""
    address = with_driver(address)
    url = _url(address)
    if url.drivername.startswith("sqlite"):
        file = sqlite_file(url)
        is_there = file.exists() and file.stat().st_size > 0  # an empty file: its process died while creating it
        if not is_there and not create:
            return None
        if create:
            check_writable(address)
        if is_there:
            check_whole(file)
    pauses = iter(PAUSES)  # if another process creates the tables at the same moment
    try:
        while True:
            try:
                with experimental():
                    return kind(
                        address.replace("{", "{{").replace("}", "}}"),  # Optuna formats it as a template
                        engine_kwargs=engine_options(url),
                        heartbeat_interval=HEARTBEAT,
                        grace_period=GRACE,
                        heartbeat_stale_trial_callback=queue_lost,
                    )
            except DatabaseError as error:
                pause = next(pauses, None)
                if pause is None or not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                    raise
                sleep(pause)
    except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, OSError) as error:
        way = way_out(error, address)
        reason = error_reason(error) + (f"; {way}" if way else "")
        raise UserError(f"storage {without_password(address)}: {reason}") from None


def _url(address: str) -> URL:
    try:
        if is_text(address):
            return make_url(address)
        raise ValueError(address)
    except (ArgumentError, ValueError):
        raise UserError("storage: not a storage URL; write sqlite:///FILE.db, for example") from None


def check_writable(address: str) -> None:
    """UserError, with the reason, if a SQLite file cannot be written; SQLite's own error names no reason."""
    if is_remote(address) or not (url := _url(address)).drivername.startswith("sqlite"):
        return
    file = sqlite_file(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            file.open("ab").close()
        else:  # not the file itself, which another process may be creating
            TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(f"storage {file}: {error.strerror}; name another with --storage sqlite:///FILE.db") from None


def sqlite_file(url: URL) -> Path:
    """The file of a SQLite database; UserError if it is in memory, a folder, or a special file."""
    if url.database in (None, "", ":memory:"):
        raise UserError("storage: a database in memory is gone at the end; name a file, as in sqlite:///study.db")
    file = Path(url.database)
    if is_special(file):
        raise UserError(f"storage {url.database}: is no file; name another with --storage sqlite:///FILE.db")
    if file.is_dir():
        raise UserError(f"storage {url.database}: is a folder; name a file, as in sqlite:///{url.database}/study.db")
    return file


def artifact_folder(address: str) -> Path:
    """The folder of artifacts: NAME.artifacts beside NAME.db; ./artifacts unless the database is a SQLite file."""
    scheme, _, path = address.partition(":///")
    return Path(path.partition("?")[0]).with_suffix(".artifacts") if scheme.startswith("sqlite") else Path("artifacts")


def find_study(storage: BaseStorage, name: str) -> optuna.Study | None:
    """The study of this name, if the storage has it."""
    try:
        return ValidatedStudy(name, storage)
    except KeyError:
        return None


def stored(address: str, name: str) -> optuna.Study | None:
    """The study of this name in the storage of a URL, if both are there."""
    storage = open_storage(address, create=False)
    return find_study(storage, name) if storage else None


def names_in(storage: BaseStorage) -> list[str]:
    """The names of a storage's studies in the order of their creation."""
    with readable("in the storage"):
        return [study.study_name for study in sorted(storage.get_all_studies(), key=lambda study: study._study_id)]


def file_system(file: Path) -> str:
    """The type of a file's file system (the file need not exist); "" if unknown."""
    path = file.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(reversed(mounts), key=lambda part: len(Path(part.mountpoint).parts)).fstype if mounts else ""


def is_network(kind: str) -> bool:
    """Whether a type is that of a network file system, also behind FUSE."""
    return bool(NETWORK.fullmatch(kind.lower().removeprefix("fuse.")))


def network_warning(address: str) -> str | None:
    """A warning for a SQLite file on a network file system; None for any other storage."""
    file = make_url(address).database if address.startswith("sqlite") else None
    kind = file_system(Path(file)) if file else ""
    if not is_network(kind):
        return None
    return (
        f"warning: {file} lies on a network file system ({kind}), where SQLite's locks do not work: only one "
        "machine may open it. For several, run `python tune.py serve` on one and give the others --storage "
        "grpc://HOST:13000, or use PostgreSQL (docs/serving.md)"
    )
