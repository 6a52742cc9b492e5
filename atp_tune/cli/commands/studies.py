"""`tune.py studies`: lists the studies."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from atp_tune.cli.options import load_study, wrong
from atp_tune.cli.terminal import console, gib, table

if TYPE_CHECKING:
    from atp_tune.api.catalogue import Entry
    from atp_tune.api.environment import Accelerators, MachineReport
    from atp_tune.results.status import Listed


def studies(*, json: bool = False) -> None:
    """List the studies in `studies/` and how far each of them is.

    Example: `python tune.py studies`
    """
    from atp_tune.results.status import to_json
    from atp_tune.spec.finding import known

    found = [study for path in known() for study in _listed(path)]
    if json:
        print(to_json(found))
        return
    rows = table("study", "state", "what")
    rows.columns[0].no_wrap = False  # beside a long name the description would have no room
    for one in found:
        rows.add_row(one.name, _state(one), one.error or one.description.removeprefix(f"{one.name}: "))
    console.print(rows)


def _state(study: "Listed") -> str:
    if study.state in ("complete", "unfinished"):
        best = f", best {study.best.value:.2f}" if study.best else ""
        return f"{study.done} of {study.total}{best}"
    return "see status" if study.state == "unknown" else study.state


def _listed(path: Path) -> "list[Listed]":
    """The study that a study file names, then the studies that were run from it with `--study-name`."""
    from atp_tune.errors import UserError
    from atp_tune.results.status import invalid, listed
    from atp_tune.results.summary import summarise
    from atp_tune.spec.studyfile import load
    from atp_tune.storage.fingerprint import is_screening
    from atp_tune.storage.opening import find_study, names_in, open_storage

    try:
        file = load(str(path))
        db = open_storage(file.storage_url, create=False) if file.database else None
        found = [find_study(db, name) for name in names_in(db)] if db else []
        own = {study.study_name: summarise(study) for study in found if study and not is_screening(study)}
        first = listed(file, own.pop(file.name, None))
        others = (one for one in own.values() if one.made_from and one.made_from.name == file.name)
        return [first, *(listed(file, one) for one in others)]
    except UserError as error:
        return [invalid(path, str(error))]


# --- `tune.py plugins`: lists the pruners, allocations, scores, sources of texts and samplers that are known.


def plugins(
    file: list[Path] | None = None,
    *,
    study: str | None = None,
    json: bool = False,
    trust_plugins: bool = False,
    set_: list[str] | None = None,
) -> None:
    """List what a study can name: pruners, allocations, scores, sources of texts and samplers.

    They are built in, come from installed packages by entry points, or from files, whose code runs only with
    `--trust-plugins`. A pruner's settings are keys of its table in a study file, as in `--set prune.wanda.compare=row`;
    the bounds of an allocation's parameters are those at 60 % of a Llama with 32 blocks. docs/plugins.md says how to
    write one.

    Example: `python tune.py plugins`

    Example: `python tune.py plugins examples/plugins/ria.py --trust-plugins`

    Options:
        file [FILE.py]...: List the plug-ins of these files too.
        study NAME: List the plug-ins that this study names too.
    """
    from atp_tune.api.catalogue import entries
    from atp_tune.cli.terminal import quiet
    from atp_tune.errors import UserError
    from atp_tune.plugins import ASK, registered_in
    from atp_tune.results.status import to_json
    from atp_tune.spec.plugged import named_in

    if set_ and study is None:
        raise wrong("--set", "only with --study")
    named = []
    with quiet():
        for each in file or ():
            if not trust_plugins:
                raise UserError(f"{each}: is Python code, which is not run; read it, then allow it with {ASK}")
            named += registered_in(each)
        if study is not None:
            loaded = load_study(study, None, None, set_, trust_plugins)
            named += [(one.kind, one.short) for one in named_in(loaded.study)]
        found = entries(named)
    if json:
        print(to_json(found))
        return
    for kind in dict.fromkeys(entry.kind for entry in found):
        console.print(f"{kind}s" if kind != "source of texts" else "sources of texts")
        _show([entry for entry in found if entry.kind == kind])


def _show(entries: "list[Entry]") -> None:
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        source = "" if entry.origin == "built in" else f" ({entry.origin})"
        console.print(f"  {entry.name:<{width}}  {entry.about}{source}")
        for one in entry.settings:
            about = f": {one.description}" if one.description else ""
            console.print(f"  {'':<{width}}    {one.name} = {one.default}, {one.type}{about}")
        for name, (low, high) in entry.parameters.items():
            console.print(f"  {'':<{width}}    {name} in [{low:.4g}, {high:.4g}]")


# --- `tune.py schema`: prints the JSON schema of study files.


def schema() -> None:
    """Print the JSON schema of study files, by which editors complete keys and mark mistakes.

    It is shipped beside the studies as `study.schema.json`. A study file names it in its first line,
    `#:schema ./study.schema.json`, which Taplo and Even Better TOML (VS Code) read.

    Example: `python tune.py schema > study.schema.json`
    """
    from atp_tune.spec.writing import schema_text

    print(schema_text(), end="")


# --- `tune.py env`: prints what a bug report needs.


def env(*, json: bool = False) -> None:
    """Print what a bug report needs: versions, CPU, memory, GPUs, caches, and which extras are installed.

    Variables that may hold a password are left out, and the home folder is written as ~.
    `atp_tune/api/environment.py` lists the keys of the JSON document.

    Example: `python tune.py env`
    """
    from atp_tune.api.environment import environment
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
