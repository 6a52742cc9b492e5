"""What is said where packages are missing, or Python is too old: one line, with what to type instead."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tinystudy import TUNE

from atp_tune.errors import UserError
from atp_tune.extras import EXTRAS, missing, remedy, require

PROJECT = tomllib.loads((TUNE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
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
    assert f"install -e {TUNE.parent}" in line


def test_a_python_that_is_too_old() -> None:
    ast.parse(TUNE.read_text(encoding="utf-8"), feature_version=(3, 6))
    assert said("-S", "-c", OLD).startswith("error: needs Python >= 3.11, this is 3.9; ")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "optuna", "plotly"])
def test_only_some_packages_are_installed(module: str, place: Path) -> None:
    words = ["tune.py", "--study", str(place / "tiny.toml")]
    absent = f"import runpy, sys; sys.modules[{module!r}] = None; sys.argv = {words}"
    run = f"{absent}; runpy.run_path('tune.py', None, '__main__')"
    assert said("-c", run).startswith(f"error: {module} is not installed; run: ")


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRAS, "hub", {"no_such_module": "no-such", "sys": "sys"})
    assert missing("hub", "sys") is None
    with pytest.raises(UserError) as caught:
        require("hub", "source: c4")
    assert str(caught.value) == "source: c4: no-such is not installed; run: pip install 'atp-tune[hub]'"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("grpc", "grpcio is not installed; run: pip install 'atp-tune[serve]'"),
        ("google.protobuf.message", "protobuf is not installed; run: pip install 'atp-tune[serve]'"),
        ("lm_eval.tasks", "lm-eval is not installed; run: pip install 'atp-tune[eval]'"),
        ("torch.nn", "torch is not installed; run: "),
    ],
)
def test_what_to_type(module: str, words: str) -> None:
    assert remedy(module).startswith(words)


def test_dev_has_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = {wish for name, wishes in extras.items() if name not in ("dev", "fuzz") for wish in wishes}
    assert wanted <= set(extras["dev"])
