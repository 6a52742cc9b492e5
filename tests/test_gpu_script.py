"""The command line of scripts/gpu; scripts/test rehearses the rest of it."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "gpu"


def said(*words: str | Path, **environment: str) -> str:
    """What a command says that is not to be run."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1].removeprefix("gpu: error: ")


@pytest.fixture(scope="module")
def script() -> Any:
    loader = importlib.machinery.SourceFileLoader("gpu_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_script", loader)
    assert spec is not None
    module = sys.modules["gpu_script"] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.slow
def test_what_is_not_run(tmp_path: Path) -> None:
    assert said("--wheels") == "--wheels: into which folder?"
    assert said(tmp_path) == f"{tmp_path}: has no wheels; `scripts/gpu --wheels {tmp_path}` downloads them"
    page = REPO / "docs" / "gpu.md"
    assert said("--page", page, ATP_TUNE_GPU_TESTS_ON="cpu") == "a rehearsal writes no docs/gpu.md"


def test_names_of_packages(script: Any) -> None:
    names = {script.name_of(wish) for wish in script.dependencies()}
    assert {"torch", "plotly", "tomli-w", "sqlalchemy", *script.UNUSED, *script.THERE[:4]} <= names
    wheels = ["tomli_w-1.2.0-py3-none-any.whl", "numpy-2.5.5-cp312-cp312-manylinux_2_28_x86_64.whl", "PyYAML-6.0-x.whl"]
    assert [script.name_of(wheel) for wheel in wheels] == ["tomli-w", "numpy", "pyyaml"]


@pytest.mark.slow
def test_what_is_stopped_says_so(script: Any) -> None:
    environment = dict(os.environ)
    ran = script.run([sys.executable, "-c", "print('one', flush=True); import time; time.sleep(60)"], environment, 1)
    assert (ran.code, ran.out, ran.ended) == (None, "one\n", "was stopped: it took too long")
    assert script.run([sys.executable, "-c", "raise SystemExit(3)"], environment, 60).ended == "ended with exit code 3"


@pytest.mark.slow
def test_the_page_tells_of_every_test(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of those that failed: pytest itself writes the report that is read."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n\n"
        "def test_good(): ...\n\ndef test_bad(): assert 0\n\n@pytest.mark.skip('no card')\ndef test_away(): ...\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(script, "REPO", tmp_path)
    ran, page = script.tests(dict(os.environ), str(tmp_path))
    assert ran.code == 1
    assert page.startswith("1 passed, 1 failed, 1 were skipped, in ")
    assert "- skipped, no card: 1\n- **failed**: `test_bad` of tests.gpu.test_it\n" in page
