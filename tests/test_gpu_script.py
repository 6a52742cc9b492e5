"""The command line of scripts/gpu; scripts/test rehearses the rest of it."""

import ast
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from expect import slow

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


@slow
def test_what_is_not_run(tmp_path: Path) -> None:
    assert said("--wheels") == "--wheels: into which folder?"
    assert said(tmp_path) == f"{tmp_path}: has no wheels; `scripts/gpu --wheels {tmp_path}` downloads them"
    page = REPO / "docs" / "gpu.md"
    assert said("--page", page, ATP_TUNE_GPU_TESTS_ON="cpu") == "a rehearsal writes no docs/gpu.md"


def test_it_ends_within_nine_minutes(script: Any) -> None:
    """By its limits, with 30 seconds to unpack wheels and to name the machine."""
    assert script.TESTS + sum(script.BENCHMARKS.values()) + 30 <= 9 * 60


def imported(folder: Path) -> set[str]:
    """What tests/gpu and conftest import, and the files of tests that they import, wherever that stands in a file."""
    found, left = set[str](), [*folder.glob("gpu/*.py"), folder / "conftest.py"]
    seen = set[Path]()
    while left:
        if (file := left.pop()) in seen or not file.exists():
            continue
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            own = [name.partition(".")[0] for name in names]
            left += [place / f"{name}.py" for name in own for place in (folder, folder / "gpu")]
            found.update(own)
    return found - {file.stem for file in seen}


def test_what_the_tests_import_is_there_or_brought(script: Any) -> None:
    """On a machine that had what the script's head says no test was collected, for want of hypothesis.

    The rehearsal imports no other packages either. Fixtures that tests/gpu does not use import some more.
    """
    lacking = script.lacking()
    assert imported(REPO / "tests") & lacking == {"hypothesis", "datasets", "psycopg", "pyarrow"}
    assert {"accelerate", "pandas", "xdist"} <= lacking
    assert not lacking & {"optuna", "alembic", "pytest", "_pytest", "pluggy", "torch", "triton", "tokenizers", "yaml"}


@slow
def test_what_is_stopped_says_so(script: Any) -> None:
    environment = dict(os.environ)
    ran = script.run([sys.executable, "-c", "print('one', flush=True); import time; time.sleep(60)"], environment, 21)
    assert (ran.code, ran.out, ran.ended) == (None, "one\n", "was stopped: it took too long")
    assert script.run([sys.executable, "-c", "raise SystemExit(3)"], environment, 60).ended == "ended with exit code 3"


@slow
def test_the_page_tells_of_every_test(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of those that failed: pytest itself writes the report that is read."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n\n"
        "def test_good(): ...\n\ndef test_bad(): assert 0\n\n@pytest.mark.skip('no card')\ndef test_away(): ...\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setattr(script, "REPO", tmp_path)
    ran, page = script.tests({**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, str(tmp_path))
    assert ran.code == 1
    assert page.startswith("1 passed, 1 failed, 1 were skipped, in ")
    assert "- skipped, no card: 1\n- **failed**: `test_bad` of tests.gpu.test_it\n" in page


@slow
def test_a_run_that_is_cut_off_keeps_what_it_found(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What tells most comes first; a warning of an unknown version fails no test, though the project's would."""
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    for name, text in (
        ("studies", "def test_hangs(): os.kill(os.getppid(), signal.SIGALRM); time.sleep(60)"),  # its time is over
        ("bits", "def test_bits(): warnings.warn('a new version')"),
        ("unknown", "def test_last(): ..."),
    ):
        head = "import os, signal, time, warnings\nimport pytest\npytestmark = pytest.mark.gpu\n\n"
        (tmp_path / "tests" / "gpu" / f"test_gpu_{name}.py").write_text(f"{head}{text}\n")
    ini = "[pytest]\nmarkers = gpu\ntimeout = 900\nfilterwarnings = error\n"  # `timeout` of a plug-in that is not there
    (tmp_path / "pytest.ini").write_text(ini)
    monkeypatch.setattr(script, "REPO", tmp_path)
    ran, page = script.tests({**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, str(tmp_path))
    assert ran.code is None
    assert page.startswith("1 passed, 0 failed, 0 were skipped, in ")
    assert "- **pytest was stopped: it took too long**: others were not run\n" in page
    assert "tests/gpu/test_gpu_bits.py::test_bits PASSED" in ran.out  # a line for each test as it ends
