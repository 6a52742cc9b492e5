import math
import os
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pytest
from expect import slow
from optuna.trial import FrozenTrial, TrialState
from test_benchmarks import benchmark
from test_samplers import fake_perplexity, search_of, space_of
from tinystudy import run, stored

from atp_tune.search import runner
from atp_tune.search.runner import GAIN, GAP, LEAST, RUN, has_gap, regret_bound, should_terminate
from atp_tune.search.samplers import make_sampler
from atp_tune.search.space import Space
from atp_tune.storage.progress import counted

GP = ("search.sampler=gp", "search.early_termination=true", "search.trials=40")
HELD, LEFT = 0.0, 1.0  # regrets: below the bound, and far above


pytestmark = pytest.mark.usefixtures("quiet_optuna")


def study_of_gp(space: Space, trials: int) -> optuna.Study:
    """Trials as a study holds them."""
    study = optuna.create_study(sampler=make_sampler(search_of(), space))
    for params in space.uniform():
        study.enqueue_trial(params)

    def objective(trial: optuna.Trial) -> float:
        plan = space.suggest(trial)
        trial.set_user_attr("plan", plan.model_dump(mode="json"))
        trial.set_user_attr("nlls", [math.log(fake_perplexity(plan)) + 0.01 * sign for sign in (-1, 1) * 8])
        return fake_perplexity(plan)

    study.optimize(objective, n_trials=trials)
    return study


def points(space: Space, values: dict[float, float], **more: Any) -> list[FrozenTrial]:
    """Measured trials of ATP, from β and perplexities, that ended a minute apart in this order."""
    kinds = space.kinds("atp")
    allocation = optuna.distributions.CategoricalDistribution(tuple(space.intervals))
    made = []
    for number, (beta, value) in enumerate(values.items()):
        params = {"pruner": space.pruners[0], "beta": beta, **more, "allocation": "atp"}
        trial = optuna.create_trial(value=value, params=params, distributions={**kinds, "allocation": allocation})
        trial.datetime_complete = datetime(2026, 1, 1) + timedelta(minutes=number)
        made.append(trial)
    return made


def study_with(trials: list[FrozenTrial]) -> optuna.Study:
    study = optuna.create_study()
    study.add_trials(trials)
    return study


@slow
def test_the_regret_shrinks_as_a_study_goes_on() -> None:
    space = space_of()
    study = study_of_gp(space, 24)
    bounds = [regret_bound(study.trials[:count], space, "atp") for count in range(1, 25)]
    assert bounds[: LEAST - 1] == [math.inf] * (LEAST - 1)
    assert all(bound > 0 for bound in bounds)
    assert bounds[-1] < GAIN
    assert should_terminate(study, space)
    lowest = min(fake_perplexity(space.plan({**study.trials[0].params, "beta": k / 1000})) for k in range(200))
    for count in range(LEAST, 25):  # it is a bound: the truth lies below
        best = min(trial.value for trial in study.trials[:count])
        assert math.log(best / lowest) <= bounds[count - 1] + 0.01


SEEDS = int(os.environ.get("ATP_TUNE_VALLEYS", "2"))  # of each shape; 8 by hand


def ends_of(seeds: int) -> list[Any]:
    known = benchmark("early_termination")
    cases = product(known.SHAPES, range(seeds))
    return [known.search(known.made_up(shape, seed, 0.02), seed) for shape, seed in cases]


def check(ends: list[Any]) -> None:
    """That no more than a tenth of the studies that settled end farther from the lowest than they say, and that it is
    not for want of such studies.
    """
    settled = [end for end in ends if end.should_terminate]
    worse = [end for end in settled if 1 / (1 + end.above) < 1 - GAIN]
    assert len(settled) >= len(ends) / 4, ends
    assert len(worse) <= len(settled) / 10, worse
    assert min(end.trials for end in settled) >= LEAST + RUN - 1


@slow
def test_made_up_valleys_are_left_at_what_is_promised() -> None:
    """Real searches of valleys, smooth and rough, in which noise of the comparison with uniform ends some too early."""
    check(ends_of(SEEDS))


def test_verdicts_are_read_from_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they ended, so that they are the same after a restart and for every worker."""
    space, left = space_of(), set[int]()
    asked: list[list[float]] = []

    def regret(trials: list[FrozenTrial], space: Space, branch: str) -> float:
        asked.append([trial.params["beta"] for trial in trials])
        return LEFT if len(trials) in left else HELD

    monkeypatch.setattr(runner, "regret_bound", regret)
    betas = [0.01 * k for k in range(12)]
    trials = points(space, {beta: 20 + beta for beta in betas})
    for begun in (trials, trials[::-1]):
        asked.clear()
        assert should_terminate(study_with(begun), space)
        assert asked == [betas, betas[:11], betas[:10]]
    for count, expected in ((9, True), (10, False), (11, False), (12, False)):
        left = {count}
        assert should_terminate(study_with(trials), space) is expected


def test_a_better_point_begins_the_verdicts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of()
    monkeypatch.setattr(runner, "regret_bound", lambda *known: HELD)
    values = {0.01 * k: 20.0 + k for k in range(12)}
    assert should_terminate(study_with(points(space, values)), space)
    for after, expected in ((0, False), (1, False), (2, True)):
        worse = {0.15 + 0.01 * k: 30.0 for k in range(after)}
        assert should_terminate(study_with(points(space, {**values, 0.13: 19.9, **worse})), space) is expected


def test_gaps() -> None:
    space = space_of()
    (kind,) = (kind for name, kind in space.kinds("atp").items() if name == "beta")
    width, kinds = kind.high - kind.low, space.kinds("atp")
    even = {kind.low + width * (k / 6): 3.0 + 0.01 * k for k in range(7)}
    assert not has_gap(points(space, even), kinds)
    betas = sorted(even)
    inner = {beta: value for beta, value in even.items() if beta != betas[1]}
    assert GAP < 2 / 6 and has_gap(points(space, inner), kinds)
    assert has_gap(points(space, {beta: value for beta, value in even.items() if beta > betas[1]}), kinds)
    hopeless = {beta: value + (1.0 if beta >= betas[3] else 0.0) for beta, value in even.items()}
    assert not has_gap(points(space, {b: v for b, v in hopeless.items() if b != betas[4]}), kinds)


@slow
def test_every_allocation_must_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(allocation=["atp", "curve"])
    study = study_of_gp(space_of(), 10)
    asked: list[str] = []
    monkeypatch.setattr(runner, "ranked", lambda trials: [])
    monkeypatch.setattr(runner, "regret_bound", lambda trials, space, branch: asked.append(branch) or HELD)
    assert should_terminate(study, space) and asked == ["atp", "curve"] * RUN
    monkeypatch.setattr(runner, "regret_bound", lambda trials, space, branch: float(branch == "curve"))
    assert not should_terminate(study, space)


@slow
def test_a_real_study_settles_and_so_does_one_that_was_interrupted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts are no memory of a process: the study that went on in a new run ends with the very same trial.

    A gain of a third is asked for, and no gap is one: what a tiny model's valley is like hangs on torch's version.
    """
    monkeypatch.setattr(runner, "GAIN", 1 / 3)
    monkeypatch.setattr(runner, "has_gap", lambda *_: False)
    study = run(place, *GP)
    assert LEAST + RUN - 1 <= counted(study) < 40
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert stored(place).user_attrs["terminated_early"] == [40, counted(study)]
    run(place, *GP, f"search.trials={counted(study) - 1}", name="again")
    again = run(place, *GP, name="again")
    assert [trial.params for trial in again.trials] == [trial.params for trial in study.trials]
    assert again.user_attrs["terminated_early"] == [40, counted(study)]
