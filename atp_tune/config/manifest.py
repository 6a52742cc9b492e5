"""The manifest of a sparse checkpoint: the SHA-256 of its files, and the environment in which they were written."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Annotated

from pydantic import AfterValidator, Field

from atp_tune import __version__
from atp_tune.utils.registry import FrozenModel
from atp_tune.utils.system import cpu_field

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "safetensors", "optuna")
INSTRUCTIONS = (  # those that torch chooses its kernels by
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx10", "amx_bf16", "amx_int8",
    "asimd", "bf16", "sve", "sve2",
)  # fmt: skip


def _file_name(name: str) -> str:
    if not name or name in (".", "..") or "\0" in name or PurePath(name).name != name:
        raise ValueError("must be the name of a file of the folder")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Environment(FrozenModel):
    """The machine and the versions that computed the weights; `device` names the threads of a CPU too."""

    processor: str
    instructions: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    device: str | None = None


class Manifest(FrozenModel):
    """The SHA-256 of each file of the folder, without those that describe it, and where they were written."""

    files: dict[FileName, SHA256]
    environment: Environment


def sha256_by_name(folder: Path, without: tuple[str, ...]) -> dict[str, str]:
    """The SHA-256 of each visible file of a folder, read to its last byte."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return {name: digest(folder / name) for name in names if name not in without}


def digest(file: Path) -> str:
    """The SHA-256 (hex) of a file, without the cache, which goes by size and times."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def environment(device: str | None = None) -> Environment:
    """The environment of this process, without a library being imported."""
    flags = (cpu_field("flags") or cpu_field("Features")).split()
    return Environment(
        processor=cpu_field("model name") or platform.processor() or platform.machine(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={"atp_tune": __version__, **{name: own for name in PACKAGES if (own := installed(name))}},
        device=device,
    )


@cache
def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
