"""Every command and all Python of the README, in an environment made by its install line: with a hub, and without.

The study that it names is the tiny one, and the models of the hub are tiny too; `scripts/wheel` runs the first command
with the real model, of 93 MB. ATP_TUNE_README=install lets pip install every package, in the place of links.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import made_once
from localhub import Uploads, publish_c4, publish_wikitext2, serve
from pages import REPO, blocks, steps
from plain import clean_variables, environment
from test_docs_run import INTERVAL, MODELS, POINT, SHORTER
from tinystudy import TOPICS

pytestmark = pytest.mark.slow
README = REPO / "README.md"
INSTALL = "pip install -e ."
ELSEWHERE = {  # lines of the README that are not run here
    "pip install -e '.[dev]' && python -m pytest": "what CI begins with",
}
CHECKOUT = ("atp_tune", "studies", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "tune.py")
OWN = ("ORG/NAME", "HuggingFaceTB/SmolLM2-135M")
LARGE = f"models/{OWN[0]}/model.safetensors"
NOWHERE = "http://127.0.0.1:9"  # nobody listens there
BEFORE = """
from dataclasses import replace
from huggingface_hub import constants
from pydoc_data.topics import topics
from atp_tune.allocations import gradient
from atp_tune.api.presets import PRESETS
constants.DOWNLOAD_CHUNK_SIZE = 1000  # of a tiny model too there is something when the connection breaks
gradient.STEPS, gradient.FURTHER, gradient.AT_LOWEST = 4, 2, 1
small = dict(trials=4, seqlen=64, calibration=4, validation=4, test=4, screened=4, confirmed=2)
PRESETS["quick"] = replace(PRESETS["quick"], **small)
topics.update({key: text[:1500] for key, text in topics.items()})
"""
BROWSER = """#!/bin/sh
exec "{python}" -c "import pathlib, sys, urllib.request as web
pathlib.Path('shown').write_bytes(web.build_opener(web.ProxyHandler({{}})).open(sys.argv[1]).read())" "$1"
"""
BACK = """
from pathlib import Path
from huggingface_hub import snapshot_download
back = Path(snapshot_download("ORG/NAME", cache_dir="back"))
assert {file.name for file in back.iterdir()} == {file.name for file in Path("smol-sparse").iterdir()}
for name in ("model.safetensors", "tokenizer.json"):  # push leaves names of this machine out of others
    assert (back / name).read_bytes() == Path("smol-sparse", name).read_bytes(), name
"""


@pytest.fixture(scope="module")
def plain(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the install line of the README was run; its environment is in `venv`."""

    def make(folder: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        for name in CHECKOUT:
            copy = shutil.copytree if (REPO / name).is_dir() else shutil.copyfile
            copy(REPO / name, folder / "checkout" / name, **({"ignore": ignored} if (REPO / name).is_dir() else {}))
        words = INSTALL.removeprefix("pip install ").split()
        environment(
            folder / "venv", *words, cwd=folder / "checkout", link=os.environ.get("ATP_TUNE_README") != "install"
        )

    return made_once("plain", make, tmp_path_factory)


@pytest.fixture
def reader(plain: Path, tiny_place: Path, tmp_path: Path) -> Path:
    """The folder of somebody who has run it: studies of the tiny model have the names of the README."""
    place = Path(shutil.copytree(tiny_place, tmp_path / "reader/studies")).parent
    (place / "studies/tiny.toml").rename(place / "studies/smol.toml")
    (place / "vit-sparse").mkdir()
    (place / "photo.jpg").touch()
    return place


def run(plain: Path, place: Path, found: list[list[str] | str], **variables: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each step, in the environment."""
    python, browser = plain / "venv/bin/python", place / "browser"
    browser.write_text(BROWSER.format(python=python))
    browser.chmod(0o755)
    own = {
        "HOME": str(place), "HF_HOME": str(place / "hf"), "ATP_TUNE_CACHE": str(place / "cache"), "COLUMNS": "200",
        "BROWSER": f"{browser} %s &", "HF_HUB_DISABLE_XET": "1",  # whose server is not the hub
    }  # fmt: skip
    done = subprocess.run(
        [python, "-P", REPO / "tests/plainly.py"], input=json.dumps({"before": BEFORE, "steps": found}),
        cwd=place, env=clean_variables(**own, **variables), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"plotly" in (place / "shown").read_bytes()
    answers: list[tuple[int, str, str]] = json.loads(done.stdout)
    return answers


def shortened(step: list[str] | str) -> list[str] | str:
    """A step with options, or Python, that make it as short as the tiny model."""
    if isinstance(step, str):
        return "import shutil; shutil.rmtree('smol-sparse')\n" + step
    at_one = "--size" in step or ("--sparsity" in step and ".." not in step[step.index("--sparsity") + 1])
    own = [*SHORTER["own"], *(POINT if at_one else INTERVAL)]
    serves = ["--port", "0", "--grpc-port", "0"]  # a machine may use those by default for something else
    return step + (own if step[0] in MODELS else []) + (serves if step[0] == "serve" else [])


def check(found: list[list[str] | str], answers: list[tuple[int, str, str]], **refused: str) -> None:
    """Each step has ended well; of a command with a refused word, or an extra's, the one line ends like this."""
    refused["gguf"] = "[gguf]'"
    for step, (code, out, err) in zip(found, answers, strict=True):
        end = next((refused[word] for word in step if word in refused), None)
        assert code == (2 if end else 0), (step, out, err)
        assert not end or (err.startswith("error: ") and err.endswith(f"{end}\n") and err.count("\n") == 1), (step, err)
        assert step[0] != "serve" or '"study_summaries"' in out


def test_each_line_is_run_here_or_elsewhere() -> None:
    lines = [line for block in blocks(README) if block.language == "" for line in block.text.splitlines()]
    assert {line for line in lines if "tune.py" not in line and not line.startswith("|")} == {*ELSEWHERE}
    assert lines[0].startswith(f"{INSTALL} && python tune.py ")


def test_all_of_it_runs_with_a_hub(plain: Path, reader: Path, tiny_place: Path, tmp_path: Path) -> None:
    """Models come from there, the first by a download that is cut off, and texts; the sparse model goes there."""
    root, text = tmp_path / "hub", TOPICS[160_000:].split("\n\n")
    for name in OWN:
        shutil.copytree(tiny_place / "model", root / "models" / name)
    publish_c4(root, {"train.00000-of-01024": [" ".join(text[at : at + 8]) for at in range(0, 400, 8)]})
    splits = {name: text[at : at + 100] for at, name in ((400, "train"), (500, "validation"), (600, "test"))}
    publish_wikitext2(root, {name: [f" = {name} = \n", *lines, ""] for name, lines in splits.items()})
    uploads = Uploads({"t": {"name": "ORG", "orgs": [], "auth": {"accessToken": {"role": "write"}}}}, cut=LARGE)
    found = [one for step in map(shortened, steps(README)) for one in ([step, BACK] if step[0] == "push" else [step])]
    with serve(root, uploads) as (address, asked):
        answers = run(plain, reader, found, HF_ENDPOINT=address, HF_TOKEN="t")
    check(found, answers)
    assert sum("texts: C4 to calibrate, WikiText-2 to measure" in out + err for _, out, err in answers) >= 4
    assert len(uploads.resumed) == 1 and uploads.resumed[0] > 0
    assert uploads.commits == ["Upload by atp_tune"] and len(uploads.received) == 1
    files = ("datasets/allenai/c4", "datasets/Salesforce/wikitext", *OWN)
    assert all(any(path.startswith(name) and "/resolve/" in path for path in asked) for name in files)


def test_all_of_it_runs_without_a_network(plain: Path, reader: Path, tiny_place: Path) -> None:
    """With a model that is here, and parts of the Python manual."""
    shutil.copytree(tiny_place / "model", reader / "own")
    found = [
        step.replace(f'"{OWN[1]}"', '"own"')
        if isinstance(step, str)
        else ["own" if step[0] in OWN else step[0], *step[1:]]
        for step in map(shortened, steps(README))
    ]
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    answers = run(plain, reader, found, HF_ENDPOINT=NOWHERE, HF_TOKEN="t", **proxies)
    check(found, answers, push="the same command resumes the upload")
    assert sum("since the hub is out of reach" in out + err for _, out, err in answers) >= 4
