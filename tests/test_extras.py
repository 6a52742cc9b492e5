"""What is said where packages are missing, or Python is too old: one line, with what to type instead."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from expect import parametrize, slow
from tinystudy import TUNE

from atp_tune.utils.system import EXTRAS, as_typed, install, remedy

OLD = "import runpy, sys; sys.version_info = (3, 9, 18, 'final', 0); runpy.run_path('tune.py', run_name='__main__')"


def said(*words: str) -> str:
    """The one line on stderr of a Python that ends with exit code 2."""
    done = subprocess.run([sys.executable, *words], cwd=TUNE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_nothing_is_installed() -> None:
    """-S: as a Python whose site-packages are empty."""
    line = said("-S", "tune.py", "--study", "smol")
    assert line.startswith("error: typer is not installed; run: ")
    assert "-m pip install -e ." in line or ".venv/bin/pip install -e ." in line


def test_a_python_that_is_too_old() -> None:
    ast.parse(TUNE.read_text(), feature_version=(3, 6))
    assert said("-S", "-c", OLD).startswith("error: needs Python >= 3.11, this is 3.9; ")


@slow
@parametrize("module", ["torch", "optuna", "plotly"])
def test_only_some_packages_are_installed(module: str, place: Path) -> None:
    words = ["tune.py", "--study", str(place / "tiny.toml")]
    absent = f"import runpy, sys; sys.modules[{module!r}] = None; sys.argv = {words}"
    run = f"{absent}; runpy.run_path('tune.py', None, '__main__')"
    assert said("-c", run).startswith(f"error: {module} is not installed; run: ")


@parametrize("extra", EXTRAS)
def test_what_to_type(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checkout, elsewhere, and where the package is a wheel: a command for a package that is on no index."""
    monkeypatch.chdir(TUNE.parent)
    assert install(extra) == as_typed(f"pip install -e '.[{extra}]'") == f"pip install -e '.[{extra}]'"
    for module, package in EXTRAS[extra].items():
        assert remedy(f"{module}.part").startswith(f"{package} is not installed; run: pip install -e '.[")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install(extra)) == ["pip", "install", "-e", f"{TUNE.parent}[{extra}]"]
    monkeypatch.setattr("atp_tune.utils.system.IS_CHECKOUT", False)
    assert install(extra) == as_typed(f"pip install -e '.[{extra}]'") == f"pip install 'atp-tune[{extra}]'"
    assert remedy("torch.nn").endswith("pip install atp-tune")
