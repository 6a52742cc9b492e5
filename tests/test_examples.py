"""The examples run: each script on a tiny model, the notebook as a whole."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from processes import output
from tinystudy import few_steps

from atp_tune.api.presets import PRESETS

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow
# Windows, and points that are screened; the texts are short too. `test_tune_a_model` takes what a user takes.
FEW = replace(PRESETS["quick"], seqlen=64, calibration=4, validation=8, test=8, screened=6, confirmed=3)


class Example:
    """Runs an example in this process, in a folder of its own, without the seconds of its imports."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._place, self._monkeypatch, self._capsys = place, monkeypatch, capsys
        monkeypatch.chdir(place)
        monkeypatch.setitem(PRESETS, "quick", FEW)
        few_steps(monkeypatch)
        monkeypatch.setattr("pydoc_data.topics.topics", {key: text[:1500] for key, text in topics.items()})

    def __call__(self, name: str, *arguments: str) -> str:
        """What it prints."""
        self._monkeypatch.setattr(sys, "argv", [name, str(self._place / "model"), *arguments])
        self._capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return self._capsys.readouterr().out


@pytest.fixture
def example(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    return Example(place, monkeypatch, capsys)


def test_tune_a_model(place: Path) -> None:
    """As a person runs it, in a process of its own."""
    said = output(sys.executable, EXAMPLES / "tune_a_model.py", place / "model", place / "out", cwd=place)
    assert "<Result model-60-packaged: 4 of 4 trials" in said or "<Result model-60: 4 of 4 trials" in said
    assert f"{place / 'out'}: perplexity" in said
    assert (place / "out" / "model.safetensors").exists()


def test_how_sparse_can_it_be(example: Example) -> None:
    assert "of the weights can go: perplexity" in example("how_sparse_can_it_be.py")


def test_prune_in_memory(example: Example) -> None:
    lines = example("prune_in_memory.py").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["uniform", "('atp', {'beta'"]
    assert all(", dense " in line for line in lines)


def test_compare_pruners(example: Example) -> None:
    said = example("compare_pruners.py")
    assert "'allocation': 'curve'" in said and "against uniform" in said


def test_resume_and_watch(place: Path, example: Example) -> None:
    """The second run finds the study complete: the callback stopped it, or all trials are there."""
    first = example("resume_and_watch.py", str(place / "w.db"))
    assert (place / "w.db").exists()
    assert example("resume_and_watch.py", str(place / "w.db")) == first


FEWER = {
    "trials=4": "trials=2",
    "nsamples=4": "nsamples=2",
    '.nsamples": 4': '.nsamples": 2',
    '.nsamples": 6': '.nsamples": 2',
    "256": "64",
}


def test_the_notebook(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real model, in fewer trials and on shorter texts than a reader takes."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("ATP_TUNE_CACHE", str(smollm2))
    book = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    for words, fewer in FEWER.items():
        cells = [cell for cell in book.cells if cell.cell_type == "code" and words in cell.source]
        assert cells, words
        for cell in cells:
            cell.source = cell.source.replace(words, fewer)
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("application/vnd.plotly.v1+json" in output.get("data", {}) for output in outputs)
    assert any("against uniform" in str(output.get("data", {}).get("text/plain")) for output in outputs)
    assert (tmp_path / "smol-sparse" / "model.safetensors").exists()
