"""What is published: an sdist, the wheel that is built from it, and the commands of the wheel, far from the checkout.

`ATP_TUNE_DIST` names a folder with both, which scripts/release has built.
"""

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from zipfile import ZipFile

import pytest
from plain import PROJECT, REPO, clean_variables, environment

KERNEL = "atp_tune/packed/_kernel.so"  # in the tree if it was compiled there; in a wheel if there was a compiler
Run = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from it."""
    if built := os.environ.get("ATP_TUNE_DIST"):
        return Path(built)
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPO)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of an environment that has the wheel and what it needs, but no package of an extra."""
    commands = environment(tmp_path_factory.mktemp("plain"), "--no-index", wheel)

    def run(*words: str | Path, cwd: Path) -> "subprocess.CompletedProcess[str]":
        command = [str(commands / words[0]), *map(str, words[1:])]
        return subprocess.run(command, cwd=cwd, env=clean_variables(), capture_output=True, text=True, check=False)

    return run


def test_everything_is_inside(wheel: Path, dist: Path) -> None:
    package = [path for path in (REPO / "atp_tune").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {str(path.relative_to(REPO)) for path in package}
    studies = {f"atp_tune/studies/{path.name}" for path in (REPO / "studies").glob("*.toml")}
    inside = {name for name in ZipFile(wheel).namelist() if name.startswith("atp_tune/")}
    assert files | studies | {"atp_tune/studies/study.schema.json"} | {KERNEL} == inside | {KERNEL}
    assert (KERNEL in inside) == (not wheel.name.endswith("-py3-none-any.whl"))
    assert {"atp_tune/py.typed", "atp_tune/report/page.css", "atp_tune/report/page.js"} < inside
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "tune.py", "CHANGELOG.md", "LICENSE", "studies/smol.toml", "tests/test_wheel.py"} < names
    sources = {f"atp_tune/packed/{name}" for name in ("kernel.c", "kernel_amx.h", "kernel_codes.h", "kernel_decoder.h")}
    assert {"hatch_build.py", *sources} < names and KERNEL not in names


def test_the_first_words(run: Run, tmp_path: Path) -> None:
    where = run("python", "-c", "import atp_tune; print(atp_tune.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(where).parents[1].name == "site-packages" and not Path(where).is_relative_to(REPO)
    assert run("atp-tune", "--version", cwd=tmp_path).stdout == f"atp_tune {PROJECT['version']}\n"
    told = run("atp-tune", "--help", cwd=tmp_path).stdout
    assert told.startswith("Usage: atp-tune [OPTIONS]") and "`atp-tune --study smol`" in told and "tune.py" not in told
    assert run("python", "-m", "atp_tune", "--help", cwd=tmp_path).stdout.startswith(
        "Usage: python -m atp_tune [OPTIONS]"
    )
    listed = run("atp-tune", "studies", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    shown = {line.split()[0] for line in listed.stdout.splitlines() if line.strip()}
    assert {path.stem for path in (REPO / "studies").glob("*.toml")} <= shown


def test_a_study_and_its_report(run: Run, place: Path) -> None:
    done = run("atp-tune", "--study", "tiny.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "atp-tune apply --config tiny.best.json" in done.stdout and "tune.py" not in done.stdout
    assert json.loads((place / "tiny.best.json").read_text())["plan"]["levels"]
    with closing(sqlite3.connect(place / "tiny.db")) as database:
        attributes = dict(database.execute("SELECT key, value_json FROM study_system_attributes"))
    assert {"dashboard:note_str:0", "dashboard:plot_data:perplexity:0"} < attributes.keys()
    note = "".join(value for key, value in attributes.items() if key.startswith("dashboard:note_str:"))
    assert "atp-tune --study" in note and "tune.py" not in note
    report = run("atp-tune", "report", "--study", "tiny.toml", "--out", "page.html", cwd=place)
    assert report.returncode == 0, report.stderr
    page = (place / "page.html").read_text()
    assert "atp-tune status --study tiny" in page and "python tune.py" not in page
    scored = run("atp-tune", "evaluate", "--config", "tiny.best.json", cwd=place)
    assert scored.returncode == 2
    assert scored.stderr == "error: evaluate: lm-eval is not installed; run: pip install 'atp-tune[eval]'\n"
    there = run("python", "-c", "import sys; print(sys.executable)", cwd=place).stdout.strip()
    words = ["pip", "--python", there, "install", "--no-index", "atp-tune[eval]"]
    pip = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    assert "No matching distribution found for lm-eval" in pip.stderr  # which it looks for, since atp-tune is there
