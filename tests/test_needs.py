"""What a command will need in the end is asked before it works: no model is read, and nothing is written.

`speedup` once wrote a model of 538 MB, and then said that zstandard was missing.
"""

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from huggingface_hub import constants
from pages import REPO
from safetensors.torch import load_file, save_file
from tinystudy import CommandLine

import atp_tune
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import resolve
from atp_tune.config.study import ModelConfig
from atp_tune.folders.packing import pack_folder
from atp_tune.utils import system as extras

Patch = pytest.MonkeyPatch
CONFIG = ("--config", "tiny.best.json")
STUDY = ("--study", "tiny.toml")


def lacks(extra: str) -> Callable[[Patch], None]:
    def make(patch: Patch) -> None:
        found = extras.missing
        patch.setattr(extras, "missing", lambda name, *modules: "it" if name == extra else found(name, *modules))

    return make


def is_full(patch: Patch) -> None:
    patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10))


def is_read_only(patch: Patch) -> None:
    patch.setattr(os, "access", lambda place, mode: mode == os.R_OK)


def has_no_login(patch: Patch) -> None:
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def is_fine(patch: Patch) -> None:
    """What is wrong is in the command's words."""


WRONG = {"": is_fine, "full": is_full, "read-only": is_read_only, "no-login": has_no_login}
ROOM = "needs 0 MB, and 0 MB are free there; make room"


def read() -> Iterator[tuple[str, str, str, str]]:
    """Command, need and condition, words, and what is said, of each line of the table."""
    command = ""
    for line in (Path(__file__).parent / "needs.txt").read_text().splitlines():
        if line.startswith("["):
            command = line.strip("[]")
        elif line and not line.startswith("#"):
            need, case = line.split(": ", 1)
            words, said = case.rsplit(" => ", 1)
            yield command, need, words.replace("$", shlex.join(STUDY)).replace("@", shlex.join(CONFIG)), said


NEEDS = list(read())
CASES = [
    pytest.param(*row[1:], id=f"{row[0]}-{row[1]}-{number}", marks=[slow] * (row[1] == "task"))
    for number, row in enumerate(NEEDS)
]
COLUMNS = {
    "package": "package of an extra", "output": "place to write to", "disk": "free disk", "device": "device",
    "kind": "kind of model or folder", "task": "task of lm-eval", "login": "login to the hub", "study": "stored study",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tiny_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study beside a sparse folder, the same packed, and an image classifier."""
    from image_families import write_classifier
    from PIL import Image

    place = Path(shutil.copytree(tiny_done, tmp_path_factory.mktemp("needs") / "tiny"))
    shutil.copytree(place / "model", place / "sparse")
    shutil.copy(place / "tiny.best.json", place / "sparse" / "atp_tune.json")
    weights = load_file(place / "sparse" / "model.safetensors")
    for name in (name for name in weights if "proj" in name):
        weights[name][torch.rand(weights[name].shape) < 0.6] = 0
    save_file(weights, place / "sparse" / "model.safetensors", {"format": "pt"})
    pack_folder(place / "sparse", place / "packed")
    write_classifier(place / "vit", {0: "a", 1: "b"}, "vit")
    Image.new("RGB", (8, 8)).save(place / "a.png")
    return place


def files(*places: Path) -> list[tuple[Path, int]]:
    found = [file for place in places for file in sorted(place.rglob("*")) if file.is_file()]
    return [(file, file.stat().st_mtime_ns) for file in found if file.suffix != ".lock"]


@pytest.fixture
def untouched(folders: Path, cache: Path, monkeypatch: Patch) -> Iterator[Path]:
    """The folders, of which no model is read while nothing is written, there or in the cache."""
    monkeypatch.chdir(folders)
    read: list[Any] = []
    monkeypatch.setattr(Checkpoint, "load", lambda *given, **_: read.append(given))
    before = files(folders, cache)
    yield folders
    assert files(folders, cache) == before and not read


@parametrize(("need", "words", "said"), CASES)
def test_what_is_needed_is_asked_first(
    need: str, words: str, said: str, untouched: Path, command: CommandLine, monkeypatch: Patch, tmp_path: Path
) -> None:
    (tmp_path / "away").mkdir()
    wrong = need.partition(" ")[2]
    WRONG.get(wrong, lacks(wrong))(monkeypatch)
    error = command(*shlex.split(words.replace("{away}", str(tmp_path / "away")))).error
    assert re.search(said, error), error


WRITERS = {  # each option that takes a place to write to; {} is that place
    "apply --out": ("apply", *CONFIG, "--out", "{}"), "apply --packed": ("apply", *CONFIG, "--out", "{}", "--packed"),
    "apply --format": ("apply", *CONFIG, "--out", "{}", "--format", "compressed-tensors"),
    "pack --out": ("pack", "sparse", "--out", "{}"), "unpack --out": ("unpack", "packed", "--out", "{}"),
    "prune --out": ("prune", *STUDY, "--beta", "0", "--out", "{}"),
    "finetune --out": ("finetune", "sparse", "--out", "{}"), "export --out": ("export", *STUDY, "--out", "{}.json"),
    "report --out": ("report", *STUDY, "--out", "{}.md"), "merge --out": ("merge", "tiny.db", "--out", "{}.db"),
    "serve --artifacts": ("serve", *STUDY, "--artifacts", "{}"),
    "tune --out": (*STUDY, "--out", "{}"), "--storage": (*STUDY, "--study-name", "x", "--storage", "sqlite:///{}.db"),
}  # fmt: skip
PLACES = {
    "a name that is too long": "n" * 300, "a long name of a folder": "n" * 300 + "/x",
    "a file in the place of a folder": "tiny.toml/x",
}  # fmt: skip


@parametrize("option", WRITERS)
@parametrize("kind", PLACES)
def test_a_place_that_cannot_be_written_is_one_line(
    option: str, kind: str, untouched: Path, command: CommandLine
) -> None:
    """A name of 300 characters ended in a traceback, where it was asked for at all."""
    error = command(*(word.format(PLACES[kind]) for word in WRITERS[option])).error
    assert re.search("too long|no folder|[Nn]ot a directory|File exists", error), error


@parametrize(
    ("call", "said"),
    [
        (lambda found: found.save("model"), "folder model: exists already; choose another folder or remove it"),
        (lambda found: found.save("tiny.toml/x"), "folder tiny.toml/x: .*tiny.toml is no folder; choose another place"),
        (lambda found: found.push("a"), "the name on the hub must be ORG/NAME"),
        (lambda found: found.configuration(device="cuda:99").apply(), "device: cuda:99 is not on this machine"),
    ],
)
def test_from_python_too(call: Callable[[Any], object], said: str, untouched: Path) -> None:
    found = atp_tune.load_study("tiny.toml")
    with refused(f"^{said}"):
        call(found)


def test_the_table_of_the_documents() -> None:
    rows = [f"| command | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in dict.fromkeys(command for command, *_ in NEEDS):
        needs = {need.partition(" ")[0] for command, need, *_ in NEEDS if command == name}
        rows.append(f"| `{name}` | {' | '.join('✓' if need in needs else '' for need in COLUMNS)} |")
    assert "\n".join(rows) in (REPO / "docs" / "reliability.md").read_text(), "\n".join(rows)


def test_a_download_that_has_no_room_is_not_begun(
    hub: tuple[Path, list[str]], tiny_place: Path, monkeypatch: Patch
) -> None:
    there = Path(shutil.copytree(tiny_place / "model", hub[0] / "models" / "org" / "tiny"))
    free = (there / "model.safetensors").stat().st_size - 1  # enough for the small files
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
    with refused(f"org/tiny: {ROOM}, or set HF_HOME to another folder"):
        resolve(ModelConfig(source="org/tiny"), Path())
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))
