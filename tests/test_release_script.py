"""scripts/release, in a small copy of the repository under git: what it refuses, says and makes."""

import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
CHECK = "#!/bin/sh\necho checked\n"
SMOKE = """\
import os, pytest
from pathlib import Path

@pytest.mark.slow
def test_it():
    assert {path.suffix for path in Path(os.environ["ATP_TUNE_DIST"]).iterdir()} == {".gz", ".whl"}
"""
FILES = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore")
PYTEST = '[tool.pytest.ini_options]\nmarkers = ["slow"]\n'
CHANGES = "# Changelog\n\n## Unreleased\n\n- Something new.\n\n## 0.0.9 (2026-01-01)\n\n- Something old.\n"

pytestmark = pytest.mark.slow


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository with this one's build files, and checks that take no time."""
    place = tmp_path / "copy"
    for name in ("atp_tune", "studies"):
        shutil.copytree(REPO / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*FILES, "CITATION.cff", "scripts/release"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, place / name)
    project, _, _ = (place / "pyproject.toml").read_text().partition("[tool.pytest.ini_options]")
    project = re.sub(r'^version = ".*"$', 'version = "0.1.0"', project, count=1, flags=re.MULTILINE)
    (place / "pyproject.toml").write_text(project + PYTEST)
    (place / "tests").mkdir()
    (place / "tests" / "test_wheel.py").write_text(SMOKE)
    (place / "CHANGELOG.md").write_text(CHANGES)
    (place / "scripts" / "check").write_text(CHECK)
    (place / "scripts" / "check").chmod(0o755)
    git(place, "init", "-q", "-b", "main")
    for key, value in {"user.name": "Ada", "user.email": "ada@example.org", "commit.gpgsign": "false"}.items():
        git(place, "config", key, value)
    commit(place)
    return place


def git(place: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=place, check=True, capture_output=True, text=True).stdout


def commit(place: Path) -> None:
    git(place, "add", "-A")
    git(place, "commit", "-qm", "made")


def release(place: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "scripts/release", *words]
    return subprocess.run(command, cwd=place, env=clean, capture_output=True, text=True, check=False)


def refused(place: Path, *words: str) -> str:
    done = release(place, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert git(place, "status", "--porcelain") in ("", "?? new\n")
    return done.stderr


def test_a_release(copy: Path) -> None:
    done = release(copy, "0.2.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checked" in done.stdout and "PASSED" in done.stdout and "1 passed" in done.stdout
    assert done.stdout.endswith(
        "v0.2.0 is tagged here; to publish it:\n  git push origin HEAD v0.2.0\n"
        "  python -m twine upload dist/atp_tune-0.2.0.tar.gz 'dist/atp_tune-0.2.0-py3-none-*.whl'\n"
    )
    assert git(copy, "describe", "--exact-match").strip() == "v0.2.0"
    assert git(copy, "log", "-1", "--format=%s").strip() == "Release 0.2.0"
    assert git(copy, "show", "--stat", "--format=", "HEAD").count("|") == 3
    assert git(copy, "status", "--porcelain") == ""
    assert '\nversion = "0.2.0"\n' in (copy / "pyproject.toml").read_text()
    assert "\nversion: 0.2.0\n" in (copy / "CITATION.cff").read_text()
    assert (copy / "CHANGELOG.md").read_text() == CHANGES.replace(
        "## Unreleased\n", f"## Unreleased\n\n## 0.2.0 ({date.today().isoformat()})\n"
    )
    assert "has a tag already" in refused(copy, "0.2.0")
    assert "CHANGELOG.md says nothing under ## Unreleased" in refused(copy, "0.2.1")


def test_a_check_that_fails_leaves_everything_as_it_was(copy: Path) -> None:
    (copy / "scripts" / "check").write_text("#!/bin/sh\nexit 1\n")
    commit(copy)
    done = release(copy, "0.2.0")
    assert done.returncode == 2
    assert done.stderr == "release: error: failed: scripts/check; the files are as they were\n"
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""


def test_what_is_refused(copy: Path) -> None:
    assert "1.0: is no version" in refused(copy, "1.0")
    assert "0.1.0rc1: is older than 0.1.0" in refused(copy, "0.1.0rc1")
    dry = release(copy, "0.2.0", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "git tag -a v0.2.0" in dry.stdout and "twine upload" in dry.stdout
    assert git(copy, "status", "--porcelain") == git(copy, "tag") == ""
    (copy / "new").write_text("")
    assert "the tree is not clean (1 files)" in refused(copy, "0.2.0")
