import itertools

import optuna
from expect import parametrize
from families import few
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from test_samplers import search_of, space_of

from atp_tune.search.samplers import NEAR, REACH, is_near, make_sampler, nudge_from_known

KINDS: dict[str, BaseDistribution] = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "beta": FloatDistribution(0, 0.2),
}


def known(*betas: float, pruner: str = "wanda", state: TrialState = TrialState.RUNNING) -> list[FrozenTrial]:
    value = 1.0 if state == TrialState.COMPLETE else None
    return [
        optuna.create_trial(state=state, value=value, params={"pruner": pruner, "beta": beta}, distributions=KINDS)
        for beta in betas
    ]


@parametrize("state", [TrialState.RUNNING, TrialState.COMPLETE])
@parametrize("beta", [0.0, 0.1, 0.2])
def test_a_known_point_gives_way_to_one_beside_it(beta: float, state: TrialState) -> None:
    point = {"pruner": "wanda", "beta": beta}
    trials = known(beta, state=state)
    drawn = [nudge_from_known(point, trials, KINDS, seed) for seed in range(20)]
    assert drawn == [nudge_from_known(point, trials, KINDS, seed) for seed in range(20)]
    assert len({one["beta"] for one in drawn}) == 20
    for one in drawn:
        assert one["pruner"] == "wanda" and 0 <= one["beta"] <= 0.2
        assert abs(one["beta"] - beta) / 0.2 > NEAR
    assert sum(abs(one["beta"] - beta) <= 0.2 * REACH for one in drawn) >= 15  # most at the first draw


def test_a_crowd_is_left_and_a_full_interval_ends_the_search() -> None:
    point = {"pruner": "wanda", "beta": 0.0}
    crowd = known(*(0.2 * NEAR * k for k in range(100)))
    found = [nudge_from_known(point, crowd, KINDS, seed)["beta"] for seed in range(20)]
    assert all(beta > 0.2 * NEAR * 100 for beta in found)
    assert 0 <= nudge_from_known(point, known(*(0.2 * NEAR * k for k in range(501))), KINDS, 0)["beta"] <= 0.2
    alone = {"pruner": KINDS["pruner"]}
    assert nudge_from_known({"pruner": "wanda"}, known(0.1), alone, 0) == {"pruner": "wanda"}
    assert is_near({"pruner": "wanda"}, {"pruner": "wanda", "beta": 0.1}, alone, NEAR)


@parametrize("sampler", few(["gp", "tpe"], ["tpe"]))
def test_no_point_is_asked_for_twice_where_the_best_is_an_end(sampler: str) -> None:
    """As uniform is for many models at low sparsity: perplexity rises with β from the start."""
    space = space_of(allocation={"names": ["atp"], "beta": [0, 0.2]})
    study = optuna.create_study(sampler=make_sampler(search_of(sampler=sampler), space))
    for params in space.uniform():
        study.enqueue_trial(params)
    study.optimize(lambda trial: 50 + 100 * space.suggest(trial).parameters["beta"], n_trials=20)
    check_apart(study)
    assert study.best_params["beta"] == 0


@parametrize("sampler", few(["gp", "tpe"], ["tpe"]))
def test_no_point_that_failed_is_asked_for_again(sampler: str) -> None:
    space = space_of(allocation={"names": ["atp"], "beta": [0, 0.2]})
    study = optuna.create_study(sampler=make_sampler(search_of(sampler=sampler), space))
    for _ in range(15):
        trial = study.ask()
        beta = space.suggest(trial).parameters["beta"]
        trial.set_user_attr("failure", "as it had to")
        study.tell(trial, 50 - beta if beta < 0.15 else None, None if beta < 0.15 else TrialState.FAIL)
    assert any(trial.state == TrialState.FAIL for trial in study.trials)
    check_apart(study)


def check_apart(study: optuna.Study) -> None:
    betas = sorted(trial.params["beta"] for trial in study.trials)
    assert all(after - before > 0.2 * NEAR for before, after in itertools.pairwise(betas))
