from collections.abc import Mapping
from typing import Any

import optuna
import pytest
from expect import parametrize, refused
from optuna.distributions import CategoricalDistribution, FloatDistribution
from plans import planned, stored

from atp_tune.allocations import Budget, Shape
from atp_tune.config.study import Study
from atp_tune.plan import Plan
from atp_tune.search.space import Space, make_space

SIZES = (100,) * 5  # at sparsity 0.6 the bound of β is 0.2


def study_of(**changes: Any) -> Study:
    texts = {"calibration": {"source": "a"}, "validation": {"source": "b"}, "test": {"source": "c"}}
    base = {"sparsity": 0.6, "model": {"source": "x"}, "texts": texts, "search": {"trials": 1}}
    return Study.model_validate(base | changes)


def space_for(study: Study, sizes: tuple[int, ...], linears: int = 1) -> Space:
    shapes = tuple((Shape(1, size // linears, False),) * linears for size in sizes)
    return make_space(study, Budget(study.sparsity, sizes, shapes))


class Fixed:
    """A trial that takes what it is told, and remembers what it was asked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values, self.asked = values, dict[str, Any]()

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.asked[name] = tuple(choices)
        return self.values[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        self.asked[name] = (low, high)
        return float(self.values[name])


def test_points_of_one_allocation_in_another() -> None:
    space = space_for(study_of(allocation=["uniform", "atp", "curve", "owl"]), SIZES)
    point = {"pruner": "wanda", "allocation": "atp", "beta": 0.1}
    flat = {"gamma": 0.0, "ends": 0.0, "split": 0.0, "value": 0.0}
    assert space.within(point, "atp") == point
    assert space.within(point, "curve") == {"pruner": "wanda", "allocation": "curve", "beta": 0.1, **flat}
    assert space.within({"pruner": "wanda", "allocation": "uniform"}, "curve") == {
        "pruner": "wanda", "allocation": "curve", "beta": 0.0, **flat,
    }  # fmt: skip
    assert space.within({**point, "allocation": "curve", **flat}, "atp") is None
    assert space.within(point, "owl") is None
    assert space.within({"pruner": "wanda", "allocation": "owl", "M": 5.0, "lam": 0.1}, "curve") is None


def test_a_suggestion_is_a_plan_and_its_parameters_give_it_again() -> None:
    space = space_for(study_of(prune={"pruners": ["wanda", "sparsegpt"]}), SIZES)
    values = {"pruner": "sparsegpt", "allocation": "atp", "beta": 0.1}
    trial = Fixed(values)
    plan = space.suggest(trial)
    assert trial.asked == {
        "pruner": ("wanda", "sparsegpt"),
        "allocation": ("atp",),
        "beta": space.intervals["atp"]["beta"],
    }
    assert plan.amounts == pytest.approx((0.4, 0.5, 0.6, 0.7, 0.8))
    assert (plan.method, plan.allocation, plan.parameters) == ("sparsegpt", "atp", {"beta": 0.1})
    assert space.plan(values) == plan


@parametrize("names", [["atp"], ["uniform"], ["uniform", "atp"], ["atp", "uniform"]])
def test_every_study_starts_uniform_once_for_each_pruner(names: list[str]) -> None:
    space = space_for(study_of(allocation={"names": names}, prune={"pruners": ["wanda", "magnitude"]}), SIZES)
    plans = [space.plan(params) for params in space.uniform()]
    assert [plan.method for plan in plans] == ["wanda", "magnitude"]
    assert {plan.amounts for plan in plans} == {(0.6,) * 5}
    asked = optuna.create_study()
    for params in space.uniform():
        asked.enqueue_trial(params)
        assert space.suggest(asked.ask()).amounts == (0.6,) * 5


@parametrize(
    ("step", "values"),
    [
        (0.05, [0.05, 0.1, 0.15, 0.2]),
        (0.03, [0.03, 0.06, 0.09, 0.12, 0.15, 0.18]),
        (0.2, [0.2]),
        (0.11, [0.11]),
    ],
)
def test_the_grid_goes_to_the_bound(step: float, values: list[float]) -> None:
    space = space_for(study_of(), SIZES)
    grid = space.grid(step)
    assert grid == [{"pruner": "wanda", "allocation": "atp", "beta": beta} for beta in values]
    assert all(space.plan(params) for params in grid)


def test_a_bound_that_floats_miss_is_on_the_grid() -> None:
    """(1 - 0.9) / 2 is a little less than 0.05."""
    space = space_for(study_of(sparsity=0.9), SIZES)
    assert space.intervals["atp"]["beta"][1] < 0.05
    assert [params["beta"] for params in space.grid(0.01)] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert space.plan({"pruner": "wanda", "allocation": "atp", "beta": 0.05}).amounts[-1] == 1.0


def trial_of(**stored: Any) -> optuna.trial.FrozenTrial:
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE,
        value=1.0,
        params={"pruner": "wanda", "allocation": "atp", "beta": 0.01},
        distributions={
            "pruner": CategoricalDistribution(["wanda"]),
            "allocation": CategoricalDistribution(["atp"]),
            "beta": FloatDistribution(0, 1),
        },
        user_attrs=stored,
    )


def test_a_measured_trial_keeps_its_plan() -> None:
    """Whatever its parameters give now."""
    space = space_for(study_of(), SIZES)
    plan = space.plan(trial_of().params)
    assert space.stored_plan(trial_of(plan=plan.model_dump(mode="json"))) == plan
    other = [0.5, 0.7, 0.6, 0.6, 0.6]
    assert space.stored_plan(trial_of(**stored(other))).amounts == tuple(other)
    space = space_for(study_of(), SIZES, linears=2)
    rows = [[s - 0.1, s + 0.1] for s in other]
    assert space.stored_plan(trial_of(**stored(other, rows))) == planned("wanda", "atp", other, linears=rows)


@parametrize(
    ("plan", "said"),
    [
        (planned("wanda", "atp", [0.6] * 4), "levels: 4 for a model of 5 blocks"),
        (
            planned("wanda", "atp", [0.6] * 5, linears=[[0.6]] * 5),
            "levels: not one for each of the 2 linears of block 0",
        ),
        (planned("wanda", "atp", [0.6] * 5, linears=[[0.6, 0.7]] * 5), "levels: block 0 has 0.6, by its linears 0.65"),
        (planned("wanda", "atp", [0.6] * 5, bits=[4] * 5), "levels: are not of what is done to weights here"),
        (planned("rtn", "atp", [None] * 5, bits=[4] * 5), "levels: are not of what is done to weights here"),
    ],
    ids=["fewer blocks", "fewer linears", "another mean", "bits too", "bits alone"],
)
def test_a_trial_of_another_model_is_refused(plan: Plan, said: str) -> None:
    with refused(f"^trial -1: plan: {said}"):
        space_for(study_of(), SIZES, linears=2).stored_plan(trial_of(plan=plan.model_dump(mode="json")))
