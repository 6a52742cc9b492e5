import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from threading import Barrier
from typing import Any

import optuna
import pytest
from expect import parametrize, slow
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from synthetic import storage_in
from test_space import SIZES, space_for, study_of

from atp_tune.config.search import SearchConfig
from atp_tune.plan import Plan
from atp_tune.search import samplers
from atp_tune.search.goals import AtSparsity
from atp_tune.search.samplers import (
    BranchSampler,
    _grid,
    around_best,
    branch_study,
    make_sampler,
    wait_for_earlier,
    whose_turn,
)
from atp_tune.search.space import Space
from atp_tune.storage.progress import queue_again

BOTH = {"pruners": ["wanda", "magnitude"]}


pytestmark = pytest.mark.usefixtures("quiet_optuna")


def space_of(**changes: Any) -> Space:
    return space_for(study_of(**changes), SIZES)


def search_of(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate({"trials": 1, **changes})


def fake_perplexity(plan: Plan) -> float:
    """A valley at β = 0.07 whose walls explode, as they do; magnitude is worse everywhere."""
    distance = plan.parameters.get("beta", 0.0) - 0.07
    return math.exp(3 + 150 * distance**2 + 3000 * max(0.0, distance) ** 3 + (plan.method == "magnitude"))


def run(space: Space, sampler: BaseSampler, trials: int, storage: BaseStorage | None = None) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, storage=storage)
    for params in space.uniform():
        study.enqueue_trial(params)
    study.optimize(lambda trial: fake_perplexity(space.suggest(trial)), n_trials=trials)
    return study


def params_of(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


@slow
@parametrize("prune", [{}, BOTH])
def test_the_gp_finds_the_valley(prune: dict[str, Any]) -> None:
    space = space_of(prune=prune)
    study = run(space, make_sampler(search_of(), space), 10)
    assert study.best_params["pruner"] == "wanda"
    assert abs(study.best_params["beta"] - 0.07) < 0.01


FLAT = {"gamma": 0.0, "ends": 0.0, "split": 0.0, "value": 0.0}
MIXED = {"names": ["atp", "curve", "uniform"]}


def test_turns_go_to_the_fewest_and_to_the_leader() -> None:
    space = space_of(allocation=MIXED)
    points = [("atp", 10.0), ("atp", 9.0), ("curve", 8.0), ("uniform", 7.0), ("uniform", 7.0), ("uniform", 7.0)]
    values = {"pruner": "wanda", "beta": 0.1, **FLAT}
    study = optuna.create_study()
    for name, value in points:
        names = {"pruner", "allocation", *space.intervals[name]}
        fixed = {key: values[key] for key in names - {"allocation"}} | {"allocation": name}
        study.enqueue_trial(fixed)
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, value)
    assert whose_turn(study.trials, space) == "curve"  # six are done: the fewest of those with parameters
    assert whose_turn(study.trials[:5], space) == "curve"  # the leader of those with parameters
    assert whose_turn(study.trials[:2], space) == "curve"
    assert whose_turn(study.trials[:1], space) == "atp"
    assert whose_turn([], space) == "atp"
    assert whose_turn([], space_of(allocation={"names": ["uniform"]})) == "uniform"


def test_proposals_stay_near_the_best_where_parameters_are_many() -> None:
    kinds = {name: FloatDistribution(0, 1) for name in "abc"} | {"pruner": CategoricalDistribution(("x", "y"))}
    study = optuna.create_study()
    assert around_best(study, kinds) == kinds
    for number, value in enumerate((3.0, 1.0, 2.0, 4.0)):
        params = {**dict.fromkeys("abc", 0.2 * number), "pruner": "x"}
        study.add_trial(optuna.create_trial(value=value, params=params, distributions=kinds))
    near = around_best(study, kinds)  # 0.2 is the best of four: a quarter of the interval to either side
    assert near["pruner"] == kinds["pruner"]
    assert all((near[name].low, near[name].high) == (0.0, pytest.approx(0.45)) for name in "abc")
    two = {name: kinds[name] for name in "ab"}
    assert around_best(study, two) == two


def test_of_equal_errors_the_lower_cross_entropy_leads() -> None:
    space = space_of(allocation={"names": ["atp", "curve", "uniform"]})
    study, better = optuna.create_study(), {}
    for point in space.starts():
        study.enqueue_trial(point)
        trial = study.ask()
        space.suggest(trial)
        trial.set_user_attr("misses", [1, 0])
        trial.set_user_attr("nlls", [1.0 / (trial.number + 1)] * 2)
        study.tell(trial, 0.4)
        better = trial.params
        if len(study.trials) % 2:
            assert whose_turn(study.trials, space) == better["allocation"]
    kinds = {"pruner": CategoricalDistribution(space.pruners)}
    shadow = branch_study(study.trials, space, "curve", kinds)
    assert [trial.user_attrs for trial in shadow.trials] and all("nlls" in trial.user_attrs for trial in shadow.trials)
    three, points = {name: FloatDistribution(0, 1) for name in "abc"}, optuna.create_study()
    for share, nll in ((0.1, 2.0), (0.9, 1.0), (0.5, 3.0)):
        attrs = {"misses": [1], "nlls": [nll]}
        params = dict.fromkeys("abc", share)
        points.add_trial(optuna.create_trial(value=0.4, params=params, distributions=three, user_attrs=attrs))
    assert around_best(points, three)["a"].low > 0.5


class Spy(BaseSampler):
    """Remembers the trials that it is shown, and proposes another point each time."""

    def __init__(self) -> None:
        self.shown: list[tuple[TrialState, float | None, dict[str, Any]]] = []
        self.inner = RandomSampler(seed=0)
        self.calls = 0

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return {"beta": optuna.distributions.FloatDistribution(0, 0.2)} if len(study.trials) > 2 else {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        others = [other for other in study.trials if other.number != trial.number]
        self.shown = [(other.state, other.value, other.params) for other in others]
        self.calls += 1
        return {"beta": 0.02 * self.calls}

    def sample_independent(self, *args: Any) -> Any:
        return self.inner.sample_independent(*args)


def without_allocation(trial: optuna.Trial) -> dict[str, Any]:
    return {name: value for name, value in trial.params.items() if name != "allocation"}


def test_the_sampler_inside_sees_logarithms_of_what_is_done_and_what_runs() -> None:
    spy, space = Spy(), space_of()
    study = optuna.create_study(sampler=BranchSampler(lambda seed: spy, 0, space))
    done, failed, running = trials = study.ask(), study.ask(), study.ask()
    for trial in trials:
        space.suggest(trial)
    study.tell(done, math.e**2)
    study.tell(failed, state=TrialState.FAIL)
    assert space.suggest(study.ask()).parameters == {"beta": 0.08}
    assert spy.shown == [
        (TrialState.COMPLETE, pytest.approx(2.0), without_allocation(done)),
        (TrialState.RUNNING, None, without_allocation(running)),
    ]
    assert study.trials[0].value == pytest.approx(math.e**2)


@slow
@parametrize("sampler", ["gp", "tpe", "random"])
def test_a_trial_that_was_lost_changes_no_proposal(sampler: str) -> None:
    space, search = space_of(), search_of(sampler=sampler)
    undisturbed = run(space, make_sampler(search, space), 8)
    study = run(space, make_sampler(search, space), 5)
    lost = study.ask()
    space.suggest(lost)
    study.tell(lost, state=TrialState.FAIL)
    queue_again(study, study.trials[5])
    study.sampler = make_sampler(search, space)
    study.optimize(lambda trial: fake_perplexity(space.suggest(trial)), n_trials=3)
    done = study.get_trials(states=(TrialState.COMPLETE,))
    assert [trial.params for trial in done] == params_of(undisturbed)


@slow
def test_workers_draw_apart_from_each_other() -> None:
    """Trials that run are known to the next one, whoever runs it."""
    space = space_of()
    for sampler in ("gp", "tpe", "random"):
        study = run(space, make_sampler(search_of(sampler=sampler), space), 5)
        running = []
        for _ in range(6):
            study.sampler = make_sampler(search_of(sampler=sampler), space)  # as another process has it
            trial = study.ask()
            running.append(space.suggest(trial).parameters["beta"])
        assert len(set(running)) == 6
        if sampler == "gp":
            assert max(running) - min(running) > 0.002


@slow
def test_workers_that_propose_at_the_same_moment_draw_apart(tmp_path: Path) -> None:
    """The second waits until the first has stored its point."""
    space = space_of()
    sampler = make_sampler(search_of(sampler="gp"), space)
    run(space, sampler, 8, storage_in(tmp_path / "s.db"))

    def propose(_: int) -> float:
        study = optuna.load_study(study_name=None, sampler=sampler, storage=storage_in(tmp_path / "s.db"))
        together.wait()
        return space.suggest(study.ask()).parameters["beta"]

    for _ in range(3):
        together = Barrier(2)
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(propose, range(2))
        assert abs(first - second) > 1e-6


class Later(datetime):
    """A clock that is an hour ahead."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> "Later":
        return super().now(tz) + timedelta(hours=1)


def test_nobody_waits_for_a_trial_that_has_drawn_or_died(monkeypatch: pytest.MonkeyPatch) -> None:
    space, naps = space_of(), list[float]()
    monkeypatch.setattr(samplers, "sleep", naps.append)
    monkeypatch.setattr(samplers, "monotonic", lambda: sum(naps))
    study = optuna.create_study(sampler=RandomSampler())

    def wait_for_those_before(number: int) -> list[float]:
        naps.clear()
        wait_for_earlier(study, study.trials[number], space)
        return list(naps)

    space.suggest(study.ask())
    study.ask()
    assert not wait_for_those_before(1)
    study.ask()
    assert set(wait_for_those_before(2)) == {samplers.LOOK}  # the one before has drawn nothing yet
    monkeypatch.setattr(samplers, "datetime", Later)  # so late that it must have died
    assert not wait_for_those_before(2)


def test_measurements_on_atp_count_for_the_curve() -> None:
    """The GP of curve starts from them: nothing is drawn at random after STARTS trials of ATP."""
    space = space_of(allocation={"names": ["atp", "curve"]})
    spy = Spy()
    study = optuna.create_study(sampler=BranchSampler(lambda seed: spy, 0, space))
    for beta in (0.0, 0.1, 0.15, 0.2):
        study.enqueue_trial({"pruner": "wanda", "allocation": "atp", "beta": beta})
        trial = study.ask()
        study.tell(trial, fake_perplexity(space.suggest(trial)))
    space.suggest(study.ask())
    own = {"pruner": "wanda", **FLAT}
    assert [params for _, _, params in spy.shown] == [{**own, "beta": beta} for beta in (0.0, 0.1, 0.15, 0.2)]


@parametrize("prune", [{}, BOTH])
def test_a_grid_is_visited_once_each(prune: dict[str, Any]) -> None:
    space, search = space_of(prune=prune), search_of(trials=None, sampler="grid", step=0.05)
    study = optuna.create_study(sampler=make_sampler(search, space))
    for params in AtSparsity(search, space).starts():
        study.enqueue_trial(params)
    study.optimize(lambda trial: fake_perplexity(space.suggest(trial)), n_trials=AtSparsity(search, space).total)
    assert params_of(study)[: len(space.pruners)] == space.uniform()
    expected = [
        {"pruner": pruner, "allocation": "atp", "beta": beta}
        for pruner, beta in itertools.product(space.pruners, (0.0, 0.05, 0.1, 0.15, 0.2))
    ]
    assert sorted(map(str, params_of(study))) == sorted(map(str, expected))


@parametrize("high", [0.8 / 29, 1.2 / 39, 0.1])
def test_the_grid_of_a_belief_stays_within_its_interval(high: float) -> None:
    grid = _grid(FloatDistribution(0, high))
    assert (grid[0], grid[-1]) == (0, high)
    assert grid == sorted(grid)


@slow
@parametrize("pruners", [("wanda",), ("wanda", "magnitude")])
def test_belief_is_what_the_gp_holds(pruners: tuple[str, ...]) -> None:
    """Where the GP has seen a valley without noise, its belief goes through the points, and is surest there."""
    space = space_of(prune={"pruners": pruners})
    study = optuna.create_study(sampler=make_sampler(SearchConfig(trials=12), space))
    high = space.intervals["atp"]["beta"][1]

    def valley(trial: optuna.Trial) -> float:
        plan = space.suggest(trial)
        return math.exp(3 + 4 * (plan.parameters["beta"] / high - 0.4) ** 2)

    study.optimize(valley, n_trials=12)
    held = study.user_attrs["gp_posterior"]
    assert held["before"] == 11
    assert set(held["curves"]) == set(pruners)
    curve = held["curves"]["wanda"]
    assert (len(curve["beta"]), curve["beta"][0]) == (41, 0)
    assert curve["beta"][-1] == pytest.approx(high, abs=1e-8)
    assert all(low <= mean <= top for low, mean, top in zip(curve["low"], curve["mean"], curve["high"], strict=True))
    truth = [math.exp(3 + 4 * (beta / high - 0.4) ** 2) for beta in curve["beta"]]
    near = [k for k, beta in enumerate(curve["beta"]) if abs(beta / high - 0.4) < 0.1]
    assert near
    assert [curve["mean"][k] for k in near] == pytest.approx([truth[k] for k in near], rel=0.05)
