from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from plans import planned, stored

from atp_tune.allocations import Budget, Shape
from atp_tune.allocations.channels import BlockChannels, ChannelSet
from atp_tune.config.study import Study
from atp_tune.errors import UserError
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


def test_auto_is_from_uniform_to_the_bound() -> None:
    assert space_for(study_of(), SIZES).intervals == {"atp": {"beta": (0.0, pytest.approx(0.2))}}


@pytest.mark.parametrize("beta", [(0.0, 0.1), (-0.2, 0.2), (-0.1, 0.0), (0.0, 0.0)])
def test_an_interval_inside_the_bound_is_taken(beta: tuple[float, float]) -> None:
    space = space_for(study_of(allocation={"beta": beta}, sparsity=0.5), SIZES)
    assert space.intervals == {"atp": {"beta": beta}}


def test_both_signs_are_the_whole_admissible_interval() -> None:
    space = space_for(study_of(allocation={"beta": "both"}), SIZES)
    assert space.intervals == {"atp": {"beta": (pytest.approx(-0.2), pytest.approx(0.2))}}
    assert space.plan({"pruner": "wanda", "allocation": "atp", "beta": -0.1}).amounts[0] == pytest.approx(0.8)


@pytest.mark.parametrize("short", ["curve", ["atp", "curve"]])
def test_names_are_short_for_the_table(short: Any) -> None:
    names = (short,) if isinstance(short, str) else tuple(short)
    assert study_of(allocation=short).allocation.names == names
    assert tuple(space_for(study_of(allocation=short), SIZES).intervals) == names


def test_uniform_is_in_every_space() -> None:
    space = space_for(study_of(allocation=["er"]), SIZES)
    assert tuple(space.intervals) == ("uniform", "er")
    assert space.uniform() == [{"pruner": "wanda", "allocation": "uniform"}]
    assert not any(map(space.is_open, space.intervals))


def test_where_each_allocation_begins() -> None:
    names = ["uniform", "atp", "curve", "owl", "alphapruning", "er", "global"]
    space = space_for(study_of(allocation=names, prune={"pruners": ["wanda", "magnitude"]}), SIZES)
    starts = space.starts()
    assert [(s["allocation"], s["pruner"]) for s in starts] == [
        (name, pruner)
        for name in ("atp", "curve", "owl", "alphapruning", "er", "global")
        for pruner in ("wanda", "magnitude")
    ]
    assert starts[0]["beta"] == pytest.approx(0.1)  # half the bound
    assert starts[2]["ends"] == pytest.approx(-0.2)
    assert (starts[4]["M"], starts[4]["lam"]) == (5.0, 0.08)
    assert starts[6]["epsilon"] == 0.3
    alone = space_for(study_of(allocation=["curve"]), SIZES).starts()
    assert [start["ends"] for start in alone] == [0.0, pytest.approx(-0.2)]  # ATP's middle first


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


def test_a_grid_is_of_beta_alone() -> None:
    with pytest.raises(UserError, match="a grid has steps of β alone, curve has more"):
        space_for(study_of(allocation=["atp", "curve"]), SIZES).grid(0.1)
    points = space_for(study_of(allocation=["uniform", "atp", "er"]), SIZES).grid(0.1)
    assert [(p["allocation"], p.get("beta")) for p in points] == [("atp", 0.1), ("atp", 0.2), ("er", None)]


@pytest.mark.parametrize("beta", [(0.0, 0.2001), (-0.2001, 0.1), (-1.0, 1.0)])
def test_an_interval_outside_the_bound(beta: tuple[float, float]) -> None:
    with pytest.raises(UserError) as error:
        space_for(study_of(allocation={"beta": beta}), SIZES)
    text = str(error.value)
    assert text.startswith(f"allocation.beta: [{beta[0]:g}, {beta[1]:g}] leaves the admissible interval [-0.2, 0.2]")
    assert 'of 5 blocks at sparsity 0.6; narrow it, or write beta = "auto"' in text
    assert len(text.splitlines()) == 1


def test_bounds_of_blocks_that_differ() -> None:
    space = space_for(study_of(), (100, 100, 400))
    assert space.intervals["atp"]["beta"][1] == pytest.approx(min(0.6 / 1.5, 0.4 / 0.5))


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


def test_uniform_has_no_parameters() -> None:
    space = space_for(study_of(allocation={"names": ["uniform", "atp"]}), SIZES)
    trial = Fixed({"pruner": "wanda", "allocation": "uniform"})
    assert space.suggest(trial).amounts == (0.6,) * 5
    assert trial.asked == {"pruner": ("wanda",), "allocation": ("uniform", "atp")}
    assert space.plan({"pruner": "wanda", "allocation": "uniform", "beta": 0.1}).parameters == {}


@pytest.mark.parametrize("names", [["atp"], ["uniform"], ["uniform", "atp"], ["atp", "uniform"]])
def test_every_study_starts_uniform_once_for_each_pruner(names: list[str]) -> None:
    study = study_of(allocation={"names": names}, prune={"pruners": ["wanda", "magnitude"]})
    space = space_for(study, SIZES)
    plans = [space.plan(params) for params in space.uniform()]
    assert [plan.method for plan in plans] == ["wanda", "magnitude"]
    assert {plan.amounts for plan in plans} == {(0.6,) * 5}
    asked = optuna.create_study()
    for params in space.uniform():
        asked.enqueue_trial(params)
        assert space.suggest(asked.ask()).amounts == (0.6,) * 5


@pytest.mark.parametrize(
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


def test_a_grid_of_both_signs() -> None:
    texts = {"calibration": {"source": "a"}, "validation": {"source": "b"}, "test": {"source": "c"}}
    of_bits = Study.model_validate(
        {"bits": 3.5, "model": {"source": "x"}, "texts": texts, "search": {"trials": 1}, "quantize": {"widths": [3, 4]}}
    )
    budget = Budget(0.5, SIZES, ((Shape(1, 100, False),),) * 5, widths=(3, 4))
    space = make_space(of_bits, budget)
    assert space.both_signs
    found = [params["beta"] for params in space.grid(0.1)]
    assert found == [0.1, 0.2, -0.1, -0.2]
    assert all(space.plan(params) for params in space.grid(0.1))
    one = replace(space, both_signs=False)
    assert [params["beta"] for params in one.grid(0.1)] == [0.1, 0.2]


def test_a_bound_that_floats_miss_is_on_the_grid() -> None:
    """(1 - 0.9) / 2 is a little less than 0.05."""
    space = space_for(study_of(sparsity=0.9), SIZES)
    assert space.intervals["atp"]["beta"][1] < 0.05
    assert [params["beta"] for params in space.grid(0.01)] == [0.01, 0.02, 0.03, 0.04, 0.05]
    assert space.plan({"pruner": "wanda", "allocation": "atp", "beta": 0.05}).amounts[-1] == 1.0


def test_the_paper_s_grid_of_an_80_block_model() -> None:
    space = space_for(study_of(sparsity=0.7), (64,) * 80)
    assert [params["beta"] for params in space.grid(0.002)] == [0.002, 0.004, 0.006]


def test_a_step_beyond_the_bound() -> None:
    with pytest.raises(UserError, match=r"^search.step: 0.21 is larger than the bound of beta, 0.2$"):
        space_for(study_of(), SIZES).grid(0.21)


def test_one_block() -> None:
    space = space_for(study_of(), (100,))
    assert space.intervals == {"atp": {"beta": (0.0, 0.0)}}
    assert [space.plan(params).amounts for params in space.uniform()] == [(0.6,)]
    assert space.suggest(optuna.create_study().ask()).amounts == (0.6,)


def test_a_space_can_be_made_without_a_study() -> None:
    space = Space(Budget(0.5, (1, 1)), ("wanda",), {"uniform": {}})
    assert space.grid(0.1) == []


def test_a_space_holds_the_pattern_of_its_study() -> None:
    space = space_for(study_of(prune={"pattern": "mixed:4"}), SIZES)
    values = {"pruner": "wanda", "allocation": "atp", "beta": 0.1}
    assert space.plan(values).amounts == space.suggest(Fixed(values)).amounts == (0.5, 0.5, 0.5, 0.75, 0.75)


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
    assert space.plan_of(trial_of(plan=plan.model_dump(mode="json"))) == plan
    other = [0.5, 0.7, 0.6, 0.6, 0.6]
    assert space.plan_of(trial_of(**stored(other))).amounts == tuple(other)
    space = space_for(study_of(), SIZES, linears=2)
    rows = [[s - 0.1, s + 0.1] for s in other]
    assert space.plan_of(trial_of(**stored(other, rows))) == planned("wanda", "atp", other, linears=rows)


def test_a_trial_without_a_plan_is_of_an_older_version() -> None:
    with pytest.raises(UserError, match=r"^trial -1: plan: has none that this version reads; start another study with"):
        space_for(study_of(), SIZES).plan_of(trial_of())


@pytest.mark.parametrize(
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
    with pytest.raises(UserError, match=f"^trial -1: plan: {said}"):
        space_for(study_of(), SIZES, linears=2).plan_of(trial_of(plan=plan.model_dump(mode="json")))


def test_a_measured_trial_of_channels_keeps_its_plan() -> None:
    linears = (("up", 40), ("down", 40), ("o", 20))
    block = BlockChannels(ChannelSet(10, (("up", 1),), "down", 1, 8), None, linears)
    study = study_of(prune={"pattern": "channels"}, sparsity=0.3)
    space = make_space(study, Budget(0.3, SIZES, channels=(block,) * 5))
    plan = space.plan(trial_of().params)
    assert space.plan_of(trial_of(plan=plan.model_dump(mode="json"))) == plan
    rows = [[level.sparsity for level in block.linears] for block in plan.levels]
    for wrong, said in (
        (None, "block 0: needs the shares of its 3 linears"),
        ([[row[0], row[1] - 0.01, row[2] + 0.02] for row in rows], "by whole channels"),
        ([row[:2] for row in rows], "block 0: needs the shares of its 3 linears"),
    ):
        with pytest.raises(UserError, match=f"^trial -1: plan: .*{said}"):
            space.plan_of(trial_of(**stored(plan.amounts, wrong)))
