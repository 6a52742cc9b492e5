"""Several processes that run one study on this machine."""

import signal
from pathlib import Path

import psutil
import pytest
from crews import LONG, TOTAL, check_whole, measured, meeting, trials
from expect import slow
from optuna.trial import TrialState
from tinystudy import HANGS, Process, finish, run, settings, start, wait_for, wait_until


def begin(place: Path, *more: str, texts: tuple[str, ...] = LONG) -> Process:
    return start("--study", place / "tiny.toml", *settings(*texts, f"search.trials={TOTAL}"), *more)


def workers_of(process: Process) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children() if is_worker(child)]


def is_worker(child: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(child.cmdline())
    except psutil.Error:  # it has just ended
        return False


@slow
def test_three_workers_share_a_study(place: Path) -> None:
    answer = finish(begin(place, "--workers", "3", *meeting(place), texts=()))
    assert answer.code == 0
    check_whole(place)
    assert len({trial.user_attrs["pid"] for trial in measured(place)}) > 1
    assert answer.out.count("loading the model and the texts") == 1
    assert answer.out.count("| meeting + uniform ") == 1
    assert f"[{TOTAL}/{TOTAL}]" in answer.out
    values = {trial.params["beta"]: trial.value for trial in measured(place)}
    alone = run(place, f"search.trials={TOTAL}", name="alone")
    assert {trial.params["beta"]: trial.value for trial in alone.trials} == pytest.approx(values, rel=1e-5)


@slow
def test_ctrl_c_stops_all_and_loses_nothing(place: Path) -> None:
    process = begin(place, "--devices", "cpu,cpu")
    wait_for(place / "tiny.db", 3, process)
    process.send_signal(signal.SIGINT)
    answer = finish(process)
    assert (answer.code, answer.err) == (130, "")
    assert "stopped: finished trials are in" in answer.out
    assert not [trial for trial in trials(place) if trial.state == TrialState.RUNNING]
    assert finish(begin(place)).code == 0
    check_whole(place)


@slow
def test_a_worker_that_dies_is_started_again(place: Path) -> None:
    process = begin(place, "--workers", "2")
    wait_for(place / "tiny.db", 2, process)
    wait_until(lambda: len(workers_of(process)) == 2)
    workers_of(process)[0].kill()
    answer = finish(process)
    assert answer.code == 0
    assert "died (exit code -9): it is started again" in answer.out
    check_whole(place)


@slow
def test_workers_do_not_outlive_their_parent(place: Path) -> None:
    process = begin(place, "--workers", "2")
    wait_for(place / "tiny.db", 2, process)
    wait_until(lambda: len(workers_of(process)) == 2)
    children = workers_of(process)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, HANGS)[1]
    assert finish(begin(place)).code == 0
    check_whole(place)
