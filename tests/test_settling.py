import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from test_samplers import fake_perplexity, search_of, space_of
from test_tuning import reopen, states
from tinystudy import run

from atp_tune.errors import UserError
from atp_tune.events import Note
from atp_tune.search import settling, tuning
from atp_tune.search.samplers import make_sampler
from atp_tune.search.settling import LEAST, has_settled, noise_of, regret_of
from atp_tune.search.space import Space
from atp_tune.spec.study import Search
from atp_tune.trials.storage import counted, total_of

GP = ("search.sampler=gp", "search.settle=true", "search.trials=30")


def study_of_gp(space: Space, trials: int, spread: float = 0.02) -> optuna.Study:
    """Trials as a study holds them, whose windows differ from uniform's by `spread` nats per token."""
    study = optuna.create_study(sampler=make_sampler(search_of(), space))
    for params in space.uniform():
        study.enqueue_trial(params)

    def objective(trial: optuna.Trial) -> float:
        plan = space.suggest(trial)
        mean = math.log(fake_perplexity(plan))
        trial.set_user_attr("sparsities", list(plan.sparsities))
        wide = 0.0 if plan.is_uniform else spread
        trial.set_user_attr("nlls", [mean + wide * sign for sign in (-1, 1) * 8])
        return math.exp(mean)

    study.optimize(objective, n_trials=trials)
    return study


def test_the_regret_shrinks_as_a_study_goes_on() -> None:
    space = space_of()
    study = study_of_gp(space, 14)
    bounds = [regret_of(study.trials[:count], space, "atp") for count in range(1, 15)]
    assert bounds[: LEAST - 1] == [math.inf] * (LEAST - 1)
    assert all(bound > 0 for bound in bounds)
    assert bounds[-1] < 0.02 < bounds[LEAST - 1]
    lowest = min(fake_perplexity(space.plan({**study.trials[0].params, "beta": k / 1000})) for k in range(200))
    for count in range(LEAST, 15):  # it is a bound: the truth lies below
        best = min(trial.value for trial in study.trials[:count])
        assert math.log(best / lowest) <= bounds[count - 1] + 0.01


def test_the_noise_is_that_of_the_comparison_with_uniform() -> None:
    study = study_of_gp(space_of(), 6, spread=0.03)
    assert noise_of(study) == pytest.approx(0.03 * math.sqrt(16 / 15) / 4, rel=1e-6)
    assert noise_of(study_of_gp(space_of(), 1)) is None  # uniform alone
    assert noise_of(optuna.create_study()) is None


def test_where_uniform_is_the_best_the_noise_is_that_of_the_first_other_point() -> None:
    study = optuna.create_study()
    kinds = {"beta": optuna.distributions.FloatDistribution(0, 0.2)}
    for beta, value, spread in ((0.0, 20.0, 0.0), (0.1, 40.0, 0.03), (0.05, 30.0, 0.01)):
        nlls = [math.log(value) + spread * sign for sign in (-1, 1) * 8]
        attrs = {"nlls": nlls, "sparsities": [0.5 - beta, 0.5 + beta]}
        trial = optuna.create_trial(value=value, params={"beta": beta}, distributions=kinds, user_attrs=attrs)
        study.add_trial(trial)
        expected = None if beta == 0 else pytest.approx(0.03 * math.sqrt(16 / 15) / 4, rel=1e-6)
        assert noise_of(study) == expected


def test_a_study_settles_sooner_where_the_noise_is_larger() -> None:
    space = space_of()

    def settled_after(spread: float) -> int:
        study = study_of_gp(space, 14, spread)
        trials = study.trials
        for count in range(1, 15):
            part = optuna.create_study()
            part.add_trials(trials[:count])
            if has_settled(part, space):
                return count
        return 99

    after = [settled_after(spread) for spread in (1.0, 0.1, 1e-9)]
    assert after == sorted(after)
    assert LEAST <= after[0] < after[2] == 99


def test_every_allocation_must_have_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of(allocation=["atp", "curve"])
    study = study_of_gp(space_of(), 10, 1.0)
    asked: list[str] = []
    monkeypatch.setattr(settling, "regret_of", lambda trials, space, branch: asked.append(branch) or 0.0)
    assert has_settled(study, space) and asked == ["atp", "curve"]
    monkeypatch.setattr(settling, "regret_of", lambda trials, space, branch: float(branch == "curve"))
    assert not has_settled(study, space)


def settle_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "has_settled", lambda study, space: counted(study) >= count)


def test_a_study_that_settles_ends_and_is_complete(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    settle_after(6, monkeypatch)
    study = run(place, *GP, watch=events.append)
    assert states(study) == ["COMPLETE"] * 6
    assert (study.user_attrs["settled"], study.user_attrs["total"]) == ([30, 6], 6)
    assert Note("settled after 6 of 30: a better one could not be told from the best") in events
    assert (place / "tiny.best.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "open_bench", None)
        assert states(run(place, *GP)) == ["COMPLETE"] * 6  # the same command finds it complete
        assert states(run(place, *GP, "search.trials=10")) == ["COMPLETE"] * 6


def test_more_trials_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle_after(4, monkeypatch)
    run(place, *GP)
    settle_after(7, monkeypatch)
    study = run(place, *GP, "search.trials=31")
    assert states(study) == ["COMPLETE"] * 7
    assert study.user_attrs["settled"] == [31, 7]


def test_a_real_study_settles(place: Path) -> None:
    study = run(place, *GP)
    assert LEAST <= counted(study) < 30
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    assert reopen(place).user_attrs["settled"] == [30, counted(study)]


def test_the_total_of_a_study() -> None:
    study = optuna.create_study()
    assert total_of(study, 5) == 5
    study.set_user_attr("settled", [12, 7])
    assert [total_of(study, asked) for asked in (7, 12, 13)] == [7, 7, 13]


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_samplers_that_learn_nothing_cannot_settle(place: Path, sampler: str) -> None:
    with pytest.raises(UserError, match=f"search.settle: {sampler} does not propose by what is known"):
        run(place, f"search.sampler={sampler}", "search.settle=true")
    assert not Search(trials=3).settle
