"""Every command on what strangers may hand over: docs/security.md has the table, which these tests write.

A command ends with 0, or with 2 and one line; it leaves the home in which all this lies as it was, but for its results.
"""

import gc
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import hostile
import pytest
from expect import parametrize, slow
from hostile import DOCUMENT, KINDS, SECRET, Input, known_cells, make_home, seen, tree, write_cells
from huggingface_hub import constants
from image_families import write_classifier
from localhub import Uploads
from localhub import serve as serve_hub
from PIL import Image
from tinystudy import HANGS, Answer, CommandLine

from atp_tune.api.configuration import Configuration
from atp_tune.checkpoints.models import resolve
from atp_tune.cli.application import MODEL, app
from atp_tune.config import finding
from atp_tune.config.study import ModelConfig
from atp_tune.folders import speed
from atp_tune.report import servers

WRITES = os.environ.get("ATP_TUNE_WRITE_DOCS") == "1"
LIMIT = 120  # seconds for a command
NONE = "–"
OUT = r"work/out(/.*)?"
STUDY = "download/a/study"
DATABASE = rf"{STUDY}/tiny\.db"
FILES = r"artifacts(/[0-9a-f-]{36})?"
ARTIFACTS = rf"{STUDY}/tiny\.{FILES}"
BEST = rf"{STUDY}/tiny\.best\.json"
MADE = "model-60-quick-calibration"  # the study that the command `MODEL` makes
FEW = "--trials 1 --set continuations.tokens=0 --set texts.calibration.draws=1 " + " ".join(
    f"--set texts.{role}.nsamples=2" for role in ("calibration", "validation", "test")
)
TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


# command → what it may write, and the kinds of input that it reads with its options for them
COMMANDS: dict[str, tuple[str, dict[str, str]]] = {
    "tune": (rf"{DATABASE}(-journal)?|{BEST}|{ARTIFACTS}", dict.fromkeys(
        ("study file", "model folder", "texts"), "--study {study}/tiny.toml --trials 2")
        | {"database": "--study {study}/tiny.toml --trials 7", "configuration": "--study {study}/tiny.toml"}),
    MODEL: (rf"work/studies|work/studies/{MADE}\.(toml|db|db-journal|best\.json|{FILES})", dict.fromkeys(
        ("model folder", "texts"), f"{{study}}/model --sparsity 0.6 --texts {{text}} --preset quick {FEW}")),
    "plan": ("", dict.fromkeys(("study file", "database", "model folder", "texts"), "--study {study}/tiny.toml")),
    "status": ("", dict.fromkeys(("study file", "database"), "--study {study}/tiny.toml")),
    "serve": (rf"{ARTIFACTS}|{DATABASE}", dict.fromkeys(
        ("study file", "database"), "--study {study}/tiny.toml --port 0 --grpc-port 0")),
    "merge": (rf"work/both\.(db|{FILES})", {
        "database": "{home}/good.db {study}/tiny.db --out both.db --study tiny"}),
    "export": (rf"{BEST}|work/out\.csv", {
        **dict.fromkeys(("study file", "database"), "--study {study}/tiny.toml"),
        "configuration": "--config {study}/tiny.best.json --out out.csv"}),
    "report": (rf"{STUDY}/tiny\.report\.md", dict.fromkeys(
        ("study file", "database"), "--study {study}/tiny.toml --format md")),
    "apply": (OUT, dict.fromkeys(
        ("configuration", "model folder", "texts"), "--config {study}/tiny.best.json --out out --device cpu")),
    "evaluate": (rf"{BEST}|{DATABASE}", {
        **dict.fromkeys(
            ("configuration", "database", "model folder", "texts"), "--config {study}/tiny.best.json {task}"),
        "sparse folder": "{study}/sparse {task}"}),
    "generate": (rf"{BEST}|{DATABASE}", dict.fromkeys(
        ("configuration", "database", "model folder", "texts"),
        "--config {study}/tiny.best.json --tokens 2 --device cpu")),
    "chat": ("", {
        **dict.fromkeys(("configuration", "model folder", "texts"),
                        "{study}/tiny.best.json --max-new-tokens 2 --device cpu"),
        "sparse folder": "{study}/sparse --max-new-tokens 2 --device cpu"}),
    "classify": ("", {  # configurations and sparse folders are of a language model here
        "pictures": "{study}/vit {study}/picture.png --device cpu"}),
    **dict.fromkeys(("pack", "unpack"), (OUT, {"sparse folder": "{study}/sparse --out out"})),
    "push": ("", {"sparse folder": "{study}/sparse alice/tiny"}),
    "prune": (OUT, dict.fromkeys(
        ("study file", "model folder", "texts"), "--study {study}/tiny.toml --beta 0.01 --out out")),
    "finetune": (OUT, dict.fromkeys(
        ("sparse folder", "texts"), "{study}/sparse --out out --steps 1 --batch 1 --seqlen 32 --device cpu")),
    "speedup": (rf"{BEST}|{DATABASE}|{STUDY}/sparse/atp_tune\.json", {
        "database": "--config {study}/tiny.best.json --tokens 4 --runs 1 --device cpu",
        **dict.fromkeys(("configuration", "model folder", "texts"),  # other engines read them no differently
                        "--config {study}/tiny.best.json --tokens 4 --runs 1 --device cpu --engine torch"),
        "sparse folder": "{study}/sparse --tokens 4 --runs 1 --device cpu --engine torch"}),
    "studies": ("", dict.fromkeys(("study file", "database"), "")),
    "plugins": ("", {"study file": "--study {study}/tiny.toml"}),
    **dict.fromkeys(("schema", "env"), ("", {})),  # they open no file that another may have made
}  # fmt: skip
FAST = {("export", "configuration")}
CELLS = [(name, kind) for name, (_, kinds) in COMMANDS.items() for kind in KINDS if kind in kinds]


class HangsError(BaseException):
    """A command that does not end."""


@pytest.fixture(scope="module")
def finished(tiny_sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished tiny study with a sparse folder and a classifier; to be read only."""
    place = Path(shutil.copytree(tiny_sparse, tmp_path_factory.mktemp("hostile") / "place"))
    shutil.copytree(tiny_sparse.parent / "cache", place.parent / "cache")
    write_classifier(place / "vit")
    Image.effect_noise((9, 7), 50).save(place / "picture.png")
    gc.collect()
    gc.freeze()  # what was imported for it: each model that is let go would have all of it looked at again
    return place


@contextmanager
def limited(home: Path) -> Iterator[None]:
    """Ends what waits for ever, for a pipe that nobody writes to, say, and raises HangsError."""
    opened: list[int] = []

    def stop(*_: object) -> None:
        raise HangsError

    before = signal.signal(signal.SIGALRM, stop)
    pipes = Timer(
        LIMIT - 10, lambda: opened.extend(os.open(pipe, os.O_RDWR) for pipe in home.rglob("*") if pipe.is_fifo())
    )
    pipes.start()  # what waits in C for somebody who writes into a pipe gets no signal
    signal.alarm(LIMIT)
    try:
        yield
        if opened:
            raise HangsError
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        pipes.cancel()


def visit(port: int, ended: list[bool]) -> None:
    """Asks for what a browser would ask for."""

    def get(path: str) -> Any:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HANGS) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            return b"{}"

    try:
        listed = json.loads(get("/api/studies")).get("study_summaries", [])
        for study in listed:
            shown = json.loads(get(f"/api/studies/{study['study_id']}?after=0"))
            names = [one["artifact_id"] for one in shown.get("artifacts", [])]
            for name in [*names, hostile.UUID, "..%2f..%2f..%2f.bashrc"]:
                assert SECRET.encode() not in get(f"/artifacts/{study['study_id']}/{name}")
    finally:
        ended.append(True)


@pytest.fixture
def short_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` ends when what it serves has been looked at."""
    real = servers.serve

    def short(*place: Any) -> None:
        *where, _, ready, tell = place
        ended: list[bool] = []

        def begun(studies: list[str], port: int, grpc_port: int) -> None:
            ready(studies, port, grpc_port)
            Thread(target=visit, args=(port, ended)).start()

        real(*where, lambda: bool(ended), begun, tell)

    monkeypatch.setattr(servers, "serve", short)


@pytest.fixture
def short_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`speedup` measures two tokens after the prompt in the place of 32: how fast they come is not looked at here."""
    monkeypatch.setattr(speed, "Workload", partial(speed.Workload, steps=2))


@pytest.fixture
def account(hub: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the hub, served with an account in which `push` may write."""
    with serve_hub(hub[0], Uploads({"a token": {"name": "alice", "orgs": []}})) as (url, _):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "a token")
        yield hub[0]


class Sandbox:
    """A home for each input, in which a command is run on it."""

    def __init__(
        self, finished: Path, tmp_path: Path, command: CommandLine, patch: pytest.MonkeyPatch, account: Path
    ) -> None:
        self._model = tmp_path / "usual"
        make_home(self._model, finished)
        shutil.copyfile(finished / "tiny.db", self._model / "good.db")
        self._home, self._command, self._patch, self._hub = tmp_path / "home", command, patch, account
        (tmp_path / "tmp").mkdir()
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks" / "data.jsonl").write_text('{"q": "the"}\n{"q": "of"}\n')
        (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "tasks" / "data.jsonl"))
        self._task = f"--tasks {tmp_path}/tasks/tiny.yaml --device cpu"
        patch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
        patch.setattr(finding, "_folders", lambda: (self._home / STUDY,))
        patch.setenv("HOME", str(self._home))
        patch.setenv("ATP_TUNE_CACHE", str(tmp_path / "cache"))

    def run(self, name: str, kind: str, one: Input) -> str:
        """What a command makes of an input: its word, or what is wrong."""
        for folder in (self._home, self._hub / "models"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._model, self._home, symlinks=True)
        place = self._home / STUDY
        self._make_new(name, kind, place)
        one.change(place)
        self._make_fit(kind, place)
        before = tree(self._home)
        self._patch.chdir(self._home / "work")
        allowed, options = COMMANDS[name][0], COMMANDS[name][1][kind]
        text = next(place.glob("calibration.[jp]*"), place / "calibration.txt")
        words = options.format(study=place, home=self._home, task=self._task, text=text).split()
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"The import statement")))
        try:
            with limited(self._home):
                answer = self._command(*([] if name in ("tune", MODEL) else [name]), *words)
        except (Exception, HangsError, pytest.fail.Exception) as error:  # what the user would see as a traceback
            return f"{type(error).__name__}: {error}"[:300]
        if name == MODEL and answer.code == 2:
            allowed = rf"work/studies(/{MADE}\.db)?"  # no study file of what cannot be a study
        after = tree(self._home)
        changed = {path for path in {*before, *after} if before.get(path) != after.get(path)}
        return self._wrong(answer, {path for path in changed if not re.fullmatch(allowed, path)}) or (
            "refused" if answer.code == 2 else one.word
        )

    def _make_new(self, name: str, kind: str, place: Path) -> None:
        """A study that has to load its model and texts."""
        if name in ("tune", "plan") and kind in ("model folder", "texts", "study file"):
            for file in ("tiny.db", "tiny.best.json"):
                (place / file).unlink()

    def _make_fit(self, kind: str, place: Path) -> None:
        """A stranger's configuration fits the stranger's model."""
        if kind != "model folder" or not (place / "tiny.best.json").is_file():
            return
        try:
            content = resolve(ModelConfig(source=str(place / "model")), Path()).content
        except Exception:  # the command says what is wrong with it
            return
        hostile.best(model__fingerprint=content)(place)

    def _wrong(self, answer: Answer, changed: set[str]) -> str:
        if answer.code not in (0, 2):
            return f"exit code {answer.code}"
        lines = answer.err.splitlines()
        if answer.code == 2 and not (len(lines) == 1 and lines[0].startswith("error: ") and shown(lines[0])):
            return f"no line: {answer.err[:300]!r}"
        if answer.code == 0 and (lines or not shown(answer.out.replace("\n", ""))):
            return f"said {answer.err[:300]!r} {answer.out[-300:]!r}"
        uploaded = [file.read_bytes() for file in self._hub.rglob("*") if file.is_file()]
        if any(SECRET.encode() in content for content in ((answer.out + answer.err).encode(), *uploaded)):
            return "the secret was printed or uploaded"
        if changed:
            return f"changed {sorted(changed)}"
        left = sorted(path.name for path in Path(tempfile.gettempdir()).iterdir())
        return f"left {left} in the folder of temporary files" if left else ""


def shown(line: str) -> bool:
    return all(char.isprintable() or char == "\u00a0" for char in line)


@pytest.fixture
def sandbox(
    finished: Path, tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch, account: Path,
    short_serve: None, short_speedup: None, cache: Path, windows: None,
) -> Sandbox:  # fmt: skip
    shutil.copytree(finished.parent / "cache" / "windows", cache / "windows", dirs_exist_ok=True)
    return Sandbox(finished, tmp_path, command, monkeypatch, account)


def once(owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
    """A measurement is made for the first input alone: to it the others are no different."""

    def kept(*words: Any, **options: Any) -> Any:
        if not made:
            made.append(whole(*words, **options))
        return made[0]

    whole, made = getattr(owner, name), list[Any]()
    patch.setattr(owner, name, kept)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """For inputs of which a measurement knows nothing: databases, in which only its result is stored."""

    def begin() -> None:
        for name in ("evaluate", "generate"):
            once(Configuration, name, monkeypatch)
        once(speed, "measure", monkeypatch)

    return begin


def check(name: str, kind: str, sandbox: Sandbox, measured_once: Callable[[], None]) -> None:
    only = os.environ.get("ATP_TUNE_HOSTILE", "")
    if kind == "database":
        measured_once()
    inputs = [one for one in KINDS[kind] if only in one.name]
    said = {one.name: sandbox.run(name, kind, one) for one in inputs}
    wrong = {one: words for one, words in said.items() if words not in ("refused", *hostile.SURE)}
    assert not wrong, "\n".join(f"{one}: {words}" for one, words in wrong.items())
    if only:
        return
    cell = seen(list(said.values()))
    if WRITES:
        write_cells(DOCUMENT, {**known_cells(DOCUMENT), **empty(), (name, kind): cell}, list(COMMANDS))
    known = known_cells(DOCUMENT)[name, kind]
    assert set(cell.split(", ")) <= set(known.split(", "))
    assert cell == known or len(inputs) < len(KINDS[kind])


def empty() -> dict[tuple[str, str], str]:
    """The cells of what a command does not read."""
    return {(name, kind): NONE for name in COMMANDS for kind in KINDS if (name, kind) not in CELLS}


@slow
@parametrize(("name", "kind"), [cell for cell in CELLS if cell in FAST])
def test_a_command_that_is_quick(name: str, kind: str, sandbox: Sandbox, measured_once: Callable[[], None]) -> None:
    check(name, kind, sandbox, measured_once)


@slow
@parametrize(("name", "kind"), [cell for cell in CELLS if cell not in FAST])
def test_a_command(name: str, kind: str, sandbox: Sandbox, measured_once: Callable[[], None]) -> None:
    check(name, kind, sandbox, measured_once)


def test_the_table_has_every_command_and_every_input() -> None:
    commands = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback}
    assert {*commands, "tune"} == set(COMMANDS)
    cells = known_cells(DOCUMENT)
    assert set(cells) == {(name, kind) for name in COMMANDS for kind in KINDS}
    assert {cell: word for cell, word in cells.items() if word == NONE} == empty()
    text = DOCUMENT.read_text()
    assert all(line in text for line in hostile.listed())
