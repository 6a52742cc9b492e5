"""Finds what a bug report needs of the machine and its Python. Reads the machine only; the cache is not created.

It also works where torch cannot be imported, and says why. Paths begin with ~ in the user's home folder; variables
that may hold a password or a token are left out.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import psutil

from atp_tune import __version__
from atp_tune.config.manifest import INSTRUCTIONS, installed
from atp_tune.utils.cache import cache_root
from atp_tune.utils.registry import FrozenModel
from atp_tune.utils.system import EXTRAS, Said, cpu_flags, cpu_name, log

Found = TypeVar("Found")

PACKAGES = (  # whose versions are often a cause
    "torch", "transformers", "optuna", "tokenizers", "numpy", "accelerate", "gguf", "huggingface-hub",
    "pydantic", "safetensors", "scipy", "sqlalchemy", "triton", "typer",
)  # fmt: skip
VARIABLES = (
    "ATP_TUNE_CACHE", "ATP_TUNE_DEVICE_MEMORY", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_CACHE", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "SLURM_JOB_ID", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip


class Processor(FrozenModel):
    """The CPU: its instruction sets that matter; cores in all and those that this process may use; torch's threads.

    `torch_capability` names the instruction set of torch's own kernels.
    """

    name: str
    flags: tuple[str, ...]
    cores: int | None
    logical: int | None
    usable: int
    torch_threads: int
    torch_capability: str


class HostMemory(FrozenModel):
    """Bytes: of the machine, available to this process, the limit of its control groups, swap."""

    total: int
    available: int
    cgroup_limit: int | None
    swap: int


class Accelerator(FrozenModel):
    """A GPU: memory and free memory in bytes, and its compute capability."""

    name: str
    memory: int
    free: int
    capability: str


class Accelerators(FrozenModel):
    """The GPUs, the driver, the CUDA (or HIP) that torch was built with, and whether Triton's kernel runs.

    `triton`: "works", or why it does not.
    """

    devices: tuple[Accelerator, ...]
    driver: str | None
    built_with: str | None
    mps: bool
    triton: str


class CacheFolder(FrozenModel):
    """A folder of a cache; `bytes` on the disk, null if it is missing."""

    path: str
    bytes: int | None


class MachineReport(FrozenModel):
    """The machine and its Python; null for a package that is not installed, and for what only torch knows, without it.

    `extras`: the packages of each optional extra. `problems`: what could not be found out, and why.
    """

    atp_tune: str
    python: str
    executable: str
    system: str
    versions: dict[str, str | None]
    extras: dict[str, dict[str, str | None]]
    cpu: Processor | None
    memory: HostMemory | None
    gpus: Accelerators | None
    caches: dict[str, CacheFolder]
    variables: dict[str, str]
    problems: tuple[str, ...]


def environment() -> MachineReport:
    """Describes this machine and its Python."""
    from huggingface_hub import constants

    problems = list[str]()

    def tried(what: str, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except Exception as error:  # a broken installation or driver is what a bug report is about
            problems.append(f"{what}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            return None

    def versions(packages: Iterable[str]) -> dict[str, str | None]:
        return {name: installed(name) for name in packages}

    try:  # the distribution of a Linux
        name = f" ({platform.freedesktop_os_release().get('PRETTY_NAME', 'Linux')})"
    except OSError:
        name = ""
    # The folders of this program's cache, and of the hub's models and datasets.
    datasets = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME, "datasets")))
    caches = {"atp_tune": cache_root(), "hub": Path(constants.HF_HUB_CACHE), "datasets": datasets}
    return MachineReport(
        atp_tune=__version__,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        executable=_home_hidden(sys.executable),
        system=platform.platform() + name,
        versions=versions(PACKAGES),
        extras={name: versions(packages.values()) for name, packages in EXTRAS.items()},
        cpu=tried("CPU", _processor),
        memory=tried("memory", _memory),
        gpus=tried("GPUs", _accelerators),
        caches={name: CacheFolder(path=_home_hidden(str(path)), bytes=_size(path)) for name, path in caches.items()},
        variables={name: _home_hidden(os.environ[name]) for name in VARIABLES if name in os.environ},
        problems=tuple(problems),
    )


def _processor() -> Processor:
    import torch

    flags = cpu_flags()
    return Processor(
        name=cpu_name(),
        flags=tuple(flag for flag in INSTRUCTIONS if flag in flags),
        cores=psutil.cpu_count(logical=False),
        logical=psutil.cpu_count(),
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
    )


def _memory() -> HostMemory:
    from atp_tune.checkpoints.devices import cgroup_limit, host_memory

    return HostMemory(
        total=psutil.virtual_memory().total,
        available=host_memory(),
        cgroup_limit=cgroup_limit(),
        swap=psutil.swap_memory().total,
    )


def _accelerators() -> Accelerators:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        devices.append(
            Accelerator(
                name=torch.cuda.get_device_name(index),
                memory=memory,
                free=free,
                capability="{}.{}".format(*torch.cuda.get_device_capability(index)),
            )
        )
    try:  # of NVIDIA's kernel module, on Linux
        driver = Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        driver = None
    hip = torch.version.hip
    return Accelerators(
        devices=tuple(devices),
        driver=driver,
        built_with=f"HIP {hip}" if hip else f"CUDA {torch.version.cuda}" if torch.version.cuda else None,
        mps=torch.backends.mps.is_available(),
        triton=_triton(),
    )


def _triton() -> str:
    """Whether SparseGPT's kernel compiles and runs on the first GPU."""
    import torch

    from atp_tune.pruners import sparsegpt

    if find_spec("triton") is None:
        return "is not installed"
    if not torch.cuda.is_available():
        return "has no GPU to run on"
    reasons = list[str]()
    handler = Said(reasons.append)
    log.addHandler(handler)
    try:
        sparsegpt.on_gpu(torch.device("cuda", 0))
    finally:
        log.removeHandler(handler)
    return "; ".join(reasons) or "works"


def _size(folder: Path) -> int | None:
    """Bytes of the files in a folder; links count as links. None if it is missing."""
    if not folder.expanduser().is_dir():
        return None
    total = 0
    for root, _, names in os.walk(folder.expanduser()):
        for name in names:
            with suppress(OSError):  # it was removed meanwhile
                total += Path(root, name).lstat().st_size
    return total


def _home_hidden(text: str) -> str:
    """The text with ~ for the home folder, which names the user."""
    home = str(Path.home())
    return text if home == "/" else text.replace(home, "~")
