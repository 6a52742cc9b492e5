"""Studies of image classifiers that search by accuracy: values, the order of trials, and what is shown of them."""

import math
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
import pytest
from expect import parametrize, slow
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial
from test_image_studies import place, trained, tune  # noqa: F401 - fixtures
from tinystudy import CommandLine, quiet, run

from atp_tune.measures import ACCURACY, error_rate, excess
from atp_tune.results.formatting import limit_words, sign_of_beta
from atp_tune.results.results import Results
from atp_tune.results.summary import summarise
from atp_tune.storage.progress import ranked


def made(value: float, misses: list[int], nlls: list[float], **more: object) -> FrozenTrial:
    attrs = {"misses": misses, "nlls": nlls, "ranks": misses, **more}
    return optuna.create_trial(value=value, user_attrs=attrs, params={}, distributions={})


def test_of_equal_accuracies_the_lower_cross_entropy_leads() -> None:
    first, second = made(0.3, [1, 0], [2.0, 1.0]), made(0.3, [0, 1], [1.0, 1.5])
    worse, stopped = made(0.5, [1, 1], [0.1, 0.1]), made(0.1, [0], [0.1], stopped_after=1)
    assert ranked([worse, first, stopped, second]) == [second, first, worse]
    results = Results({}, [worse, first, stopped, second], ("accuracy",))
    found = results.score(first, "validation")
    assert found is not None and found.value == pytest.approx(math.exp(1.5))
    assert results.score(stopped, "validation") is None
    scores = [results.score(trial, "validation", ACCURACY) for trial in (first, stopped)]
    assert [score and score.value for score in scores] == [0.5, pytest.approx(1 - (3 * 0.1 - 0.5) / 2)]


def by_error() -> optuna.Study:
    study = optuna.create_study()
    with quiet():
        study.set_metric_names(["top-1 error"])
    study.set_user_attr("fingerprint", {"search.objective": ["accuracy"]})
    return study


@parametrize("ranks", [None, [0, 1], []])
def test_the_sign_of_beta_in_a_tampered_database(ranks: list[int] | None) -> None:
    study = by_error()
    for beta, misses in ((0.1, [0, 0, 1]), (-0.1, [1, 0, 1])):
        attrs = {"misses": misses, "nlls": [1.0] * 3} | ({} if ranks is None else {"ranks": ranks})
        kinds = {"beta": FloatDistribution(-1, 1)}
        value = error_rate(misses).value
        study.add_trial(optuna.create_trial(value=value, user_attrs=attrs, params={"beta": beta}, distributions=kinds))
    assert sign_of_beta(summarise(study)).startswith("Sign of β: positive")
    assert ("66.7%" in sign_of_beta(summarise(study))) == (ranks != [0, 1])


def test_a_drop_of_accuracy_is_paired_by_image() -> None:
    """The mean of hits lost, at the upper end of its error, above the limit; not known without ranks."""
    before, after = [0, 0, 3, 0, 1, 0, 0], [0, 2, 0, 0, 1, 5, 9]
    lost = [int(new > 0) - int(old > 0) for old, new in zip(before, after, strict=True)]
    upper = fmean(lost) + np.std([*lost, *lost, 1, -1, 0, 0]) / math.sqrt(9)
    limit = {"max_drop": 0.1}
    assert excess(limit, None, None, ranks=(before, after)) == pytest.approx(upper - 0.1)
    assert excess(limit, None, None, ranks=(before, before)) == pytest.approx(1 / 9 - 0.1)  # where nothing changed too
    for ranks in ((None, after), (before, None), (before, after[:3]), ([], [])):
        assert excess(limit, [1.0], [1.0], ranks=ranks) is None
    assert limit_words({"max_drop": 0.01}) == "1 point of accuracy less than dense"
    assert limit_words({"max_drop": 0.025}) == "2.5 points of accuracy less than dense"


@slow
def test_the_sparsest_plan_within_a_drop_of_accuracy(place: Path, tune: CommandLine) -> None:  # noqa: F811
    """By the study's limit and by `export --max-drop`; a study of texts, and one limit too many, are refused."""
    screen = "search.screen={trials = 6, confirm = 3}"
    study = run(place, "sparsity=[0.3, 0.95]", "limit.max_drop=0.1", "search.sampler=tpe", screen, "search.trials=9")
    best, dense = summarise(study).best_trial, study.user_attrs["dense_ranks"]
    assert best is not None
    drops = {trial.number: excess({"max_drop": 0.1}, None, None, ranks=(dense, trial.user_attrs["ranks"]))
             for trial in study.trials}  # fmt: skip
    inside = [trial for trial in study.trials if drops[trial.number] <= 0]  # type: ignore[operator]
    assert inside and best.params["sparsity"] == max(trial.params["sparsity"] for trial in inside)
    assert len(inside) < len(study.trials)
    summary = summarise(study)
    said = summary.goal.outcome(summary)
    assert "accuracy " in said and "dense " in said and "10 points of accuracy less than dense" in said
    found = tune.ok("export", "--study", place / "tiny.toml", "--max-drop", "10%", "--out", place / "x.json")
    assert f"trial {best.number}, " in found.err and "on the validation images" in found.err
    refused = tune("export", "--study", place / "tiny.toml", "--max-drop", "1%", "--max-increase", "5%")
    assert refused.code == 2 and "leave one out" in refused.err
    tune.ok("report", "--study", place / "tiny.toml", "--out", place / "r.md")
    assert "10 points of accuracy less than dense" in (place / "r.md").read_text()
    accuracies = "validation accuracy | test accuracy | accuracy against uniform"
    assert f"| against uniform | {accuracies} | packed | limit |" in (place / "r.md").read_text()
