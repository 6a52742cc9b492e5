"""What commands write: two processes at once, a place that is filled meanwhile, and a process that is killed."""

import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import parametrize, slow
from faults import DOCUMENT, Rows
from test_annotations import SCORES, SPEED, best_of
from test_cache import DEAD
from test_pushing import Site, site
from tinystudy import HANGS, STUDY, CommandLine, stored, study_file

import atp_tune
from atp_tune.checkpoints.convert import ABOUT as PACKED_ABOUT
from atp_tune.config.best import read_config
from atp_tune.results import results
from atp_tune.search.objective import store_test_scores
from atp_tune.search.runner import StudyRun, write_best
from atp_tune.storage.attributes import FOUND, ITEMS, TABLES
from atp_tune.utils import cache as cache_module
from atp_tune.utils.cache import (
    TakenError,
    alone_with,
    cache_dir,
    folder_atomically,
    keep,
    sha256_of,
    write_atomically,
    write_out,
)

FORK = multiprocessing.get_context("fork")
ROUNDS = 50
ROWS = Rows()
Round = Callable[[int], object]


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    yield
    if os.environ.get("ATP_TUNE_WRITE_DOCS") == "1":
        ROWS.write(DOCUMENT)


# --- two writers


def opened(place: Path) -> optuna.Study:
    return stored(place, database=place / "moved")


def by_trial(place: Path, writer: int) -> Round:
    """Rows of the tables by trial on a study; each writer has trials of its own."""
    study, first = opened(place), 1000 * (writer + 1)
    more = {key: [1.0] for key in ITEMS if key not in ("nlls", "kls", "ranks")}

    def store(k: int) -> None:
        store_test_scores(study, str(first + k), {"nlls": [1.0], "kls": [1.0], "ranks": [1], **more})
        study.set_user_attr(f"draws:1000:{first + k}", [1.0])
        study.set_user_attr(f"refits:1000:2:{first + k}", [1.0])
        for key in FOUND:
            results.store(study, key, first + k, SPEED.model_dump(mode="json"))

    return store


def all_trials_are_there(place: Path) -> None:
    found = opened(place).user_attrs
    wanted = {str(first + k) for first in (1000, 2000) for k in range(ROUNDS)}
    found |= {"draws": found["draws"]["1000"], "refits": found["refits"]["1000"]["2"]}
    for table in TABLES:
        assert not wanted - found[table].keys(), table


def attach(place: Path, writer: int) -> Round:
    """One stores a speed in a configuration, the other scores on tasks, each time others."""
    (path, config), study = best_of(place), opened(place)

    def speed(k: int) -> None:
        zeros = {"self_attn.q_proj": k / ROUNDS}
        own = SPEED.model_copy(update={"zeros": zeros})
        results.store(study, "speed", config.trial, own.model_dump(mode="json"))
        results.attach(path, config, "speed", own)
        found = read_config(path).speed
        assert found and found.zeros == zeros

    def scores(k: int) -> None:
        results.attach(path, config, "zero_shot", SCORES.model_copy(update={"seconds": {"dense": k}}))
        found = read_config(path).zero_shot
        assert found and found.seconds == {"dense": k}

    return speed if writer else scores


def attach_and_run(place: Path, writer: int) -> Round:
    """One stores a speed in a configuration, and the run of its study writes that."""
    study, run = opened(place), StudyRun(study_file(place), "tiny", None, print)
    return attach(place, writer) if writer else lambda _: write_best(run, study)


def listed(place: Path, writer: int) -> Round:
    """A list to which each writer adds, as that of the trials in Weights & Biases."""
    path = place / "list.json"

    def add(k: int) -> None:
        with alone_with(path):
            known = json.loads(path.read_text()) if path.exists() else []
            write_atomically(path, json.dumps([*known, [writer, k]]).encode())

    return add


def all_are_listed(place: Path) -> None:
    assert len(json.loads((place / "list.json").read_text())) == 2 * ROUNDS


def made_in_cache(place: Path, writer: int) -> Round:
    """Files and folders of the cache, which have the same content whoever makes them, and hashes."""

    def make(k: int) -> None:
        keep(cache_dir("files") / str(k), b"the same")
        with folder_atomically(cache_dir("folders") / str(k), shared=True) as folder:
            (folder / "file").write_text("the same")
        assert sha256_of(cache_dir("files") / str(k)) == sha256_of(cache_dir("folders") / str(k) / "file")

    return make


def all_is_cached(place: Path) -> None:
    for kind in ("files", "folders"):
        assert {entry.name for entry in cache_dir(kind).iterdir()} == {str(k) for k in range(ROUNDS)}


def new_file(place: Path, writer: int) -> Round:
    """A study file, or a merged database, of one name."""

    def write(k: int) -> None:
        try:
            write_out(place / f"new{k}.toml", b"a study", is_new=True)
        except TakenError:
            (place / f"refused{k}").touch(exist_ok=False)

    return write


def one_is_refused(place: Path) -> None:
    assert len([*place.glob("new*.toml")]) == len([*place.glob("refused*")]) == ROUNDS
    assert not [*place.glob(".new*")]


def new_folder(place: Path, writer: int) -> Round:
    """A sparse checkpoint of one name."""

    def write(k: int) -> None:
        try:
            with folder_atomically(place / f"new{k}") as folder:
                (folder / "of").write_text(str(writer))
        except TakenError as error:
            assert str(error).endswith(f"the result is in {place / f'new{k}-2'}")
            assert (place / f"new{k}-2" / "of").read_text() == str(writer) != (place / f"new{k}" / "of").read_text()

    return write


def both_are_there(place: Path) -> None:
    folders = {f"new{k}{end}" for k in range(ROUNDS) for end in ("", "-2")}
    assert {path.name for path in place.glob("new*")} == folders


SHARED: dict[str, tuple[Callable[[Path, int], Round], Callable[[Path], None]]] = {
    "findings and final numbers of trials, in a study": (by_trial, all_trials_are_there),
    "findings, in `best.json`": (attach, lambda place: None),
    "a finding in `best.json`, and the run that writes it": (attach_and_run, lambda place: None),
    "the list of trials in Weights & Biases": (listed, all_are_listed),
    "a file, a folder and a hash of the cache": (made_in_cache, all_is_cached),
    "a new study file: one is refused": (new_file, one_is_refused),
    "a new folder: the other gets another name": (new_folder, both_are_there),
}


@slow
@parametrize("name", SHARED)
def test_two_writers_lose_nothing(name: str, done: Path) -> None:
    write, check = SHARED[name]
    begin = FORK.Barrier(2)
    (done / "tiny.db").rename(done / "moved")  # where `attach` does not look for it in each round

    def work(writer: int) -> None:
        try:
            act = write(done, writer)
            for k in range(ROUNDS):
                begin.wait(HANGS)
                act(k)
        finally:
            begin.abort() if sys.exc_info()[0] else None

    processes = [FORK.Process(target=work, args=(writer,)) for writer in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    check(done)
    ROWS.add(f"two processes write at one moment: {name}", ROUNDS)


# --- a killed process

assert site  # a fixture: the hub to which `push` uploads


def test_temporary_names_are_made_in_one_place() -> None:
    """Where the next process knows them, and removes what a dead one left."""
    makes = re.compile(r"\b(mkdtemp|mkstemp|TemporaryDirectory|NamedTemporaryFile)\b")
    files = Path(atp_tune.__file__).parent.rglob("*.py")
    assert [file.name for file in files if makes.search(file.read_text())] == ["cache.py"]


SPARSE = ("apply", "--config", "{tiny.best.json}", "--out", "{sparse}")  # what some commands read
PACKED = ("pack", "{sparse}", "--out", "{packed}")
BITS = ("--study", "{bits.toml}", "--set", 'quantize.quantizers=["rtn"]', "--set", "quantize.group_size=16")
CHANNELS = (
    "--study", "{tiny.toml}", "--study-name", "channels", "--storage", "sqlite:///channels.db", "--set",
    "prune.pattern=channels", "--set", "sparsity=0.25",
)  # fmt: skip
FEW = ("--steps", 2, "--batch", 2, "--patience", 1000)
TEXT = ("--text", "file:long.txt", "--seqlen", 32)
COMMANDS: dict[str, tuple[str | int, ...]] = {  # what is in {} lies in the place
    "apply": ("apply", "--config", "{tiny.best.json}", "--out", "{out}", "--device", "cpu"),
    "apply --packed": ("apply", "--config", "{tiny.best.json}", "--out", "{out}", "--device", "cpu", "--packed"),
    "apply --format": (
        "apply",
        "--config",
        "{bits.best.json}",
        "--out",
        "{out}",
        "--device",
        "cpu",
        "--format",
        "compressed-tensors",
    ),
    "apply --slim": ("apply", "--config", "{channels.best.json}", "--out", "{out}", "--device", "cpu", "--slim"),
    "push": ("push", "{sparse}", "alice/tiny"),
    "prune --out": ("prune", "--study", "{tiny.toml}", "--out", "{out}"),
    "pack": ("pack", "{sparse}", "--out", "{out}"),
    "unpack": ("unpack", "{packed}", "--out", "{out}"),
    "finetune": ("finetune", "{sparse}", "--out", "{out}", "--device", "cpu", *TEXT, *FEW),
    "tune": ("--study", "{tiny.toml}", "--trials", 7, "--set", "recover.steps=2", "--set", "recover.batch=2"),
    "tune --out": ("--study", "{tiny.toml}", "--out", "{out}"),
    "export": ("export", "--study", "{tiny.toml}", "--out", "{out.json}"),
    "report": ("report", "--study", "{tiny.toml}", "--out", "{out.html}"),
    "speedup": ("speedup", "--config", "{tiny.best.json}", "--tokens", 4, "--runs", 1, "--device", "cpu"),
    "merge": ("merge", "{tiny.db}", "{other.db}", "--out", "{out.db}"),
}
FOLDERS = [name for name, words in COMMANDS.items() if "{out}" in words]
# Databases, traces, locks, the file from which training resumes, and artifacts, which a row names once they are whole.
BETWEEN = re.compile(r"\.db(-journal)?$|^hub/|/running/|\.lock$|\.part$|\.artifacts/")
BELOW = re.compile(rf"\.+[^/]+\.{re.escape(platform.node())}-{os.getpid()}-\d+-[^/]+")  # what `cache` sweeps
WRITES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.chmod", "os.rmdir", "shutil.rmtree")


class Watched:
    """Sees, at each write of this process, which files there are, and how large."""

    def __init__(self, root: Path) -> None:
        self.root, self.temporary, self.seen, self.writes, self.is_on = root, set[str](), dict[str, int](), 0, False
        self._before = self._files()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.is_on and (is_write or event in WRITES):
            self.is_on = False  # to look opens folders
            self.writes += 1
            for name, size in self._files().items():
                if self._before.get(name) != size:
                    self.seen.setdefault(name, size)
            self.is_on = True

    def _files(self) -> dict[str, int]:
        found = {}
        for folder, folders, files in os.walk(self.root):
            place = os.path.relpath(folder, self.root)
            for name in [name for name in (*folders, *files) if BELOW.search(name)]:
                self.temporary.add(f"{place}/{name}")
            folders[:] = [name for name in folders if not BELOW.search(name)]
            for name in files:
                if not BELOW.search(name) and not BETWEEN.search(f"{place}/{name}"):
                    with suppress(FileNotFoundError):
                        found[f"{place}/{name}"] = os.lstat(f"{folder}/{name}").st_size
        return found

    def unfinished(self) -> list[str]:
        """What was seen under its own name before it was whole, or was no result, but for numbers that come later."""
        now = self._files()
        changed = [name for name, size in self.seen.items() if now.get(name) != size]
        return [name for name in changed if Path(name).name not in ("atp_tune.json", "README.md", "tiny.best.json")]


@pytest.fixture
def written(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: CommandLine) -> Callable[[str], Any]:
    """Runs one of the commands, in a place where its sources are."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(done)

    def call(name: str) -> Any:
        words = [re.sub(r"[{](.*)[}]", lambda found: str(done / found[1]), str(word)) for word in COMMANDS[name]]
        return command(*words)

    for made, words in (
        ("{sparse}", SPARSE),
        ("{packed}", PACKED),
        ("{channels.best.json}", CHANNELS),
        ("{bits.best.json}", BITS),
    ):
        monkeypatch.setitem(COMMANDS, made, words)
    return call


def made_for(name: str, call: Callable[[str], Any], place: Path) -> None:
    """Makes what a command reads."""
    (place / "bits.toml").write_text(STUDY.replace("sparsity = 0.6", "bits = 4"))
    for made in ("{sparse}", "{packed}", "{channels.best.json}", "{bits.best.json}"):
        if made in COMMANDS[name] or (made == "{sparse}" and "{packed}" in COMMANDS[name]):
            assert call(made).code == 0
    shutil.copyfile(place / "tiny.db", place / "other.db")


@slow
@parametrize("name", [*COMMANDS])
def test_whenever_a_command_is_killed_the_next_removes_what_it_left(
    name: str, written: Callable[[str], Any], done: Path, tmp_path: Path, site: Site
) -> None:
    """At each write all but temporary names is whole; what dead processes left under these the same command removes."""
    made_for(name, written, done)
    watched = Watched(tmp_path)
    watched.is_on = True
    answer = written(name)
    watched.is_on = False
    assert (answer.code, answer.err.count("error")) == (0, 0), answer
    assert watched.unfinished() == []
    assert watched.temporary
    assert not [path for path in tmp_path.rglob("*") if BELOW.search(path.name)]
    left = {tmp_path / re.sub(rf"-{os.getpid()}-(\d+)-", rf"-{DEAD}-\1-", place) for place in watched.temporary}
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    for path in done.glob("*.best.json" if name == "tune" else "out*"):  # not there if it is killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "cache" / "sparse", ignore_errors=True)
    assert written(name).code == 0
    assert not [path for path in left if path.exists() and path.parent in (done, tmp_path / "tmp")]
    ROWS.add(f"killed at any write of `{name}`", watched.writes)


@slow
@parametrize("name", FOLDERS)
def test_a_folder_that_is_filled_meanwhile_is_not_touched(
    name: str, written: Callable[[str], Any], done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_for(name, written, done)
    out, sync = done / "out", cache_module._sync

    def fill(path: Path) -> None:
        is_last = (path.parent / PACKED_ABOUT).exists() == ("pack" in name.split(" --") or "packed" in name)
        if "--format" in name:  # the folder of floats comes before
            config = path.parent / "config.json"
            is_last = config.is_file() and "quantization_config" in config.read_text()
        if path.parent.name.startswith(".out.") and is_last and not out.exists():
            out.mkdir()
            (out / "mine").write_text("of another command")
        sync(path)

    monkeypatch.setattr(cache_module, "_sync", fill)
    assert written(name).error == f"{out}: was filled meanwhile, and is left as it is; the result is in {out}-2"
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert (done / "out-2" / "config.json").is_file()
    ROWS.add(f"the folder of `{name}` is filled before it is done", 1)
