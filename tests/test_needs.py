"""What a command will need in the end is asked before it works: no model is read, and nothing is written.

`speedup` once wrote a model of 538 MB, and then said that zstandard was missing.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from expect import parametrize, refused
from huggingface_hub import constants
from pages import REPO
from safetensors.torch import load_file, save_file
from tinystudy import CommandLine

import atp_tune
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import resolve
from atp_tune.config.study import ModelConfig
from atp_tune.folders.packing import pack_folder
from atp_tune.utils import extras

Patch = pytest.MonkeyPatch
DEVICE = ("--device", "cuda:99")
CONFIG = ("--config", "tiny.best.json")
STUDY = ("--study", "tiny.toml")
LIMIT = ("--set", "sparsity=[0.1, 0.9]", "--set", 'allocation.beta="auto"', "--set")


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


FREE = "exists already; choose another folder or remove it"
ROOM = r"needs 0 MB, and 0 MB are free there; make room"
WRITE = r"cannot be written: .* does not let you write; "
HERE = "cuda:99 is not on this machine"
NEEDS: dict[str, dict[str, list[tuple[tuple[str, ...], Callable[[Patch], None], str]]]] = {
    "--study": {
        "package": [
            ((*STUDY, "--trials", "9", "--track", "wandb"), lacks("wandb"), "--track wandb: it is not installed"),
            ((*STUDY, "--trials", "9", "--engine", "ray"), lacks("ray"), "--engine ray: it is not installed"),
            ((*STUDY, "--study-name", "x", *LIMIT, "limit={min_accuracy={piqa=0.5}}"),
             lacks("eval"), "limit.min_accuracy: it is not installed"),
        ],
        "output": [((*STUDY, "--trials", "9", "--storage", "sqlite:///{away}/x.db"), is_read_only, WRITE)],
        "disk": [((*STUDY, "--study-name", "x", "--set", "recover={}"), is_full, "cache folder .*" + ROOM)],
        "device": [((*STUDY, "--study-name", "x", *DEVICE), is_fine, HERE)],
        "task": [
            ((*STUDY, "--study-name", "x", *LIMIT, "limit={min_accuracy={'./no'=0.5}}", "--trust-plugins"),
             is_fine,
             "limit.min_accuracy .*no: there is no such folder"),
        ],
    },
    "MODEL": {
        "package": [(("./model", "--min-accuracy", "piqa=0.5"), lacks("eval"), "--min-accuracy: it is not installed")],
        "device": [(("./model", *DEVICE), is_fine, HERE)],
        "kind": [(("nosuch", "--sparsity", "0.5"), is_fine, "No such command 'nosuch'. A model is ORG/NAME")],
    },
    "plan": {"device": [(("plan", *STUDY, *DEVICE), is_fine, HERE)]},
    "apply": {
        "output": [
            (("apply", *CONFIG, "--out", "model"), is_fine, FREE),
            (("apply", *CONFIG, "--out", "tiny.toml/out"), is_fine, "tiny.toml is no folder; choose another place"),
            (("apply", *CONFIG, "--out", "new/out"), is_read_only, WRITE),
            (("apply", *CONFIG, "--out", "model", "--packed"), is_fine, FREE),
        ],
        "disk": [
            (("apply", *CONFIG, "--out", "new/out"), is_full, ROOM),
            (("apply", *CONFIG, "--out", "new/out", "--packed"), is_full, ROOM),
        ],
        "device": [(("apply", *CONFIG, "--out", "out", *DEVICE), is_fine, HERE)],
        "login": [(("apply", *CONFIG, "--out", "out", "--push", "a/b"), has_no_login, "a/b: ")],
        "kind": [(("apply", *CONFIG, "--out", "out", "--slim"), is_fine, "--slim: only whole channels can be cut")],
    },
    "pack": {
        "output": [(("pack", "sparse", "--out", "model"), is_fine, FREE)],
        "disk": [(("pack", "sparse", "--out", "out"), is_full, ROOM)],
        "device": [(("pack", "sparse", "--out", "out", "--values", "int8", *DEVICE), is_fine, HERE)],
        "kind": [(("pack", "packed", "--out", "out"), is_fine, "packed: is packed already")],
    },
    "unpack": {
        "output": [(("unpack", "packed", "--out", "model"), is_fine, FREE)],
        "disk": [(("unpack", "packed", "--out", "out"), is_full, ROOM)],
        "kind": [(("unpack", "sparse", "--out", "out"), is_fine, "sparse: is no packed folder")],
    },
    "push": {
        "login": [(("push", "sparse", "a/b"), has_no_login, "a/b: ")],
        "kind": [(("push", "model", "a/b"), is_fine, "model: holds no atp_tune.json")],
    },
    "prune": {
        "output": [(("prune", *STUDY, "--beta", "0", "--out", "model"), is_fine, FREE)],
        "disk": [(("prune", *STUDY, "--beta", "0", "--out", "out"), is_full, ROOM)],
        "device": [(("prune", *STUDY, "--beta", "0", *DEVICE), is_fine, HERE)],
    },
    "finetune": {
        "package": [
            (("finetune", "sparse", "--out", "out", "--train", "lora"), lacks("finetune"), "LoRA: it is not installed"),
        ],
        "output": [(("finetune", "sparse", "--out", "model"), is_fine, FREE)],
        "disk": [(("finetune", "sparse", "--out", "out"), is_full, ROOM)],
        "device": [(("finetune", "sparse", "--out", "out", *DEVICE), is_fine, HERE)],
        "kind": [
            (("finetune", "sparse", "--out", "out", "--images", "folder:x"), is_fine, "language model: give --text"),
        ],
    },
    "speedup": {
        "package": [
            (("speedup", *CONFIG), lacks("speed"), "speedup: it is not installed"),
            (("speedup", "sparse"), lacks("speed"), "speedup: it is not installed"),
        ],
        "output": [(("speedup", *CONFIG, "--engine", "torch"), is_read_only, "tiny.best.json: cannot be written")],
        "device": [(("speedup", "sparse", "--engine", "torch", *DEVICE), is_fine, HERE)],
        "kind": [(("speedup", "model"), is_fine, "model: has no atp_tune.json")],
        "study": [
            (("speedup", *CONFIG, "--engine", "torch", "--storage", "sqlite:///none.db"), is_fine, "has no study tiny"),
        ],
    },
    "evaluate": {
        "package": [(("evaluate", *CONFIG), lacks("eval"), "evaluate: it is not installed")],
        "output": [(("evaluate", *CONFIG), is_read_only, "tiny.best.json: cannot be written")],
        "device": [(("evaluate", "sparse", *DEVICE), is_fine, HERE)],
        "kind": [(("evaluate", "vit", "--tasks", "piqa"), is_fine, "--tasks: are of texts; an image classifier is")],
        "task": [(("evaluate", *CONFIG, "--tasks", "no/"), is_fine, "--tasks no/: there is no such folder")],
        "study": [(("evaluate", *CONFIG, "--storage", "sqlite:///none.db"), is_fine, "has no study tiny")],
    },
    "generate": {
        "output": [(("generate", *CONFIG), is_read_only, "tiny.best.json: cannot be written")],
        "device": [(("generate", *CONFIG, *DEVICE), is_fine, HERE)],
        "study": [(("generate", *CONFIG, "--storage", "sqlite:///none.db"), is_fine, "has no study tiny")],
    },
    "chat": {
        "device": [(("chat", "sparse", *DEVICE), is_fine, HERE)],
        "kind": [(("chat", "vit"), is_fine, "chat: vit is an image classifier, which has no text; take `classify`")],
    },
    "classify": {
        "package": [(("classify", "vit", "tiny.toml"), lacks("images"), "FILE: it is not installed")],
        "kind": [(("classify", "sparse", "a.png"), is_fine, "sparse is no image classifier of transformers")],
        "device": [(("classify", "vit", "a.png", *DEVICE), is_fine, HERE)],
    },
    "export": {
        "output": [(("export", *STUDY, "--out", "tiny.toml/x.json"), is_fine, "choose another place with --out FILE")],
    },
    "report": {
        "package": [(("report", *STUDY, "--format", "png"), lacks("png"), "a picture: it is not installed")],
        "output": [(("report", *STUDY, "--out", "x.md"), is_read_only, WRITE)],
    },
    "merge": {"output": [(("merge", "tiny.db", "--out", "x.db"), is_read_only, "--out x.db: cannot be written: ")]},
    "serve": {"output": [(("serve", *STUDY, "--artifacts", "tiny.toml/x"), is_fine, "name a folder that can be")]},
}  # fmt: skip
CASES = [
    pytest.param(words, wrong, said, id=f"{command}-{need}-{number}", marks=[pytest.mark.slow] * (need == "task"))
    for command, needs in NEEDS.items()
    for need, cases in needs.items()
    for number, (words, wrong, said) in enumerate(cases)
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


@parametrize(("words", "wrong", "said"), CASES)
def test_what_is_needed_is_asked_first(
    words: tuple[str, ...], wrong: Callable[[Patch], None], said: str, untouched: Path, command: CommandLine,
    monkeypatch: Patch, tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "away").mkdir()
    wrong(monkeypatch)
    error = command(*(word.replace("{away}", str(tmp_path / "away")) for word in words)).error
    assert re.search(said, error), error


WRITERS = {  # each option that takes a place to write to; {} is that place
    "apply --out": ("apply", *CONFIG, "--out", "{}"), "apply --packed": ("apply", *CONFIG, "--out", "{}", "--packed"),
    "pack --out": ("pack", "sparse", "--out", "{}"), "unpack --out": ("unpack", "packed", "--out", "{}"),
    "prune --out": ("prune", *STUDY, "--beta", "0", "--out", "{}"),
    "finetune --out": ("finetune", "sparse", "--out", "{}"), "export --out": ("export", *STUDY, "--out", "{}.json"),
    "report --out": ("report", *STUDY, "--out", "{}.md"), "merge --out": ("merge", "tiny.db", "--out", "{}.db"),
    "serve --artifacts": ("serve", *STUDY, "--artifacts", "{}"),
    "--storage": (*STUDY, "--study-name", "x", "--storage", "sqlite:///{}.db"),
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
    for name, needs in NEEDS.items():
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
