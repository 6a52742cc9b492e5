"""The examples run: each script on a tiny model, the notebook as a whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
pytestmark = pytest.mark.slow


def example(name: str, place: Path, *arguments: str) -> str:
    """What an example prints; it is run as a person does, in a folder of its own."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), str(place / "model"), *arguments]
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_there_are_five() -> None:
    assert SCRIPTS == [
        "compare_pruners.py", "how_sparse_can_it_be.py", "prune_in_memory.py", "resume_and_watch.py", "tune_a_model.py",
    ]  # fmt: skip


def test_tune_a_model(place: Path) -> None:
    said = example("tune_a_model.py", place, str(place / "out"))
    assert "<Result model-60-packaged: 12 of 12 trials" in said or "<Result model-60: 12 of 12 trials" in said
    assert f"{place / 'out'}: perplexity" in said
    assert (place / "out" / "model.safetensors").exists()


def test_how_sparse_can_it_be(place: Path) -> None:
    assert "of the weights can go: perplexity" in example("how_sparse_can_it_be.py", place)


def test_prune_in_memory(place: Path) -> None:
    lines = example("prune_in_memory.py", place).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["uniform", "('atp', {'beta'"]
    assert all(", dense " in line for line in lines)


def test_compare_pruners(place: Path) -> None:
    said = example("compare_pruners.py", place)
    assert "'allocation': 'curve'" in said and "against uniform" in said


def test_resume_and_watch(place: Path) -> None:
    """The second run finds the study complete: the callback stopped it, or all trials are there."""
    first = example("resume_and_watch.py", place, str(place / "w.db"))
    assert (place / "w.db").exists()
    assert example("resume_and_watch.py", place, str(place / "w.db")) == first


def test_the_notebook(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.chdir(tmp_path)
    book = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    assert any("against uniform" in str(output.get("data", {}).get("text/plain")) for output in outputs)
    assert (tmp_path / "smol-sparse" / "model.safetensors").exists()
