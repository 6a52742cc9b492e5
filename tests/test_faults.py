"""Faults that really happen, and what they leave of a study: docs/reliability.md has the table."""

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import optuna
import pytest
import torch
from expect import parametrize, slow
from faults import DOCUMENT, Command, Rows, check_best, check_equal, curve, disk, fill, has, measured, names, row
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState
from preloaded import (
    PHASES,
    TOTAL,
    in_phase,
    kill,
    kill_in_transaction,
)
from processes import output
from test_network import needs, serving
from tinystudy import (
    CommandLine,
    copied,
    finish,
    free_port,
    go_silent,
    hear,
    run,
    settings,
    start,
    stored,
    wait_for,
    wait_until,
)

from atp_tune.events import Event, Message, TrialStarted
from atp_tune.run import observers
from atp_tune.run.observers import RoleScores
from atp_tune.search import runner
from atp_tune.storage import progress
from atp_tune.storage.attributes import PREFIX
from atp_tune.utils.cache import versions

ROWS = Rows()
WRITES = os.environ.get("ATP_TUNE_WRITE_DOCS") == "1"
LONG = ("texts.calibration.nsamples=250", "texts.validation.nsamples=250", f"search.trials={TOTAL}")
RUNS = f"""SELECT 1 FROM trials JOIN trial_system_attributes USING (trial_id)
    WHERE state = 'RUNNING' AND key = '{PREFIX}plan'"""
# Changes when a trial, or a number of the report, is stored.
PROGRESS = f"""SELECT (SELECT count(*) FROM trials WHERE state = 'COMPLETE'),
    (SELECT count(*) FROM study_system_attributes WHERE key LIKE '{PREFIX}test_nlls:%')"""
TRANSACTIONS = (2, 12, 20, 28)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    yield
    if WRITES:
        ROWS.write(DOCUMENT)


class Tiny:
    """The tiny study in a folder, run by commands that can be killed."""

    def __init__(self, place: Path, *overrides: str) -> None:
        self.place = place
        self.database = place / "tiny.db"
        self._options = ("--study", place / "tiny.toml", *settings(*overrides))

    def start(self, inject: Callable[[], None] | None = None) -> Command:
        return Command(*self._options, inject=inject)

    def finish(self) -> float:
        """Runs it to its end; seconds until the first trial, or the report, was stored."""
        before = row(self.database, PROGRESS)
        command = self.start()
        wait_until(lambda: not command.lives or row(self.database, PROGRESS) not in (before, None))
        seconds = monotonic() - command.began
        answer = command.finish()
        assert answer.is_clean
        return seconds

    def has(self, query: str, *values: object) -> bool:
        return has(self.database, query, *values)

    @property
    def study(self) -> optuna.Study:
        return stored(self.place)


@pytest.fixture(scope="module")
def undisturbed(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same study without a fault; to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        tiny = Tiny(place, *LONG)
        tiny.finish()
        return tiny


@pytest.fixture
def tiny(place: Path) -> Tiny:
    return Tiny(place, *LONG)


def check_same(tiny: Tiny, undisturbed: Tiny) -> None:
    check_equal(tiny.study, undisturbed.study, TOTAL)
    check_best(tiny.place / "tiny.best.json", undisturbed.place / "tiny.best.json")


# --- kill -9


@slow
@parametrize("phase", PHASES)
def test_kill_9_in_a_phase(phase: str, tiny: Tiny, undisturbed: Tiny) -> None:
    assert tiny.start(partial(in_phase, phase, kill)).finish().code == -signal.SIGKILL
    assert "tiny.best.json" not in names(tiny.place)
    seconds = tiny.finish()
    check_same(tiny, undisturbed)
    ROWS.add(f"kill -9 while {phase}" if "ing" in phase else f"kill -9 in {phase}", 1, seconds=seconds)


@slow
def test_kill_9_while_the_database_writes(tiny: Tiny, undisturbed: Tiny) -> None:
    """SQLite's journal is there while a transaction is written: whoever comes next rolls it back.

    The transactions are some of the first trials, and one of the study before them.
    """
    journal = tiny.place / "tiny.db-journal"
    for number in TRANSACTIONS:
        assert tiny.start(partial(kill_in_transaction, number, journal)).finish().code == -signal.SIGKILL
        assert journal.exists()
    seconds = tiny.finish()
    check_same(tiny, undisturbed)
    ROWS.add("kill -9 while SQLite writes, which leaves its journal", len(TRANSACTIONS), seconds=seconds)


# --- the power is cut


# --- disks


@slow
def test_the_disk_is_full_while_the_database_grows(place: Path, tmp_path: Path, undisturbed: Tiny) -> None:
    with disk(tmp_path / "disk", "4m") as folder:
        shutil.copytree(place, folder / "tiny")
        tiny, times = Tiny(folder / "tiny", *LONG), 0
        for room in (0, 30_000, 130_000, 170_000, 210_000, 250_000):
            filler = fill(folder, max(0, room - (tiny.database.stat().st_size if tiny.database.exists() else 0)))
            answer = tiny.start().finish()
            filler.unlink()
            if answer.code == 0:
                break
            assert "disk" in answer.error or "No space left" in answer.error
            assert not (tiny.place / "tiny.best.json").exists()
            times += 1
        assert times >= 3
        seconds = tiny.finish()
        check_same(tiny, undisturbed)
    ROWS.add("disk full while the database writes", times, seconds=seconds)


@slow
def test_the_disk_of_a_server_is_full(place: Path, tmp_path: Path, undisturbed: Tiny) -> None:
    """A worker on the network waits until there is room on the server's disk, and goes on with what it has computed."""
    with disk(tmp_path / "disk", "64m") as folder:  # room for the report of 5 MB that the server keeps there too
        there, port = Path(shutil.copytree(place, folder / "tiny")), free_port()
        with serving(there, "127.0.0.1", free_port(), port, "tiny.db"):
            options = ("--study", place / "tiny.toml", *settings(*LONG), "--storage", f"grpc://127.0.0.1:{port}")
            worker = start(*options)
            wait_until(lambda: has(there / "tiny.db", RUNS))
            filler = fill(folder, 0)
            heard = hear(worker, "trying again, nothing is lost")
            assert "its database: " in heard
            assert "is full; make room on the disk" in heard
            began, ended = monotonic(), len(measured(stored(there)))
            filler.unlink()
            wait_until(lambda: len(measured(stored(there))) > ended)
            seconds = monotonic() - began
            answer = finish(worker)
            assert answer.is_clean
        check_equal(stored(there), undisturbed.study, TOTAL)
    ROWS.add("disk of a gRPC server full while a worker on another machine runs a trial", 1, seconds=seconds)


@slow
def test_the_disk_is_full_for_exports_and_reports(done: Path, tmp_path: Path, command: CommandLine) -> None:
    best = (done / "tiny.best.json").read_bytes()
    with disk(tmp_path / "disk", "16m") as folder:
        place = Path(shutil.copytree(done, folder / "tiny"))
        study, config = ("--study", place / "tiny.toml"), ("--config", place / "tiny.best.json", "--device", "cpu")
        (place / "tiny.best.json").write_bytes(best)
        for words, name in (
            (("export", *study, "--out", place / "new.json"), "new.json"),
            (("report", *study, "--out", place / "new.html"), "new.html"),
            (("apply", *config, "--out", place / "sparse"), "sparse"),
        ):
            filler, before = fill(folder, 0), names(place)
            answer = command(*words)
            said = "0 MB are free there; make room" if name == "sparse" else "No space left on device"
            assert said in answer.error
            assert names(place) == before
            filler.unlink()
            answer = command.ok(*words)
            assert names(place) == {*before, name}
            shutil.rmtree(place / name) if name == "sparse" else (place / name).unlink()
        assert (place / "tiny.best.json").read_bytes() == best
    ROWS.add("disk full for `export`, `report` and `apply`", 3)


@slow
def test_a_folder_that_is_read_only(done: Path, tmp_path: Path, command: CommandLine) -> None:
    with disk(tmp_path / "disk", "4m") as folder:
        place = Path(shutil.copytree(done, folder / "tiny"))
        (place / "tiny.best.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        study = ("--study", place / "tiny.toml")
        assert command(*study, "--trials", "9").error == (
            f"storage {place / 'tiny.db'}: Read-only file system; name another with --storage sqlite:///FILE.db"
        )
        asked_before = f"cannot be written: {place} does not let you write"
        for name, ending, said in (
            ("export", "best.json", "Read-only file system"), ("report", "report.html", asked_before),
        ):  # fmt: skip
            answer = command(name, *study)
            assert answer.error == f"{place}/tiny.{ending}: {said}; choose another place with --out FILE"
            command.ok(name, *study, "--out", tmp_path / ending)
        command.ok("status", *study)
        answer = command.ok(*study, "--trials", "1", "--storage", f"sqlite:///{tmp_path}/new.db")
    ROWS.add("study folder read-only, for a run, `export`, `report`, `status`", 4)


# --- a damaged database

DAMAGE: dict[str, Callable[[bytearray], bytes | bytearray]] = {
    "header": lambda file: bytearray(b"x" * 100) + file[100:],
    "page of the schema": lambda file: file[:100] + bytes(3000) + file[3100:],
    "middle": lambda file: file[:4096] + random.Random(0).randbytes(len(file) - 3 * 4096) + file[-2 * 4096 :],
    "truncated": lambda file: file[: len(file) // 2],
    "truncated within a page": lambda file: file[: len(file) - 5000],
    "text": lambda file: b"number,value\n0,47.1\n" * 100,
}


@parametrize("damage", DAMAGE)
def test_a_damaged_database_is_one_line_and_left_alone(damage: str, done: Path, command: CommandLine) -> None:
    database = done / "tiny.db"
    database.write_bytes(DAMAGE[damage](bytearray(database.read_bytes())))
    before, there = database.read_bytes(), names(done)
    study = ("--study", done / "tiny.toml")
    for words in ((), ("status",), ("export",), ("report",), ("serve", "--port", "0", "--grpc-port", "0")):
        error = command(*words, *study).error
        assert error.startswith(f"storage {database}: ")
        assert f"sqlite3 {database} .recover | sqlite3 NEW.db" in error
        assert database.read_bytes() == before
    assert names(done) - there <= {"tiny.artifacts"}
    ROWS.add("database damaged (header, schema, middle, truncated twice, text), 5 commands each", 5 * len(DAMAGE))


@slow
def test_the_way_to_recover_that_is_named_recovers(done: Path, command: CommandLine) -> None:
    """A page of an index is gone: what is in the tables is read, and the study goes on in another file."""
    needs("sqlite3")
    database, before = done / "tiny.db", measured(stored(done))
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'trial_user_attributes'"
        page = connection.execute(query).fetchone()[0]
    file = bytearray(database.read_bytes())
    file[(page - 1) * 4096 : page * 4096] = bytes(4096)
    database.write_bytes(file)
    found = re.search(r"`(.*)`", command("status", "--study", done / "tiny.toml").error)
    assert found
    subprocess.run(found[1], shell=True, check=True, cwd=done)
    command.ok("--study", done / "tiny.toml", "--storage", f"sqlite:///{done}/NEW.db", "--trials", "7")
    assert [row in measured(stored(done, database=done / "NEW.db")) for row in before] == [True] * 6
    ROWS.add("an index destroyed, and repaired as the error message says", 1)


# --- the model


@slow
def test_a_model_that_changes_while_it_is_used_is_not_mixed(
    place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # the dense model, trial 0, trial 1
            file.write_bytes(other)
        return nlls(*arguments, **options)

    file, calls = place / "model" / "model.safetensors", list[int]()
    good, nlls = file.read_bytes(), observers.head_scores
    other = good[:-4] + bytes(4)
    monkeypatch.setattr(observers, "head_scores", change)
    study = ("--study", place / "tiny.toml")
    said = "model.source: the files of model were changed while they were in use; nothing was stored of it. "
    assert command(*study).error.startswith(said)
    assert [trial.value is None for trial in stored(place).trials] == [False, True]
    assert "model.content is " in command(*study).error
    file.write_bytes(good)
    command.ok(*study)
    undisturbed = run(place, name="undisturbed")
    check_equal(stored(place), undisturbed, 3)
    ROWS.add("model file changed during a run, and between two runs", 2)


# --- memory


@slow
@parametrize("kind", ["cuda", "host"])
@parametrize("phase", ["calibration", "pruning", "evaluation"])
def test_memory_runs_out_in_a_trial(phase: str, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial fails with the reason, the others are measured."""

    def raises() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory") if kind == "cuda" else MemoryError()

    owner, name, _ = PHASES[phase]
    monkeypatch.setattr(owner, name, getattr(owner, name))  # and put back afterwards
    watched = {"trial 1": raises}
    whole = getattr(owner, name)
    title: list[str] = [""]

    def instead(*arguments: Any, **options: Any) -> Any:
        watched.get(title[0], lambda: None)()
        return whole(*arguments, **options)

    def watch(event: Event) -> None:
        if isinstance(event, TrialStarted):
            title[0] = event.title

    monkeypatch.setattr(owner, name, instead)
    study = run(place, watch=watch)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert str(study.trials[1].user_attrs["failure"]).startswith("out of memory")
    assert study.user_attrs["test_nlls"]
    ROWS.add("memory runs out in calibration, pruning, evaluation", 6, same="that trial fails, the study goes on")


@slow
def test_memory_runs_out_in_the_report(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def report_fails(scores: RoleScores) -> Any:
        if scores.role == "test":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(scores)

    whole = RoleScores.end
    study = ("--study", place / "tiny.toml")
    with monkeypatch.context() as patch:
        patch.setattr(RoleScores, "end", report_fails)
        assert command(*study).error.startswith("test text: dense model: out of memory; what is stored is safe")
    assert len(measured(stored(place))) == 3
    command.ok(*study)
    check_equal(stored(place), run(place, name="undisturbed"), 3)
    ROWS.add("memory runs out while the test text is measured", 1)


# What is freed goes back to the system, and is asked for again.
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
LIMITED = """
import resource, sys
from pathlib import Path
import psutil, torch
sys.path.insert(0, sys.argv[1])
import preloaded
from tinystudy import run
from atp_tune.run import session
from atp_tune.events import TrialEnded, TrialStarted
session.reuse_freed_memory = lambda: None  # else a trial finds what the one before has freed

def watch(event):
    if isinstance(event, TrialStarted) and event.title == "trial 1":
        limit(psutil.Process().memory_info().vms + 300_000)
    if isinstance(event, TrialEnded):
        limit(resource.RLIM_INFINITY)

def limit(size):
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))

study = run(Path(sys.argv[2]), *sys.argv[3:], watch=watch)
print("states", *(trial.state.name for trial in study.trials), study.trials[1].user_attrs.get("failure"))
"""


@slow
def test_memory_runs_out_for_real(place: Path) -> None:
    """The system gives the process no more than it has while one trial runs."""
    words = (sys.executable, "-c", LIMITED, Path(__file__).parent, place, *LONG[:2])
    assert (
        output(*words, env={**os.environ, **AT_ONCE})
        .splitlines()[-1]
        .startswith("states COMPLETE FAIL COMPLETE out of memory")
    )
    assert stored(place).user_attrs["test_nlls"]
    ROWS.add("a trial at the memory limit of its process (RLIMIT_AS)", 1, same="that trial fails, the study goes on")


# What the process itself holds: pages of libraries, which are in its resident memory too, come and go with what the
# machine has to spare, and garbage stays until the collector comes. Each new best trial is published, as in long runs:
# what is imported for the first one, 12 MB, is there early, and not in whichever trial the 30th second falls into.
GROWTH = """
import ctypes, gc, sys
sys.path.insert(0, sys.argv[1])
from tinystudy import Path, run
from atp_tune.events import TrialEnded
from atp_tune.search import runner
runner.PUBLISH = 0
libc, sizes = ctypes.CDLL(None), []

def look(event):
    if isinstance(event, TrialEnded):
        gc.collect()
        if not sizes:
            gc.freeze()  # what was imported: else each collection looks at all of it
        libc.malloc_trim(0)
        held = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        sizes.append(int(held.split()[1]) * 1024)

run(Path(sys.argv[2]), "search.trials=100", watch=look)
print("sizes", *sizes)
"""


@slow
def test_memory_is_flat(place: Path) -> None:
    said = output(sys.executable, "-c", GROWTH, Path(__file__).parent, place, env={**os.environ, **AT_ONCE})
    sizes = [int(size) / 1e6 for size in said.rpartition("sizes ")[2].split()]
    assert len(sizes) == 100
    early, late = sizes[19], sizes[-1]
    if WRITES:
        (DOCUMENT.parent / "memory.svg").write_text(curve(sizes, "memory of its own, MB, after each of 100 trials"))
    assert late - early < 5
    same = f"yes; {late - early:+.1f} MB from the 20th trial to the last"
    ROWS.add("100 trials in one process: [memory](memory.svg) stays flat", 1, same=same)


# --- clocks, versions, busy processes


@slow
def test_the_clock_is_set_back_while_a_trial_runs(place: Path, tmp_path: Path, undisturbed: Tiny) -> None:
    """By an hour under a process that runs; it is killed, and the next one has the right time again: an hour later."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None and "CI" not in os.environ:
        pytest.skip("needs libfaketime")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    variables = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    words = ("--study", place / "tiny.toml", *settings(*LONG))
    process, tiny = start(*words, environment=variables), Tiny(place, *LONG)
    wait_for(place / "tiny.db", 1, process)
    clock.write_text("-3600s")
    wait_for(place / "tiny.db", 3, process)
    process.kill()
    finish(process)
    moved = [trial.datetime_start for trial in tiny.study.trials[1:4] if trial.datetime_start]
    assert moved[0] > moved[-1]
    seconds = tiny.finish()
    check_same(tiny, undisturbed)
    ROWS.add("clock set back by an hour while a trial runs, process killed, clock corrected", 1, seconds=seconds)


@slow
def test_another_version_is_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place, "search.trials=1")
    notes: list[str] = []
    monkeypatch.setattr(runner, "versions", lambda: {**versions(), "atp_tune": "9.9", "torch": "8.8"})
    run(place, "search.trials=3", watch=lambda event: notes.append(event.text) if isinstance(event, Message) else None)
    assert f"trial 0 was measured with atp_tune {versions()['atp_tune']}, torch {versions()['torch']}; " in notes[1]
    assert "now it is atp_tune 9.9, torch 8.8" in notes[1]
    ROWS.add("two versions of the program on one study: allowed, with a note", 1)


@slow
def test_a_trial_that_is_silent_but_alive_is_not_taken(place: Path) -> None:
    """Its process is stopped, and said nothing for an hour: another one on this host waits for it."""
    tiny = Tiny(place, *LONG)
    command = tiny.start()
    wait_until(lambda: is_stopped_in_a_trial(tiny, command))
    go_silent(tiny.database)
    assert progress.requeue_lost(tiny.study) == []
    with pytest.warns(ExperimentalWarning):
        optuna.storages.fail_stale_trials(tiny.study)  # what Optuna does before each trial
    assert tiny.has(RUNS)
    os.kill(command.pid, signal.SIGCONT)
    assert command.finish().code == 0
    assert all(trial.state == TrialState.COMPLETE for trial in tiny.study.trials)
    ROWS.add("process suspended, its last heartbeat an hour old", 1)


def is_stopped_in_a_trial(tiny: Tiny, command: Command) -> bool:
    """Stops a command where it runs a trial and writes nothing; else it goes on."""
    os.kill(command.pid, signal.SIGSTOP)
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(tiny.database, timeout=0)) as connection:
        connection.execute("BEGIN IMMEDIATE")  # fails where the command holds a lock
        connection.rollback()
        if tiny.has(RUNS):
            return True
    os.kill(command.pid, signal.SIGCONT)
    return False
