"""Studies that minimise the KL divergence from the dense model, or perplexity and KL together."""

import math
from pathlib import Path
from statistics import fmean

import naive
import optuna
import pytest
from byhand import ByHand
from expect import parametrize, slow
from families import few
from optuna.trial import FrozenTrial
from tinystudy import copied, run, stored

from atp_tune import measures
from atp_tune.results.goals import pareto_front
from atp_tune.results.summary import summarise

KL = "search.objective=kl"
BOTH = 'search.objective=["kl", "perplexity"]'
GP = "search.sampler=gp"


@pytest.fixture(scope="module")
def made(tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished study of KL, and one of both; to be read only."""
    with copied(tiny_place, tmp_path_factory) as place:
        run(place, KL, GP, "search.trials=4", name="kl")
        run(place, BOTH, GP, "search.trials=6", name="both")
        return place


# --- one value


@slow
def test_a_trial_s_value_is_its_kl_by_hand(made: Path) -> None:
    study, dense = stored(made, "kl"), ByHand(made)
    assert [direction.name for direction in study.directions] == ["MINIMIZE"]
    best = study.best_trial
    assert best.number == min(study.trials, key=lambda trial: trial.values[0]).number
    pruned = ByHand(made).prune("wanda", best.user_attrs["plan"]["levels"])
    expected = naive.kls_of(dense.model, pruned.model, dense.windows("validation"))
    assert best.user_attrs["kls"] == pytest.approx(expected, rel=1e-5)
    assert best.user_attrs["nlls"] == pytest.approx(pruned.nlls("validation"), rel=1e-5)
    assert best.value == fmean(best.user_attrs["kls"])
    results = summarise(study).results
    score, kl = results.score(best, "validation"), results.score(best, "validation", measures.KL)
    assert score
    assert kl
    assert score.value == math.exp(fmean(best.user_attrs["nlls"]))
    assert (kl.value, kl.stderr) == (best.value, best.user_attrs["stderr"])
    on_report = naive.kls_of(dense.model, pruned.model, dense.windows("test"))
    assert study.user_attrs["test_kls"][str(best.number)] == pytest.approx(on_report, rel=1e-5)
    assert study.user_attrs["test_kls"].keys() == study.user_attrs["test_nlls"].keys() - {"dense"}


# --- two values


def naive_front(trials: list[FrozenTrial]) -> set[int]:
    front = set()
    for one in trials:
        beaten = False
        for other in trials:
            no_worse = all(b <= a for a, b in zip(one.values, other.values, strict=True))
            beaten = beaten or (no_worse and other.values != one.values)
        if not beaten:
            front.add(one.number)
    return front


@slow
def test_two_values_make_a_study_of_two_objectives(made: Path) -> None:
    study = stored(made, "both")
    assert [direction.name for direction in study.directions] == ["MINIMIZE"] * 2
    assert study.metric_names == ["perplexity", "kl"]
    assert study.user_attrs["fingerprint"]["search.objective"] == ["perplexity", "kl"]
    for trial in study.trials:
        nlls, kls = trial.user_attrs["nlls"], trial.user_attrs["kls"]
        assert trial.values == [math.exp(fmean(nlls)), fmean(kls)]


@slow
def test_the_front_is_that_of_a_double_loop(made: Path) -> None:
    study = stored(made, "both")
    summary = summarise(study)
    measured = [trial for trial in study.trials if "repeats" not in trial.user_attrs]
    numbers = [trial.number for trial in summary.front]
    assert set(numbers) == naive_front(measured)
    assert 0 < len(numbers) < len(measured)
    assert summary.front[0] == summary.best_trial == min(measured, key=lambda trial: trial.values[0])
    assert sorted(numbers, key=lambda number: study.trials[number].values[0]) == numbers


@parametrize("seed", range(5))
def test_the_front_of_any_values(seed: int) -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=seed))
    for _ in range(30):
        trial = study.ask()
        study.tell(trial, [trial.suggest_int(name, 1, 9) for name in "ab"])
    found = pareto_front(study)
    assert {trial.number for trial in found} == naive_front(study.trials)
    assert [trial.values for trial in found] == sorted(trial.values for trial in found)
    assert pareto_front(optuna.create_study()) == []


@slow
@parametrize("sampler", few(["gp", "tpe", "random", "grid"], ["random"]))
def test_a_study_of_two_values_goes_on_where_it_was(sampler: str, place: Path) -> None:
    keys = (BOTH, f"search.sampler={sampler}", "search.step=0.02")
    run(place, *keys, "search.trials=4")
    study = run(place, *keys, "search.trials=7")
    whole = run(place, *keys, "search.trials=7", name="whole")
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]
    assert [trial.values for trial in study.trials] == [trial.values for trial in whole.trials]
    assert len(study.trials) == 7


# --- what people and programs see


# --- what is refused, and what goes on
