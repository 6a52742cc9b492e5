"""`tune.py env`: prints what a bug report needs."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from atp_tune.cli.options import Json
from atp_tune.cli.terminal import console, gib

if TYPE_CHECKING:
    from atp_tune.environment import Accelerators, MachineReport


def env(json: Json = False) -> None:
    """Print what a bug report needs: versions, CPU, memory, GPUs, caches, and which extras are installed.

    Variables that may hold a password are left out, and the home folder is written as ~.
    `atp_tune/environment.py` lists the keys of the JSON document.

    Example: `python tune.py env`
    """
    from atp_tune.environment import environment
    from atp_tune.results.status import to_json

    found = environment()
    if json:
        print(to_json(found))
        return
    for name, text in _lines(found):
        console.print(f"{name and name + ':':<11}{text}")


def _lines(found: "MachineReport") -> Iterator[tuple[str, str]]:
    yield "atp_tune", found.atp_tune
    yield "python", f"{found.python}, {found.executable}"
    yield "system", found.system
    yield "packages", _packages(found.versions)
    missing = [name for name, packages in found.extras.items() if None in packages.values()]
    have = {name: packages for name, packages in found.extras.items() if name not in missing}
    yield "extras", "; ".join(f"{name} ({_packages(packages)})" for name, packages in have.items()) or "none"
    yield "", f"not installed: {', '.join(missing) or 'none'}"
    if found.cpu:
        cpu = found.cpu
        yield "CPU", f"{cpu.name}: {', '.join(cpu.flags) or 'instruction sets are not known'}"
        cores = f"{cpu.cores} cores, {cpu.logical} logical, {cpu.usable} usable"
        yield "", f"{cores}; torch: {cpu.torch_threads} threads, {cpu.torch_capability}"
    if found.memory:
        memory = found.memory
        limit = "no limit" if memory.cgroup_limit is None else f"limit {gib(memory.cgroup_limit)}"
        yield "memory", f"{gib(memory.total)}, available {gib(memory.available)}, swap {gib(memory.swap)}"
        yield "", f"{limit} of control groups"
    if found.gpus:
        yield from _gpus(found.gpus)
    for name, folder in found.caches.items():
        size = "missing" if folder.bytes is None else gib(folder.bytes)
        yield "cache", f"{name}: {folder.path} ({size})"
    yield "variables", ", ".join(f"{name}={value}" for name, value in found.variables.items()) or "none"
    for problem in found.problems:
        yield "problem", problem


def _packages(versions: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version or '–'}" for name, version in versions.items())


def _gpus(gpus: "Accelerators") -> Iterator[tuple[str, str]]:
    for index, gpu in enumerate(gpus.devices):
        yield (
            f"GPU {index}",
            f"{gpu.name}, {gib(gpu.memory)} ({gib(gpu.free)} free), compute capability {gpu.capability}",
        )
    if not gpus.devices:
        yield "GPU", "MPS" if gpus.mps else "none"
    yield "", f"driver {gpus.driver or 'none'}; torch built with {gpus.built_with or 'no CUDA'}; Triton {gpus.triton}"
