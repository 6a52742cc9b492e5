"""Machines that go away under a study, and trials that end their process: docs/reliability.md has the table.

`ATP_TUNE_KILLS` says how many kills one study of random kills meets; 20 are in the table.
"""

import os
import random
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic

import optuna
import pytest
import tinystudy
from faults import DOCUMENT, Command, Rows, check_equal, measured
from optuna.trial import TrialState
from preloaded import abort, doom, doom_with_patience, kill, wait_while
from tinystudy import copied, copy_of, make_model, make_tokenizer, settings, stored, wait_until

from atp_tune.storage import progress
from atp_tune.storage.attributes import PREFIX
from atp_tune.storage.progress import trace_left

pytestmark = pytest.mark.slow
ROWS = Rows()
BLOCKS, STEPS = 24, 48  # of a trial
KILLS = int(os.environ.get("ATP_TUNE_KILLS", "8"))
TOTAL = 8
PATIENCE = 900  # seconds, for a machine with other jobs
HUNTED = 3  # the trial that is hit each time, by the number it had first
RUNNING = f"""
    SELECT pid.value_json, COALESCE(first.value_json, number), number FROM trials
    JOIN trial_system_attributes AS plan ON plan.trial_id = trials.trial_id AND plan.key = '{PREFIX}plan'
    JOIN trial_system_attributes AS pid ON pid.trial_id = trials.trial_id AND pid.key = '{PREFIX}pid'
    LEFT JOIN trial_system_attributes AS first ON first.trial_id = trials.trial_id AND first.key = 'failed_trial'
    WHERE state = 'RUNNING'"""


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    yield
    if os.environ.get("ATP_TUNE_WRITE_DOCS") == "1":
        ROWS.write(DOCUMENT)


@pytest.fixture(scope="module")
def deep_place(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny study with a model of more blocks, and so more places to be killed at; to be read only."""
    place = Path(shutil.copytree(tiny_place, tmp_path_factory.mktemp("deep") / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinystudy, "BLOCKS", BLOCKS)
        make_model(make_tokenizer(), steps=2).save_pretrained(place / "model")
    return place


deep = copy_of("deep_place")


class WorkerPool:
    """Two commands that run one study; one that was killed is started again."""

    def __init__(self, place: Path, inject: Callable[[], None] | None = None, trials: int = TOTAL) -> None:
        self._database = place / "tiny.db"
        long = ("texts.calibration.nsamples=40", "texts.validation.nsamples=40", f"search.trials={trials}")
        self._words = ("--study", place / "tiny.toml", *settings(*long))
        self._inject = inject
        self.commands: list[Command] = []

    def begin(self) -> None:
        """The second joins when the first has queued the first trials, so that none of these is queued twice."""
        self.commands = [self._start()]
        wait_until(self.running, PATIENCE)
        self.commands.append(self._start())

    def refill(self) -> None:
        self.commands = [command if command.lives else self._start() for command in self.commands]

    def finish(self) -> float:
        """Lets both come to the end; seconds until a trial was stored."""
        began, before = monotonic(), self.ended()
        self.refill()
        wait_until(lambda: self.ended() > before or not any(command.lives for command in self.commands), PATIENCE)
        seconds = monotonic() - began
        for command in self.commands:
            answer = command.finish()
            assert answer.code == 0
        return seconds

    def running(self) -> dict[int, tuple[Command, int]]:
        """The trials that are measured, by the numbers that they had first: who runs it, and its number now."""
        by_pid = {command.pid: command for command in self.commands if command.lives}
        rows = [(int(pid), int(first), int(number)) for pid, first, number in self._rows(RUNNING)]
        return {first: (by_pid[pid], number) for pid, first, number in rows if pid in by_pid}

    def ended(self) -> int:
        return len(self._rows("SELECT 1 FROM trials WHERE state = 'COMPLETE'"))

    def _start(self) -> Command:
        return Command(*self._words, inject=self._inject)

    def _rows(self, query: str) -> list[tuple[str, ...]]:
        try:
            with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True, timeout=5)) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # the file or its tables are being made
            return []


def kill_all(commands: list[Command]) -> int:
    """Kills them at one moment; how many lived."""
    alive = [command for command in commands if command.lives]
    for command in alive:
        os.kill(command.pid, signal.SIGKILL)
    return sum(command.finish().code == -signal.SIGKILL for command in alive)


@pytest.fixture(scope="module")
def undisturbed(deep_place: Path, tmp_path_factory: pytest.TempPathFactory) -> optuna.Study:
    """The same study without a kill."""
    with copied(deep_place, tmp_path_factory) as place:
        crew = WorkerPool(place)
        crew.begin()
        crew.finish()
        return stored(place)


def check(place: Path, undisturbed: optuna.Study, crew: WorkerPool, fault: str, kills: int) -> None:
    seconds = crew.finish()
    study = stored(place)
    assert not [trial.number for trial in study.trials if progress.given_up(trial)]
    check_equal(study, undisturbed, TOTAL)
    ROWS.add(fault, kills, seconds=seconds)


def test_kills_of_one_process_or_of_all_at_random_moments(deep: Path, undisturbed: optuna.Study) -> None:
    rng, crew, kills = random.Random(0), WorkerPool(deep), 0
    crew.begin()
    while kills < KILLS and crew.ended() < TOTAL:
        crew.refill()
        wait_for_some_steps(crew, rng)
        victims = rng.choice([crew.commands[:1], crew.commands[1:], crew.commands])
        kills += kill_all(victims) > 0
    fault = "kill -9 of one of two workers, or of both, at random moments of a study of 8 trials"
    check(deep, undisturbed, crew, fault, kills)


def wait_for_some_steps(crew: WorkerPool, rng: random.Random) -> None:
    """Until a trial has come some steps further, or has ended: few, so that kills are faster than trials."""
    wait_until(lambda: crew.running() or crew.ended() == TOTAL, PATIENCE)
    for command, number in list(crew.running().values())[:1]:
        last = min(STEPS, steps(number, command.pid) + rng.randrange(STEPS // 3))
        wait_until(lambda: steps(number, command.pid) >= last, PATIENCE)  # noqa: B023


def test_the_same_trial_is_hit_each_time(deep: Path, undisturbed: optuna.Study) -> None:
    """It goes past its middle only when the kills are over: however slow this process is, it finds it running."""
    hunt, rng = deep / "hunt", random.Random(0)
    hunt.touch()
    crew = WorkerPool(deep, partial(doom, HUNTED, partial(wait_while, hunt), BLOCKS // 2))
    crew.begin()
    for _ in range(KILLS):
        crew.refill()
        wait_until(lambda: HUNTED in crew.running(), PATIENCE)
        (command, number), last = crew.running()[HUNTED], rng.randrange(STEPS // 2)
        assert command.kill_when(lambda: steps(number, command.pid) >= last)  # noqa: B023
    hunt.unlink()
    hit = [trial for trial in stored(deep).trials if trial.system_attrs.get("failed_trial") == HUNTED]
    assert len(hit) >= KILLS - 1
    fault = "kill -9 of each process that runs a certain trial, at a random step of it"
    check(deep, undisturbed, crew, fault, KILLS)


def steps(number: int, pid: int) -> int:
    """After how many steps a trial of a process is, all if it has ended: each block is pruned, then evaluated."""
    place, _ = trace_left("tiny", number, pid)
    found = re.match(r"after (prune|evaluate) (\d+) of", place or "")
    if place and not found:
        return 0
    return 2 * int(found[2]) - (found[1] == "prune") if found else STEPS


@pytest.mark.parametrize(
    ("fault", "end"),
    [("that aborts its process", abort), ("whose process the system kills, at the same step each time", kill)],
)
def test_a_trial_that_ends_its_process_is_given_up(fault: str, end: Callable[[], None], deep: Path) -> None:
    crew = WorkerPool(deep, partial(doom, 1, end), trials=3)
    crew.begin()
    check_given_up(deep, crew, progress.SAME)
    ROWS.add(f"a trial {fault}", progress.SAME, same="that trial counts as failed, the study goes on")


def test_a_trial_that_ends_its_process_anywhere_is_given_up_in_the_end(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that leaks memory; after 6 times here."""
    monkeypatch.setattr(progress, "MOST", 6)
    crew = WorkerPool(deep, partial(doom_with_patience, 1, 6), trials=3)
    crew.begin()
    check_given_up(deep, crew, None)


def check_given_up(place: Path, crew: WorkerPool, times: int | None) -> None:
    """Starts whoever was killed until all have come to the end; one trial is given up, the others are measured."""
    while codes := [command.finish().code for command in crew.commands]:
        assert set(codes) <= {0, -signal.SIGKILL, -signal.SIGABRT}
        if set(codes) == {0}:
            break
        crew.refill()
    study = stored(place)
    lost = [trial for trial in study.trials if trial.state == TrialState.FAIL and not is_double(trial)]
    assert len({str(trial.params) for trial in lost}) == 1
    assert times is None or len(lost) == times
    assert [bool(progress.given_up(trial)) for trial in lost] == [False] * (len(lost) - 1) + [True]
    assert progress.counted(study) == 3
    assert len(measured(study)) == 2


def is_double(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial was queued twice, by two that were started again at the same moment, and ended unmeasured."""
    return trial.user_attrs.get("lost") == progress.SURPLUS
