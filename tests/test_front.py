"""Studies over an interval of sparsities: their points, and what the screen, `export`, figures and reports say."""

import math
import os
import pty
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from synthetic import VERSIONS, storage_in
from tinystudy import TUNE, CommandLine, quiet, run, study_file

from atp_tune import figures
from atp_tune.config.best import read_config
from atp_tune.config.studyfile import load, settings
from atp_tune.dashboard.publishing import study_note
from atp_tune.errors import UserError
from atp_tune.measures import KL, change, relative
from atp_tune.report import html, latex, machine, markdown
from atp_tune.report.contents import gather
from atp_tune.results.goals import best_trial, excess_of, goal_in
from atp_tune.results.status import status_of
from atp_tune.results.stored import best_config
from atp_tune.results.summary import summarise, unreported

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


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


def nlls_at(level: float, seed: str) -> list[float]:
    """Windows that are hard are so for all plans."""
    text, own = random.Random(0), random.Random(seed)
    return [math.log(level) + text.gauss(0, 0.2) + own.gauss(0, 0.01) for _ in range(WINDOWS)]


def trial_at(sparsity: float, share: float, level: float, kl: bool = False, **more: Any) -> FrozenTrial:
    nlls, beta = nlls_at(level, f"{sparsity} {share}"), 0.1 * share
    kls = [abs(nll - math.log(DENSE)) for nll in nlls]
    value = sum(kls) / WINDOWS if kl else math.exp(sum(nlls) / WINDOWS)
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
        **({"kls": kls} if kl else {}),
    }
    params = {"pruner": "wanda", "allocation": "atp", "sparsity": sparsity, "beta": share}
    return create_trial(
        values=[value, round(1 - sparsity, 6)], params=params, distributions=DISTRIBUTIONS, user_attrs={**known, **more}
    )


def made_front(
    place: Path | None = None,
    limit: dict[str, float] | None = None,
    kl: bool = False,
    levels: Mapping[float, Sequence[float]] = LEVELS,
) -> optuna.Study:
    """Trials 0, 2, … of ATP and 1, 3, … of uniform at four sparsities; in a database beside a study file, or memory."""
    study = optuna.create_study(
        study_name="made",
        directions=["minimize", "minimize"],
        storage=None if place is None else storage_in(place / "made.db"),
    )
    overrides = [f"limit.{key}={value}" for key, value in (limit or {}).items()]
    overrides += ["search.trials=12"] * bool(limit) + ['search.objective="kl"'] * kl
    path = STUDIES / "smol-front.toml"
    if place is not None:
        path = Path(shutil.copy(path, place / "made.toml"))
    facts = {"model.content": "ab" * 32, "model.dtype": "float32", "sparsity": [0.2, 0.7]}
    study.set_user_attr("fingerprint", {**facts, **({"search.objective": ["kl"]} if kl else {})})
    study.set_user_attr("sizes", [1000] * BLOCKS)
    study.set_user_attr("total", 8)
    study.set_user_attr("made_from", settings(load(str(path), overrides)))
    study.set_user_attr("dense", nlls_at(DENSE, "dense"))
    if limit:
        study.set_user_attr("limit", limit)
    for sparsity, pair in levels.items():
        study.add_trials([trial_at(sparsity, 0.5 * (not k), level, kl) for k, level in enumerate(pair)])
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


# The points


def test_the_front_beside_dense_and_uniform() -> None:
    study = with_test_text(made_front(), 1, 2, 3, 4)
    points = goal_in(study).points()
    assert [point.trial.number for point in points] == [1, 2, 4, 6]  # at 20 % uniform is better
    assert [point.sparsity for point in points] == list(LEVELS)
    results = summarise(study).results
    beside = [results.uniform(point.trial) for point in points]
    assert [uniform and uniform.number for uniform in beside] == [1, 3, 5, 7]
    assert [point.is_best for point in points] == [False, False, True, False]  # the knee
    assert [point.excess for point in points] == [None] * 4
    first, second, third, _ = points
    tests, trials = study.user_attrs["test_nlls"], study.trials
    assert results.against_uniform(first.trial) is None
    against, dense = results.against_uniform(second.trial), results.change("dense", second.trial)
    assert against is not None and dense is not None
    assert (against.on, against.change) == ("test", change(tests["3"], tests["2"]))
    searched = results.change(trials[3], trials[2], on="validation")
    assert searched is not None
    assert searched.change == change(trials[3].user_attrs["nlls"], trials[2].user_attrs["nlls"])
    assert dense.change == change(tests["dense"], tests["2"])
    found = results.against_uniform(third.trial), results.change("dense", third.trial)
    assert [one and one.on for one in found] == ["validation", "test"]  # uniform is not on the test text


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


def test_points_of_a_study_of_kl() -> None:
    study = made_front(kl=True)
    third = next(point for point in goal_in(study).points() if point.sparsity == 0.5)
    kls = [study.trials[number].user_attrs["kls"] for number in (5, 4)]
    results = summarise(study).results
    against = results.against_uniform(third.trial, KL)
    assert against is not None and against.change == relative(*kls)
    assert results.change("dense", third.trial, KL) is None
    assert results.main is KL


def test_other_studies_have_no_points(done: Path) -> None:
    from test_summary import stored

    study = stored(done)
    assert goal_in(study).points() == []
    with pytest.raises(UserError, match=r"^study tiny: measures plans only at 0.5; choose one of its trials"):
        goal_in(study).nearest("0.5")
    with pytest.raises(UserError, match=r"^study tiny: measures plans only at 0.5; "):
        goal_in(study).sparsest({"max_increase": 0.1})


def test_a_uniform_point_of_the_front_gets_its_final_numbers() -> None:
    study = made_front()
    study.add_trial(trial_at(0.4, 0.5, 25.0))
    study.add_trial(trial_at(0.4, 0.0, 24.0))
    assert unreported(study) == ["dense", "5", "4", "1", "3", "2", "9", "7", "6"]  # the best first


def test_a_limit_makes_every_plan_a_point() -> None:
    study = made_front(limit={"max_increase": 0.35})
    points = goal_in(study).points()
    assert [point.trial.number for point in points] == [1, 0, 3, 2, 5, 4, 7, 6]
    assert [point.trial.number for point in points if point.is_best] == [4]
    assert [point.trial.number for point in points if (point.excess or 0) <= 0] == [1, 0, 3, 2, 4]


@pytest.mark.parametrize(("wanted", "number"), [(0.5, 4), (0.45, 4), (0.4, 2), (0.25, 1), (0.7, 6), (0.2, 1)])
def test_the_nearest_of_the_front(wanted: float, number: int) -> None:
    assert goal_in(made_front()).nearest(str(wanted)).trial.number == number  # of two as near the lower one


@pytest.mark.parametrize(
    ("limit", "number"), [({"max_increase": 0.1}, 2), ({"max_perplexity": 31.0}, 4), ({"max_increase": 0.001}, 1)]
)
def test_the_sparsest_within_a_limit_by_hand(limit: dict[str, float], number: int) -> None:
    study = made_front()
    inside = [t for t in study.trials if excess_of(study, t, limit) <= 0]
    if not inside:
        with pytest.raises(UserError, match=f"the nearest is trial {number}, "):
            goal_in(study).sparsest(limit)
        return
    highest, found = max(t.params["sparsity"] for t in inside), goal_in(study).sparsest(limit).trial
    assert (found.number, found.params["sparsity"]) == (number, highest)
    assert found.values[0] == min(t.values[0] for t in inside if t.params["sparsity"] == highest)


# Words


def test_the_outcome_of_a_front() -> None:
    said = outcome(made_front())
    assert said.startswith("Pareto front: 4 points, from 20% (perplexity 19.79) to 70% (perplexity ")
    gained, left = "3 of them beat uniform at the same sparsity by more than chance", "4 of 8 sparsities are measured"
    best = "best: trial 4, 50% wanda + atp (β = 0.05000), the knee: it lies furthest below the line from the front’s"
    assert said.endswith(f"; {gained}; {left}, --trials 16 measures all; {best} first point to its last")


@pytest.mark.parametrize(
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
    shown = status_of(summarise(study), NOW).best
    assert shown is not None and shown.trial == number  # in the progress line too


def test_the_outcome_of_a_limit() -> None:
    study = made_front(limit={"max_increase": 0.35})
    best = study.trials[4]
    found = change(study.user_attrs["dense"], best.user_attrs["nlls"])
    limit = "within the limit of 35% more perplexity than dense"
    said = f"best: trial 4, 50% wanda + atp (β = 0.05000): {found} on the validation text, {limit}"
    assert outcome(study) == said
    with_test_text(study, 4, 5)
    tests = study.user_attrs["test_nlls"]
    assert outcome(study) == f"{said}; on the test text {change(tests['dense'], tests['4'])}"


def test_a_limit_that_nothing_meets() -> None:
    said = outcome(made_front(limit={"max_perplexity": 15.0}))
    assert said.startswith(
        "no trial is within the limit of perplexity 15: the nearest is trial 1, 20% wanda + uniform: 19.79 ±"
    )
    further = "the search ends at {}, unless --sparsity takes it further"
    assert said.endswith(f"; {further.format('20%')}")
    assert outcome(made_front(limit={"max_increase": 9.0})).endswith(f"; {further.format('70%')}")
    nearest_one = "the nearest is trial 1, 20% wanda + uniform: "
    said = outcome(made_front(limit={"max_kl": 0.001}, kl=True))
    assert said.startswith(f"no trial is within the limit of KL 0.001: {nearest_one}0.")


# The screen


@pytest.mark.slow
def test_the_commands_that_come_next(tmp_path: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_test_text(made_front(tmp_path), *range(8))
    toml = tmp_path / "made.toml"
    assert "tune.py chat" not in command("status", "--study", toml).out  # no configuration is written yet
    assert command("export", "--study", toml).code == 0
    monkeypatch.chdir(tmp_path)
    assert command("status", "--study", toml).out.splitlines()[-4:] == [
        "best configuration: made.best.json",
        "talk with it:       python tune.py chat --study made.toml",
        "sparse checkpoint:  python tune.py apply --config made.best.json --out made-sparse",
        "another point:      python tune.py export --study made.toml --sparsity 0.5",
    ]


def test_the_commands_after_a_study_at_one_sparsity(done: Path, command: CommandLine) -> None:
    said = command("status", "--study", done / "tiny.toml").out.splitlines()
    assert said[-3] == f"talk with it:       python tune.py chat --study {done / 'tiny.toml'}"
    assert said[-1] == f"page with figures:  python tune.py report --study {done / 'tiny.toml'}"


def test_the_progress_line_names_the_sparsity(tmp_path: Path, command: CommandLine) -> None:
    from atp_tune.cli.tables import progress_line

    status = status_of(summarise(made_front(limit={"max_increase": 0.35})), NOW)
    assert progress_line(status).startswith("[8/8] best 25.")
    assert " at 50% (trial 4)" in progress_line(status)


# Export


@pytest.mark.slow
@pytest.mark.parametrize(
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


@pytest.mark.slow
def test_without_a_terminal_the_default_is_exported(tmp_path: Path, command: CommandLine) -> None:
    made_front(tmp_path)
    assert command("export", "--study", tmp_path / "made.toml").out == f"{tmp_path / 'made.best.json'}\n"
    assert read_config(tmp_path / "made.best.json").trial == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--sparsity", "0.9"], "--sparsity: 0.9 is outside the study's interval, 20% to 70%"),
        (["--sparsity", "x"], "--sparsity: must be a share of zeros, such as 0.6 or 60%, or an interval, "),
        (
            ["--sparsity", "0.3..0.4"],
            "--sparsity: 0.3..0.4 is an interval; give the one sparsity that the plan is",
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


def test_a_study_at_one_sparsity_has_no_point_to_choose(done: Path, command: CommandLine) -> None:
    for options in (["--sparsity", "0.5"], ["--max-increase", "10%"]):
        answer = command("export", "--study", done / "tiny.toml", *options)
        assert answer.error == "study tiny: measures plans only at 0.5; choose one of its trials with --trial N"
    config = command("export", "--config", done / "tiny.best.json", "--sparsity", "0.5")
    assert config.error.startswith("Invalid value for --sparsity: only with --study")


@pytest.mark.slow
@pytest.mark.parametrize(("typed", "name"), [("\n", "made.best.json"), ("9\n1\n", "made.trial-1.json")])
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


@pytest.mark.slow
def test_a_uniform_best_is_called_so(tmp_path: Path) -> None:
    levels = {0.2: (21.0, 20.5), 0.5: (30.0, 26.0), 0.7: (60.0, 90.0)}
    study = with_test_text(made_front(tmp_path, levels=levels), *range(6))
    config = best_config(load(str(tmp_path / "made.toml"), []), study, tmp_path / "best.json")
    assert (config.plan.allocation, config.plan.parameters) == ("uniform", {})
    assert config.sparsity.target == 0.5
    from atp_tune.folders.card import model_card

    card = str(model_card(config, tmp_path))
    assert "β" not in card
    assert "**this model** (wanda, uniform)" in card


# Figures


def test_figures_of_a_front() -> None:
    summary = summarise(made_front())
    drawn = figures.draw(summary)
    assert list(drawn) == ["points", "sparsity", "error", "seconds"]
    assert "How the search went" not in html.make([gather(made_front(), NOW)]).decode()
    uniform, front, ring = drawn["points"].data
    assert [uniform.name, front.name, ring.name] == ["uniform", "best at each sparsity", "best (trial 4)"]
    assert list(uniform.x) == list(front.x) == [20, 30, 50, 70]
    assert list(front.y) == pytest.approx([summary.trials[n].values[0] for n in (1, 2, 4, 6)], rel=1e-4)
    assert all(error > 0 for error in front.error_y.array)
    assert [shape.name for shape in drawn["points"].layout.shapes] == [
        f"dense {summary.results.score('dense', 'validation').value:.2f}"
    ]
    assert drawn["points"].layout.yaxis.type == "log"
    names = ["20% (trial 1)", "30% (trial 2)", "50% (trial 4)", "70% (trial 6)"]
    assert [trace.name for trace in drawn["sparsity"].data] == [trace.name for trace in drawn["error"].data] == names


@pytest.mark.parametrize(
    ("limit", "kl", "name", "value"),
    [
        ({"max_increase": 0.35}, False, "limit 26.00", 1.35),
        ({"max_perplexity": 31.0}, False, "limit 31.00", None),
        ({"max_kl": 0.4}, True, "limit 0.4000", None),
    ],
)
def test_figures_of_a_limit(limit: dict[str, float], kl: bool, name: str, value: float | None) -> None:
    summary = summarise(made_front(limit=limit, kl=kl))
    drawn = figures.draw(summary)
    assert [trace.name for trace in drawn["points"].data][:2] == ["uniform", "searched"]
    line = drawn["points"].layout.shapes[-1]
    assert line.name.startswith(name)
    assert line.y0 == (
        value * summary.results.score("dense", "validation").value if value else next(iter(limit.values()))
    )
    assert ("KL" in drawn["points"].layout.yaxis.title.text) == kl
    assert {trace.name.split(" (")[0] for trace in drawn["sparsity"].data} <= {"best", "uniform"}


def test_no_figure_of_points_for_other_studies(done: Path) -> None:
    from test_summary import stored

    assert "points" not in figures.draw(summarise(stored(done)))


# Reports, notes and JSON


def optuna_empty() -> optuna.Study:
    """A study over an interval that has just begun."""
    study = optuna.create_study(study_name="new", directions=["minimize", "minimize"])
    study.set_user_attr("fingerprint", {"sparsity": [0.2, 0.7]})
    return study


def test_a_study_that_has_just_begun() -> None:
    contents = gather(optuna_empty(), NOW)
    assert contents.summary.points == []
    for make in (markdown.make, html.make, latex.make, machine.make):
        assert make([contents])
    assert figures.draw(contents.summary) == {}
    assert study_note(contents.summary, "sqlite:///x.db")
    assert contents.verdict == "No trial has been measured yet."


# A real study


@pytest.mark.slow
def test_a_real_front(place: Path, command: CommandLine) -> None:
    keys = ("sparsity=[0.3,0.8]", "search.sampler=tpe", "search.screen.trials=6", "search.screen.confirm=3")
    study = run(place, *keys, "search.screen.stride=3", "search.trials=6", "texts.calibration.draws=2")
    summary, file = summarise(study), study_file(place)
    assert summary.complete
    assert [point.sparsity for point in summary.points] == sorted(point.sparsity for point in summary.points)
    assert all(summary.results.score(point.trial, "test") for point in summary.points)
    changes = [summary.results.against_uniform(point.trial) for point in summary.points]
    assert all(found is None or found.on == "test" for found in changes)
    assert summary.best_trial is not None
    assert set(summary.over_draws) >= {summary.best_trial.number}
    said = command("status", "--study", place / "tiny.toml").out
    assert "tiny: 30% to 80% sparsity" in said
    assert "the best over 2 draws of the calibration text: " in said
    assert said.count("python tune.py ") == 3
    answer = command("export", "--study", place / "tiny.toml", "--sparsity", "0.8")
    config = read_config(Path(answer.out.strip()))
    assert config.sparsity.target == 0.8
    assert abs(config.sparsity.realised - 0.8) < 0.03  # rows of 32 weights
    assert file.best_of("tiny").exists()
