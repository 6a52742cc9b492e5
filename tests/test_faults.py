"""Faults that really happen, and what they leave of a study: docs/reliability.md has the table."""

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import optuna
import pytest
from faults import DOCUMENT, Command, Rows, check_best, check_equal, has, measured, names, stored
from preloaded import PHASES, TOTAL, in_phase, kill, kill_at_rename
from tinystudy import settings

ROWS = Rows()
LONG = ("texts.calibration.windows=250", "texts.search.windows=250", f"search.trials={TOTAL}")
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if os.environ.get("ATP_TUNE_WRITE_DOCS") == "1":
        ROWS.write(DOCUMENT)


class Tiny:
    """The tiny study in a folder, run by commands that can be killed."""

    def __init__(self, place: Path, *overrides: str) -> None:
        self.place = place
        self.database = place / "tiny.db"
        self._options = ("--study", place / "tiny.toml", *settings(*overrides))

    def start(self, inject: Callable[[], None] | None = None) -> Command:
        return Command(self.place, *self._options, inject=inject)

    def finish(self) -> float:
        """Runs it to its end; seconds until the first trial, or the report, was stored."""
        before = self._ended()
        command = self.start()
        while command.lives and self._ended() == before:
            sleep(0.01)
        seconds = monotonic() - command.began
        answer = command.finish()
        assert (answer.code, answer.err) == (0, ""), answer
        return seconds

    def _ended(self) -> int:
        if not has(self.database, "SELECT 1 FROM trials"):
            return 0
        study = stored(self.place)
        return len(measured(study)) + len(study.user_attrs.get("reports", ()))

    def has(self, query: str, *values: object) -> bool:
        return has(self.database, query, *values)

    @property
    def study(self) -> optuna.Study:
        return stored(self.place)


@pytest.fixture(scope="module")
def undisturbed(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same study without a fault; to be read only."""
    place = tmp_path_factory.mktemp("undisturbed") / "tiny"
    shutil.copytree(tiny_place, place)
    tiny = Tiny(place, *LONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATP_TUNE_CACHE", str(place.parent / "cache"))
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
@pytest.mark.parametrize("phase", PHASES)
def test_kill_9_in_a_phase(phase: str, tiny: Tiny, undisturbed: Tiny) -> None:
    assert tiny.start(partial(in_phase, phase, kill)).finish().code == -signal.SIGKILL
    assert "tiny.best.json" not in names(tiny.place)
    seconds = tiny.finish()
    check_same(tiny, undisturbed)
    ROWS.add(f"kill -9 while {phase}" if "ing" in phase else f"kill -9 in {phase}", 1, seconds=seconds)


@slow
def test_kill_9_while_best_json_is_written(tiny: Tiny, undisturbed: Tiny) -> None:
    assert tiny.start(kill_at_rename).finish().code == -signal.SIGKILL
    left = {name for name in names(tiny.place) if name.startswith(".tiny.best.json")}
    assert len(left) == 1
    assert "tiny.best.json" not in names(tiny.place)
    seconds = tiny.finish()
    assert not left & names(tiny.place)
    check_same(tiny, undisturbed)
    ROWS.add("kill -9 while exporting best.json", 1, seconds=seconds)


@slow
def test_kill_9_while_the_database_writes(tiny: Tiny, undisturbed: Tiny) -> None:
    """SQLite's journal is there while a transaction is written: whoever comes next rolls it back."""
    journal, times, hot = tiny.place / "tiny.db-journal", 0, 0
    rng = random.Random(0)
    while times < 6:
        command, end = tiny.start(), monotonic() + 0.3 + rng.random()
        if command.kill_when(lambda: is_past(end) and journal.exists(), pause=0):  # noqa: B023
            times += 1
            hot += journal.exists()
        else:
            break
    assert hot > 0
    seconds = tiny.finish()
    check_same(tiny, undisturbed)
    ROWS.add("kill -9 while SQLite writes (its journal left behind)", times, seconds=seconds)


def is_past(end: float) -> bool:
    return monotonic() > end


@slow
def test_kill_9_at_random_moments(place: Path, tmp_path: Path) -> None:
    """Each of 30 runs is killed after a random delay; every trial has a chance to be hit."""
    total = 50
    overrides = (*LONG[:2], f"search.trials={total}")
    other = Tiny(place.parent / "other", *overrides)
    shutil.copytree(place, other.place)
    other.finish()
    tiny, rng, killed = Tiny(place, *overrides), random.Random(0), 0
    while killed < 30:
        command, end = tiny.start(), monotonic() + rng.uniform(0.2, 2.5)
        assert command.kill_when(partial(is_past, end)), f"it was complete after {killed} kills"
        killed += 1
    seconds = tiny.finish()
    check_equal(tiny.study, other.study, total)
    lost = [trial for trial in tiny.study.trials if "lost" in trial.user_attrs]
    assert len(lost) > 5
    ROWS.add(f"kill -9 at random moments of one study of {total} trials", killed, seconds=seconds)
