"""What commands write: two processes at once, a place that is filled meanwhile, and a process that is killed."""

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
from faults import DOCUMENT, Rows
from test_annotations import FOUND, SCORES, best_of
from tinystudy import HANGS, stored, study_file

import atp_tune
from atp_tune.cache import (
    TakenError,
    alone_with,
    cache_dir,
    folder_atomically,
    keep,
    sha256_of,
    write_atomically,
    write_out,
)
from atp_tune.results import annotations
from atp_tune.search.final_scores import store_test_scores, write_best
from atp_tune.search.runner import StudyRun
from atp_tune.spec.config import read_config
from atp_tune.storage import validation

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

    def store(k: int) -> None:
        store_test_scores(study, str(first + k), [1.0], [1.0], [1])
        study.set_user_attr(f"draws:1000:{first + k}", [1.0])
        study.set_user_attr(f"refits:1000:2:{first + k}", [1.0])
        for key in validation.FOUND:
            annotations.store(study, key, first + k, FOUND)

    return store


def all_trials_are_there(place: Path) -> None:
    found = opened(place).user_attrs
    wanted = {str(first + k) for first in (1000, 2000) for k in range(ROUNDS)}
    found |= {"draws": found["draws"]["1000"], "refits": found["refits"]["1000"]["2"]}
    for table in validation.TABLES:
        assert not wanted - found[table].keys(), table


def attach(place: Path, writer: int) -> Round:
    """One stores a speed in a configuration, the other scores on tasks, each time others."""
    (path, config), study = best_of(place), opened(place)

    def speed(k: int) -> None:
        zeros = {"self_attn.q_proj": k / ROUNDS}
        annotations.store(study, "speed", config.trial, {**FOUND, "zeros": zeros})
        annotations.attach(path, config, "speed", {**FOUND, "zeros": zeros})
        found = read_config(path).speed
        assert found and found.zeros == zeros

    def scores(k: int) -> None:
        annotations.attach(path, config, "zero_shot", SCORES.model_copy(update={"seconds": {"dense": k}}))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
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


def test_temporary_names_are_made_in_one_place() -> None:
    """Where the next process knows them, and removes what a dead one left."""
    makes = re.compile(r"\b(mkdtemp|mkstemp|TemporaryDirectory|NamedTemporaryFile)\b")
    files = Path(atp_tune.__file__).parent.rglob("*.py")
    assert [file.name for file in files if makes.search(file.read_text(encoding="utf-8"))] == ["cache.py"]
