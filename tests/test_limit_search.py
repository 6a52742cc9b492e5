"""The search for the sparsest plan within a limit, on studies whose values are a formula."""

import math
from collections.abc import Callable

import optuna
import pytest
from expect import parametrize, slow
from optuna.distributions import CategoricalDistribution
from optuna.samplers import RandomSampler
from test_space import SIZES, study_of
from test_sparsity_interval import DENSE, INTERVAL, TPE, loss, screened, space_over

from atp_tune.allocations import Budget
from atp_tune.allocations.budget import Shape
from atp_tune.allocations.rows import RowSparsities
from atp_tune.results.goals import best_trial, limit_excess
from atp_tune.search.goals import LimitSampler, Screened, Surrogate, WithinLimit
from atp_tune.search.space import Space, make_space

LIMITS = [{"max_increase": 0.2}, {"max_increase": 2.0}, {"max_perplexity": 30.0}]

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def shifted(sparsity: float, share: float) -> float:
    """Full measurements are better than the screening's, the more so the sparser."""
    return loss(sparsity, share) - 0.2 * sparsity


def within(space: Space, surrogate: Surrogate, limit: dict[str, float]) -> WithinLimit:
    goal = WithinLimit(study_of(sparsity=INTERVAL, search={**TPE, "trials": 30}, limit=limit).search, space, limit)
    goal.model, goal.dense = surrogate, DENSE
    return goal


def searched(
    space: Space,
    limit: dict[str, float],
    surrogate: Surrogate,
    most: int = 30,
    jump: float = 0.0,
    cost: float = 0.0,
    name: str = "beta",
    again: Callable[[optuna.Study], object] | None = None,
) -> optuna.Study:
    """A study driven until its search is idle; to the loss, `jump` is added above 40 %, and `cost` times the share.

    `again`: gives it the sampler that it is resumed with, before each trial.
    """
    search = within(space, surrogate, limit)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=LimitSampler(RandomSampler, search.search.seed, search)
    )
    study.set_user_attr("limit", limit)
    study.set_user_attr("fingerprint", {"sparsity": list(space.targets)})
    study.set_user_attr("dense", DENSE)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        plan = space.suggest(trial)
        assert plan.target is not None
        share = trial.params[name]
        mean = shifted(plan.target, share) + jump * (plan.target > 0.4) + cost * share
        trial.set_user_attr("nlls", [mean - 0.1, mean + 0.1])
        return math.exp(mean), 1 - plan.target

    for _ in range(most):
        if search.is_idle(study):
            break
        if again:
            again(study)
        study.optimize(objective, n_trials=1)
    return study


def sparsest(space: Space, limit: dict[str, float]) -> float:
    """By trying everything."""
    worst = math.log(limit.get("max_perplexity") or math.exp(2.8) * (1 + limit["max_increase"]))
    levels = space.levels(1 + round((space.targets[1] - space.targets[0]) / space.step))  # type: ignore[index]
    return max(level for level in levels if min(shifted(level, share / 200) for share in range(201)) <= worst)


@slow
@parametrize("limit", LIMITS, ids=str)
def test_it_finds_the_sparsest_plan_within_the_limit(limit: dict[str, float]) -> None:
    space = space_over()
    study = searched(space, limit, Surrogate(space, screened(space), 0, DENSE))
    best = best_trial(study)
    assert best is not None
    assert limit_excess(study, best) <= 0
    assert best.params["sparsity"] == pytest.approx(sparsest(space, limit), abs=2 * 0.005)
    assert len(study.trials) <= 8
    uniform = [trial for trial in study.trials if trial.params["beta"] == 0]
    assert best.params["sparsity"] in [trial.params["sparsity"] for trial in uniform]


@parametrize("limit", LIMITS, ids=str)
def test_without_a_model_the_log_of_the_increase_is_linear(limit: dict[str, float]) -> None:
    """A search without a screening tried uniform alone, and halved its bracket: 101 levels are 7 halvings."""
    space = space_over()
    study = searched(space, limit, Surrogate(space, [], 0))
    best = best_trial(study)
    assert best is not None
    worst = math.log(limit.get("max_perplexity") or math.exp(2.8) * (1 + limit["max_increase"]))
    shares = [0.0, space.starts()[0]["beta"]]
    inside = [level for level in space.levels(101) if min(shifted(level, share) for share in shares) <= worst]
    assert best.params["sparsity"] == max(inside)
    assert study.trials[0].params["beta"] == shares[1] > 0
    assert len(study.trials) <= (9 if best.params["beta"] == 0 else 6)  # 9: uniform is better, and is searched anew


def test_without_a_model_a_limit_below_the_dense_model_is_halved_towards() -> None:
    """The log of the allowed increase is of a negative number there: the search went down a step a trial."""
    study = searched(space_over(), {"max_perplexity": 15.0}, Surrogate(space_over(), [], 0))  # dense: 16.4
    assert [trial.params["sparsity"] for trial in study.trials[:4]] == pytest.approx(
        [0.45, 0.325, 0.265, 0.235], abs=0.011
    )
    assert len(study.trials) <= 9


def test_an_interrupted_search_without_a_screening_has_the_points_of_another() -> None:
    """The trials before the interruption were a model's after it, which no uninterrupted search had."""
    limit, space = {"max_increase": 0.2}, space_over()
    goal = within(space, Surrogate(space, [], 0), limit)
    whole = searched(space, limit, Surrogate(space, [], 0))
    resumed = searched(space, limit, Surrogate(space, [], 0), again=lambda study: goal.begin(study, Screened(), 30))
    assert len(whole.trials) > 4
    assert [trial.params for trial in resumed.trials] == [trial.params for trial in whole.trials]


def test_prices_within_a_limit() -> None:
    """At each sparsity that it measures, the plan has the sparsities of the descent there."""
    shapes = ((Shape(10, 10, True), Shape(10, 10, False)),) * len(SIZES)
    study = study_of(sparsity=(0.2, 0.7), search={"sampler": "tpe", "trials": 24}, allocation={"names": ["gradient"]})
    metrics = Descended(len(SIZES))
    space = make_space(study, Budget(0.7, (200,) * len(SIZES), shapes, metrics))  # type: ignore[arg-type]
    params = {"pruner": "wanda", "allocation": "gradient", "kappa": 0.4}
    points = [space.at(params, level) for level in (0.2, 0.45, 0.7)]
    distributions = {**space.kinds("gradient"), "allocation": CategoricalDistribution(tuple(space.intervals))}
    done = [
        optuna.create_trial(
            value=math.exp(loss(point["sparsity"], point["kappa"])), params=point, distributions=distributions
        )
        for point in points
    ]
    found = searched(space, {"max_increase": 0.2}, Surrogate(space, done, 0, DENSE), name="kappa")
    best = best_trial(found)
    assert best is not None
    assert limit_excess(found, best) <= 0
    assert {*metrics.targets} >= {trial.params["sparsity"] for trial in found.trials if trial.params["kappa"]} != set()


class Descended:
    """Stands for a model whose descent moves a tenth from the first linear of each block to the second."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self.targets: list[float] = []

    def by_prices(self, target: float, pruner: str, rows: bool) -> RowSparsities:
        self.targets.append(target)
        return RowSparsities(((target - 0.1, target + 0.1),) * self._blocks)


@slow
def test_a_limit_that_nothing_meets_ends_at_the_nearest() -> None:
    space = space_over()
    study = searched(space, {"max_perplexity": 5.0}, Surrogate(space, screened(space), 0, DENSE))
    best = best_trial(study)
    assert best is not None
    assert (best.params["sparsity"], limit_excess(study, best) > 0) == (0.2, True)
    assert len(study.trials) < 12


@slow
def test_where_uniform_is_better_than_the_model_says_it_leads() -> None:
    space = space_over()
    study = searched(space, {"max_increase": 1.0}, Surrogate(space, screened(space), 0, DENSE), cost=1.0)
    best = best_trial(study)
    assert best is not None
    inside = [level for level in space.levels(101) if shifted(level, 0) <= 2.8 + math.log(2.0)]
    assert best.params == {**best.params, "beta": 0.0, "sparsity": max(inside)}
    assert len(study.trials) < 16


@slow
def test_the_last_trial_is_uniform_at_the_best_sparsity() -> None:
    space = space_over()
    search = within(space, Surrogate(space, screened(space), 0, DENSE), {"max_increase": 2.0})
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=LimitSampler(RandomSampler, search.search.seed, search)
    )
    for name, value in {"limit": {"max_increase": 2.0}, "dense": DENSE, "total": 2}.items():
        study.set_user_attr(name, value)
    for _ in range(2):
        trial = study.ask()
        plan = space.suggest(trial)
        assert plan.target is not None
        mean = 2.85 + plan.target / 1e3
        trial.set_user_attr("nlls", [mean - 0.1, mean + 0.1])
        study.tell(trial, [math.exp(mean), 1 - plan.target])
    first, last = study.trials
    assert first.params["beta"] > 0
    assert last.params == {**first.params, "beta": 0.0}


@slow
def test_two_workers_measure_different_sparsities() -> None:
    space = space_over()
    search = within(space, Surrogate(space, screened(space), 0, DENSE), {"max_increase": 0.2})
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=LimitSampler(RandomSampler, search.search.seed, search)
    )
    study.set_user_attr("limit", {"max_increase": 0.2})
    study.set_user_attr("dense", DENSE)
    assert len({*[space.suggest(study.ask()).target for _ in range(3)]}) == 3
    assert not search.is_idle(study)
