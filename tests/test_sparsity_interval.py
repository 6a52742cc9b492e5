"""A space in which the sparsity is a parameter: shares of bounds, levels, and the model of the screened trials."""

import math
import random
from typing import Any

import optuna
import pytest
from expect import parametrize, slow
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from test_space import SIZES, study_of

from atp_tune.allocations import Budget
from atp_tune.allocations.formulas import atp, curve
from atp_tune.plan import Plan, target_in
from atp_tune.search.goals import OverInterval, Screened, Surrogate
from atp_tune.search.samplers import make_sampler
from atp_tune.search.space import Space, SpaceOverInterval, make_space

INTERVAL = (0.2, 0.7)
TPE = {"sampler": "tpe", "trials": 24}
DENSE = [2.7, 2.9]  # NLLs of the dense model: the loss at sparsity 0 is 2.8

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def space_over(**changes: Any) -> Space:
    study = study_of(sparsity=INTERVAL, **{"search": TPE, **changes})
    return make_space(study, Budget(study.highest, SIZES))


class Fixed:
    """A trial that takes what it is told."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self.values[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        assert low <= self.values[name] <= high
        assert (name == "sparsity") == (step == 0.005)
        return float(self.values[name])


@parametrize("sparsity", [0.2, 0.345, 0.7])
@parametrize("share", [-1.0, -0.4, 0.0, 0.3, 1.0])
def test_a_share_is_of_the_bound_at_its_sparsity(sparsity: float, share: float) -> None:
    space = space_over(allocation={"beta": "both"})
    plan = space.suggest(Fixed(pruner="wanda", allocation="atp", sparsity=sparsity, beta=share))
    budget = Budget(sparsity, SIZES)
    beta = share * atp.bounds(budget)["beta"][1]
    assert plan.parameters == {"beta": pytest.approx(beta)}
    assert plan.amounts == pytest.approx(atp.sparsities(budget, beta))
    assert (plan.target, plan.is_uniform) == (sparsity, share == 0)
    assert str(plan).startswith(f"{100 * sparsity:g}% wanda ")


def test_an_interval_of_bits_is_one_of_targets_that_are_negative() -> None:
    study = study_of(sparsity=None, bits=(3.0, 6.0), search=TPE, quantize={"quantizers": ["rtn"]})
    space = make_space(study, Budget(study.highest, SIZES, widths=study.quantize.widths))
    assert isinstance(space, SpaceOverInterval)
    assert (study.interval, study.path) == ((-6.0, -3.0), ())
    kinds = space.kinds("atp")
    assert kinds["bits"] == FloatDistribution(3.0, 6.0, step=0.05) and "sparsity" not in kinds
    assert space.levels(3) == [-6.0, -4.5, -3.0]
    levels = space.levels(1000)
    assert len(levels) == 61
    for level in levels:
        [uniform] = space.uniform(level)
        assert target_in(uniform) == level and uniform == space.at(uniform, level)
        for share in (-1.0, 0.3, 1.0):
            plan = space.plan({**uniform, "allocation": "atp", "beta": share})
            assert plan.target == level and str(plan).startswith(f"{-level:g} bits rtn ")
            assert -1.01 / len(SIZES) < plan.mean_bits(SIZES) + level <= 1e-9  # a block of five has a bit more, or not
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


def test_every_parameter_of_curve_reaches_its_bounds() -> None:
    space = space_over(allocation={"names": ["curve"], "beta": "both"})
    low = {name: ends[0] for name, ends in space.intervals["curve"].items()}
    found = space.plan({"pruner": "wanda", "allocation": "curve", "sparsity": 0.3, **low}).parameters
    assert found == pytest.approx({name: ends[0] for name, ends in curve.bounds(Budget(0.3, SIZES)).items()})


def loss(sparsity: float, share: float) -> float:
    """ln perplexity like SmolLM2's: the best share grows from 0 at 30 % to 0.6 at 70 %."""
    best = max(0.0, 1.5 * (sparsity - 0.3))
    return 2.81 + 8 * max(0.0, sparsity - 0.2) ** 2 + 3 * sparsity**2 * (share - best) ** 2


def screened(space: Space, trials: int = 24, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    search = study_of(sparsity=INTERVAL, search={**TPE, "seed": seed}).search
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=make_sampler(search, space))
    for point in OverInterval(search, space).starts():
        study.enqueue_trial(point)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        plan = space.suggest(trial)
        assert plan.target is not None
        return math.exp(loss(plan.target, trial.params["beta"])), 1 - plan.target

    study.optimize(objective, n_trials=trials)
    return study.trials


@slow
@parametrize("seed", range(3))
def test_the_model_finds_the_best_share_at_every_sparsity(seed: int) -> None:
    space = space_over()
    surrogate = Surrogate(space, screened(space, seed=seed), seed, DENSE)
    regrets = []
    for level in space.levels(11):
        found = surrogate.best_at(level)
        assert found.params["sparsity"] == level
        assert found.increase == pytest.approx(loss(level, found.params["beta"]) - 2.8, abs=0.1)
        regrets.append(loss(level, found.params["beta"]) - min(loss(level, share / 100) for share in range(101)))
    assert sum(regrets) / len(regrets) < 0.01
    assert regrets[0] < 0.005  # uniform is the best there, and nothing better is made up


@slow
@parametrize("seed", range(2))
def test_where_pruning_hurts_no_more_no_point_is_worse_than_a_screened_neighbour(seed: int) -> None:
    """Increases below the smallest count alike, so that the process is flat there: any point was taken."""
    space, draw = space_over(), random.Random(seed)
    best, reach, dip = draw.random(), draw.uniform(0.4, 0.75), draw.uniform(0.01, 0.1)

    def flat(sparsity: float, share: float) -> float:
        return 2.8 - dip * (1 - abs(share - best)) + 5 * max(0.0, sparsity - reach)

    points = [
        {**space.uniform()[0], "allocation": "atp", "beta": draw.random(), "sparsity": draw.choice(space.levels(101))}
        for _ in range(24)
    ]
    kinds = {"allocation": CategoricalDistribution(("atp",)), **space.kinds("atp")}
    trials = [
        create_trial(
            values=[math.exp(flat(point["sparsity"], point["beta"])), 1 - point["sparsity"]],
            params={name: point[name] for name in kinds},
            distributions=kinds,
        )
        for point in points
    ]
    surrogate, checked = Surrogate(space, trials, seed, DENSE), 0
    for level in space.levels(9):
        near = sorted(points, key=lambda point: abs(point["sparsity"] - level))[:3]
        if max(level, *(point["sparsity"] for point in near)) < reach:
            checked += 1
            found = surrogate.best_at(level).params
            assert found["sparsity"] == level
            assert flat(level, found["beta"]) <= min(flat(level, point["beta"]) for point in near)
    assert checked


@parametrize("trials", [5, 11])
def test_a_neighbour_that_loses_nothing_says_nothing_of_a_higher_sparsity(trials: int) -> None:
    """Of few points the nearest are far: the increase of the sparsest model was said to be that of the densest."""
    space, kinds = space_over(), {"allocation": CategoricalDistribution(("atp",)), **space_over().kinds("atp")}
    points = [
        {**space.uniform()[0], "allocation": "atp", "beta": 0.37 * at % 1, "sparsity": sparsity}
        for at, sparsity in enumerate(space.levels(trials))
    ]

    def rise(sparsity: float) -> float:
        return 0.001 + 8 * max(0.0, sparsity - 0.3) ** 2

    done = [
        create_trial(
            values=[math.exp(2.8 + rise(point["sparsity"])), 1 - point["sparsity"]],
            params={name: point[name] for name in kinds},
            distributions=kinds,
        )
        for point in points
    ]
    surrogate = Surrogate(space, done, 0, DENSE)
    found = [surrogate.best_at(level).increase for level in space.levels(6)]
    assert found == pytest.approx([rise(level) for level in space.levels(6)], abs=0.2)
    assert found[0] == pytest.approx(0.001)


@slow
def test_the_front_is_confirmed_beside_uniform_at_the_same_sparsities() -> None:
    space = space_over(prune={"pruners": ["wanda", "magnitude"]})
    search = study_of(sparsity=INTERVAL, search={"sampler": "tpe", "screen": {"trials": 24, "confirm": 4}}).search
    points = OverInterval(search, space).begin(optuna.create_study(), Screened(screened(space), DENSE), 99)
    assert sorted({point["sparsity"] for point in points}) == space.levels(4)
    assert {point["pruner"] for point in points} <= {"wanda", "magnitude"}
    for one in points:
        assert {**one, "beta": 0.0} in points
    assert 4 < len(points) <= 8
