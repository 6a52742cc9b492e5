"""Studies over an interval of sparsities: their points, and what the screen, `export`, figures and reports say."""

import math
import os
import pty
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from expect import parametrize, refused, slow
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from synthetic import VERSIONS, storage_in
from tinystudy import TUNE, CommandLine

from atp_tune.config.best import read_config
from atp_tune.config.studyfile import load, settings
from atp_tune.results.goals import best_trial, goal_in, limit_excess
from atp_tune.results.status import make_status
from atp_tune.results.summary import summarise

NOW = datetime(2026, 1, 2, 3, 4, 5)
STUDIES = TUNE.parent / "studies"
WINDOWS, BLOCKS = 16, 4
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "pruner": CategoricalDistribution(("wanda",)),
    "allocation": CategoricalDistribution(("atp",)),
    "sparsity": FloatDistribution(0.2, 0.7, step=0.005),
    "beta": FloatDistribution(0.0, 1.0),
}
DENSE = 20.0
LEVELS = {  # sparsity → perplexity of ATP, of uniform
    0.2: (21.0, 20.5),
    0.3: (21.5, 22.0),
    0.5: (26.0, 30.0),
    0.7: (60.0, 90.0),
}


pytestmark = pytest.mark.usefixtures("without_warnings")


def nlls_at(level: float, seed: str) -> list[float]:
    """Windows that are hard are so for all plans."""
    text, own = random.Random(0), random.Random(seed)
    return [math.log(level) + text.gauss(0, 0.2) + own.gauss(0, 0.01) for _ in range(WINDOWS)]


def trial_at(sparsity: float, share: float, level: float) -> FrozenTrial:
    nlls, beta = nlls_at(level, f"{sparsity} {share}"), 0.1 * share
    known = {
        "plan": {
            "method": "wanda",
            "allocation": "atp",
            "parameters": {"beta": beta},
            "levels": [sparsity + beta * (k - 1.5) for k in range(BLOCKS)],
        },
        "errors": [0.1 + 0.02 * k for k in range(BLOCKS)],
        "nlls": nlls,
        "stderr": 1.0,
        "realised": sparsity,
        "seconds": {"prune": 1.0, "evaluate": 2.0},
        "device": "cpu (2 threads)",
        "versions": VERSIONS,
    }
    params = {"pruner": "wanda", "allocation": "atp", "sparsity": sparsity, "beta": share}
    return create_trial(
        values=[math.exp(sum(nlls) / WINDOWS), round(1 - sparsity, 6)],
        params=params,
        distributions=DISTRIBUTIONS,
        user_attrs=known,
    )


def made_front(place: Path | None = None, levels: Mapping[float, Sequence[float]] = LEVELS) -> optuna.Study:
    """Trials 0, 2, … of ATP and 1, 3, … of uniform at four sparsities; in a database beside a study file, or memory."""
    study = optuna.create_study(
        study_name="made",
        directions=["minimize", "minimize"],
        storage=None if place is None else storage_in(place / "made.db"),
    )
    path = STUDIES / "smol-front.toml"
    if place is not None:
        path = Path(shutil.copy(path, place / "made.toml"))
    facts = {"model.content": "ab" * 32, "model.dtype": "float32", "sparsity": [0.2, 0.7]}
    study.set_user_attr("fingerprint", facts)
    study.set_user_attr("sizes", [1000] * BLOCKS)
    study.set_user_attr("total", 8)
    study.set_user_attr("made_from", settings(load(str(path))))
    study.set_user_attr("dense", nlls_at(DENSE, "dense"))
    for sparsity, pair in levels.items():
        study.add_trials([trial_at(sparsity, 0.5 * (not k), level) for k, level in enumerate(pair)])
    return study


def with_test_text(study: optuna.Study, *numbers: int) -> optuna.Study:
    """The dense model and these trials measured on the test text too."""
    levels = [level for pair in LEVELS.values() for level in pair]
    rows = {str(number): nlls_at(levels[number] - 3, f"test {number}") for number in numbers}
    study.set_user_attr("test_nlls", {"dense": nlls_at(DENSE - 3, "test dense"), **rows})
    return study


def outcome(study: optuna.Study) -> str:
    summary = summarise(study)
    return summary.goal.outcome(summary)


def test_a_pair_that_is_not_on_the_front_is_a_point_too() -> None:
    """The table had three rows where eight pairs were measured."""
    study = made_front()
    study.add_trial(trial_at(0.4, 0.5, 27.0))  # 8: worse than 50 % has, and than uniform
    study.add_trial(trial_at(0.4, 0.0, 26.5))
    study.add_trial(trial_at(0.6, 0.5, 99.0))  # without uniform beside it
    points = goal_in(study).points()
    assert [(point.trial.number, point.on_front) for point in points] == [
        (1, True), (2, True), (9, False), (4, True), (6, True),
    ]  # fmt: skip
    assert outcome(study).startswith("Pareto front: 4 points, from 20% ")


# The points


@parametrize(("wanted", "number"), [(0.5, 4), (0.45, 4), (0.4, 2), (0.25, 1), (0.7, 6), (0.2, 1)])
def test_the_nearest_of_the_front(wanted: float, number: int) -> None:
    assert goal_in(made_front()).nearest(wanted).trial.number == number  # of two as near the lower one


@parametrize(
    ("limit", "number"), [({"max_increase": 0.1}, 2), ({"max_perplexity": 31.0}, 4), ({"max_increase": 0.001}, 1)]
)
def test_the_sparsest_within_a_limit_by_hand(limit: dict[str, float], number: int) -> None:
    study = made_front()
    inside = [t for t in study.trials if limit_excess(study, t, limit) <= 0]
    if not inside:
        with refused(f"the nearest is trial {number}, "):
            goal_in(study).sparsest(limit)
        return
    highest, found = max(t.params["sparsity"] for t in inside), goal_in(study).sparsest(limit).trial
    assert (found.number, found.params["sparsity"]) == (number, highest)
    assert found.values[0] == min(t.values[0] for t in inside if t.params["sparsity"] == highest)


# Words


@parametrize(
    ("levels", "number", "why"),
    [
        ({0.2: 20.5, 0.5: 21.2}, 1, "the sparsest within 10% more perplexity than dense"),
        ({0.2: 20.5, 0.5: 30.0}, 0, "the sparsest within 10% more perplexity than dense"),
        ({0.2: 23.0, 0.5: 30.0}, 0, "the nearest to 10% more perplexity than dense"),
        ({0.2: 20.5, 0.3: 27.0, 0.4: 30.0}, 0, "the sparsest within 10% more perplexity than dense"),  # a concave front
        ({0.2: 20.5, 0.3: 21.0, 0.4: 30.0}, 1, "the knee"),
        ({0.2: 20.5, 0.3: 21.0, 0.35: 31.0, 0.4: 30.0}, 1, "the knee"),  # a point that is not on the front
    ],
)
def test_the_best_of_a_front_is_not_its_densest_end(levels: dict[float, float], number: int, why: str) -> None:
    """It was the lowest perplexity, which is nearly always the least sparse plan."""
    study = made_front(levels={sparsity: (level,) for sparsity, level in levels.items()})
    best = best_trial(study)
    assert best is not None and best.number == number
    assert f"best: trial {number}, " in (said := outcome(study)) and why in said
    shown = make_status(summarise(study), NOW).best
    assert shown is not None and shown.trial == number  # in the progress line too


# The screen


# Export


@slow
@parametrize(
    ("options", "number", "said"),
    [
        (["--sparsity", "0.5"], 4, "trial 4, 50% wanda + atp (β = 0.05000): on the front\n"),
        (["--sparsity", "45%"], 4, "trial 4, 50% wanda + atp (β = 0.05000): the nearest to 45% on the front\n"),
        (
            ["--max-increase", "10%"],
            2,
            "trial 2, 30% wanda + atp (β = 0.05000): the sparsest within 10% more ",
        ),
        (["--trial", "6"], 6, ""),
    ],
)
def test_a_point_is_exported(options: list[str], number: int, said: str, tmp_path: Path, command: CommandLine) -> None:
    with_test_text(made_front(tmp_path), *range(8))
    answer = command("export", "--study", tmp_path / "made.toml", *options)
    file = tmp_path / f"made.trial-{number}.json"
    assert (answer.code, answer.out) == (0, f"{file}\n")
    assert answer.err.startswith(said)
    assert answer.err.count("\n") == bool(said)
    config = read_config(file)
    assert (config.trial, config.sparsity.target) == (number, list(LEVELS)[number // 2])
    assert config.scored("uniform", "validation") is not None


@slow
@parametrize(
    ("options", "error"),
    [
        (["--sparsity", "0.9"], "--sparsity: 90% is outside the study's interval, 20% to 70%"),
        (["--sparsity", "x"], "--sparsity: must be a share of zeros, such as 0.6 or 60%, or an interval, "),
        (
            ["--sparsity", "0.3..0.4"],
            "--sparsity: 0.3..0.4 is an interval; give the one number that the plan is",
        ),
        (
            ["--max-perplexity", "15"],
            "study made: no trial is within perplexity 15 on the validation text; the nearest is trial 1, 20% wanda + "
            "uniform: it is exported by its number",
        ),
        (["--max-increase", "-1"], "--max-increase: must be a finite number greater than 0, got -1"),
        (["--max-perplexity", "x"], "--max-perplexity: must be a number, got x"),
        (["--max-kl", "0.1"], "study made: no trial has a finite KL divergence; its search.objective has none"),
        (["--trial", "3", "--sparsity", "0.5"], "--sparsity: names one trial, and --trial another; leave one out"),
        (
            ["--max-kl", "1", "--max-increase", "1%"],
            "--max-kl: names one trial, and --max-increase another",
        ),
        (["--trial", "99"], "study made: trial 99 is not measured in full; `status` lists all"),
    ],
)
def test_points_that_are_refused(options: list[str], error: str, tmp_path: Path, command: CommandLine) -> None:
    made_front(tmp_path)
    before = sorted(tmp_path.iterdir())
    said = command("export", "--study", tmp_path / "made.toml", *options).error
    assert said.removeprefix("Invalid value for ").startswith(error)
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "cache"] == before


@slow
@parametrize(("typed", "name"), [("\n", "made.best.json"), ("9\n1\n", "made.trial-1.json")])
def test_a_terminal_is_asked(typed: str, name: str, tmp_path: Path) -> None:
    from processes import popen
    from tinystudy import HANGS

    made_front(tmp_path)
    ours, theirs = pty.openpty()
    command = [os.sys.executable, str(TUNE), "export", "--study", str(tmp_path / "made.toml")]  # type: ignore[attr-defined]
    process = popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "200"})
    os.close(theirs)
    os.write(ours, typed.encode())
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(HANGS) == 0, said
    assert re.search(r"\| point \| method +\| trial \| sparsity \| validation perplexity \|", said.decode())
    assert ("must be a number from 1 to 4" in said.decode()) == (typed[0] == "9")
    assert [file.name for file in tmp_path.glob("*.json")] == [name]


# A uniform best is uniform


# Figures


# Reports, notes and JSON


# A real study
