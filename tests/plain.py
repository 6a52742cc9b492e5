"""An environment of the plain installation: of the packages here, only the dependencies of pyproject.toml and theirs.

The packages are links, since torch alone takes minutes to install; pip then finds nothing to download.
"""

import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


def clean_variables(**more: str) -> dict[str, str]:
    """The variables of this process, without those that lead another Python to its packages."""
    return {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | more


def environment(folder: Path, *installed: str | Path, cwd: Path = REPO, link: bool = True) -> Path:
    """Makes an environment in which pip has installed these words; returns the folder of its commands."""
    venv.create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    if link:
        link_packages(site, needed(PROJECT["dependencies"]))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    alone = ["--no-deps"] if link else []  # pip must not replace what a link leads to; `check` says what is missing
    for words in (["install", "-q", *alone, *map(str, installed)], ["check"]):
        command = [*pip, *words]
        done = subprocess.run(command, cwd=cwd, env=clean_variables(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


def needed(wishes: Iterable[str]) -> dict[str, Distribution]:
    """The distributions that requirements need, by their names; ImportError if one is not installed here."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(wish), "") for wish in wishes]
    while waiting:
        wish, extra = waiting.pop()
        if wish.marker is not None and not wish.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wish.name)
        for extra in {*wish.extras, ""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                found[name] = distribution(name)
                waiting += [(Requirement(text), extra) for text in found[name].requires or ()]
    return found


def link_packages(site: Path, wanted: dict[str, Distribution]) -> None:
    """Links to the files of distributions, and to folders in which no other one has any."""
    others = {place for one in distributions() if canonicalize_name(one.name) not in wanted for place in _folders(one)}
    for one in wanted.values():
        for file in one.files or ():
            if ".." in file.parts or file.suffix == ".pyc":
                continue
            parents = [PurePosixPath(*file.parts[:depth]) for depth in range(1, len(file.parts) + 1)]
            whole = next(place for place in parents if place not in others)
            link = site / whole
            if not link.is_symlink():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(str(one.locate_file(str(whole)))))


def _folders(one: Distribution) -> set[PurePosixPath]:
    """The folders that hold files of a distribution."""
    return {place for file in one.files or () for place in PurePosixPath(*file.parts).parents}
