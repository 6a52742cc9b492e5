import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna
import plans
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from tinystudy import quiet, stored, study_file

from atp_tune.errors import UserError
from atp_tune.measures import TEXTS, perplexity
from atp_tune.report import html, machine, markdown
from atp_tune.report.contents import gather
from atp_tune.results.goals import best_trial
from atp_tune.results.results import is_uniform, uniform_of
from atp_tune.results.status import status_of
from atp_tune.results.stored import best_config
from atp_tune.results.summary import summarise
from atp_tune.results.tables import kinds

DISTRIBUTIONS = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "allocation": CategoricalDistribution(("atp",)),
    "beta": FloatDistribution(0, 1),
}


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def study() -> optuna.Study:
    made = optuna.create_study(study_name="s")
    made.set_user_attr("fingerprint", {"model.content": "ab" * 32, "model.dtype": "float32"})
    made.set_user_attr("total", 9)
    return made


def add(study: optuna.Study, beta: float, value: float | None, pruner: str = "wanda", **attributes: Any) -> None:
    sparsities = [0.6 - beta, 0.6, 0.6 + beta]
    trial = optuna.create_trial(
        state=TrialState.FAIL if value is None else TrialState.COMPLETE,
        value=value,
        params={"pruner": pruner, "allocation": "atp", "beta": beta},
        distributions=DISTRIBUTIONS,
        user_attrs={**plans.stored(sparsities), "stderr": 0.5} | attributes,
    )
    study.add_trial(trial)


def test_a_study_that_has_just_begun(study: optuna.Study) -> None:
    summary = summarise(study)
    assert (summary.name, summary.total, summary.done, summary.trials) == ("s", 9, 0, [])
    for model in ("dense", summary.uniform_trial, summary.best_trial):
        assert all(summary.results.score(model, text) is None for text in TEXTS)
    assert summary.best_trial is None


def test_dense_uniform_and_best(study: optuna.Study) -> None:
    study.set_user_attr("dense", [1.0, 2.0])
    add(study, 0.0, 10.0)
    add(study, 0.0, 11.0, "magnitude")
    add(study, 0.1, 8.0, "magnitude")
    add(study, 0.2, None, failure="no")
    summary = summarise(study)
    assert summary.best_trial
    assert summary.best_trial.number == 2
    assert summary.done == 4
    assert summary.results.score("dense", "validation") == perplexity([1.0, 2.0])
    assert summary.results.score(summary.uniform_trial, "validation")
    assert summary.results.score(summary.uniform_trial, "validation").value == 11  # of the best trial's pruner
    assert summary.results.score(summary.best_trial, "validation")
    assert (
        summary.results.score(summary.best_trial, "validation").value,
        summary.results.score(summary.best_trial, "validation").stderr,
    ) == (8.0, 0.5)
    study.set_user_attr("test_nlls", {"dense": [1.5, 2.5], "1": [2.0, 3.0], "2": [2.0, 2.5]})
    summary = summarise(study)
    assert summary.results.score("dense", "test") == perplexity([1.5, 2.5])
    assert summary.results.score(summary.best_trial, "test") == perplexity([2.0, 2.5])


def test_test_perplexity_by_kind(study: optuna.Study) -> None:
    """The test perplexity of a mixed text hid that a model calibrated on manuals was lost for news."""
    nlls = {"dense": [1.0, 2.0, 1.5, 2.5, 1.0], "0": [1.0, 3.0, 1.5, 3.5, 1.0], "1": [1.0, 2.5, 1.5, 3.0, 1.0]}
    add(study, 0.0, 10.0)
    add(study, 0.1, 8.0)
    study.set_user_attr("test_nlls", nlls)
    assert summarise(study).kinds == {} and kinds(summarise(study)) is None
    study.set_user_attr("kinds", ["manual", "news"])
    kept = {"settings": {}, "kept": True, "kinds": {"manual": {"value": 3.5, "stderr": 0.1}}}
    study.set_user_attr("recovered", {"1": kept})
    summary = summarise(study)
    assert summary.kinds["0"] == {"manual": perplexity([1.0, 1.5, 1.0]), "news": perplexity([3.0, 3.5])}
    made = kinds(summary)
    assert made is not None and [made.head, *made.rows] == [
        ["test perplexity by kind", "manual", "news"],
        ["dense", "3.21", "9.49"],
        ["wanda uniform", "3.21 (1.00×)", "25.79 (2.72×)"],
        ["wanda atp β=0.10000", "3.21 (1.00×)", "15.64 (1.65×)"],
        ["best, trained", "3.50 (1.09×)", "–"],
    ]
    now = datetime(2026, 1, 2)
    row = "| wanda atp β=0.10000 | 3.21 (1.00×) | 15.64 (1.65×) |"
    contents = [gather(study, now)]
    assert row in markdown.make(contents).decode() and "25.79 (2.72×)" in html.make(contents).decode()
    (made,) = json.loads(machine.make(contents))["studies"]
    assert made["kinds"] == status_of(summary, now).model_dump(mode="json")["kinds"]
    assert [*made["kinds"]] == ["dense", "0", "1", "trained"]
    study.set_user_attr("kinds", ["one", "more", "kind", "than", "there", "are"])
    assert [*summarise(study).kinds] == ["trained"]


def test_an_estimate_is_not_the_best(study: optuna.Study) -> None:
    add(study, 0.0, 10.0)
    add(study, 0.1, 9.0, stopped_after=2)
    summary = summarise(study)
    assert summary.best_trial
    assert summary.best_trial.number == 0
    assert summary.done == 2


def test_uniform_of(study: optuna.Study) -> None:
    add(study, 0.0, None, failure="no")
    add(study, 0.1, 9.0)
    assert uniform_of(study, study.trials[1]) is None
    add(study, 0.0, 10.0, "magnitude")
    assert uniform_of(study, study.trials[1]) is None
    add(study, 0.0, 10.0)
    found = uniform_of(study, study.trials[1])
    assert found
    assert found.number == 3
    assert uniform_of(study, None) is None
    assert [is_uniform(trial) for trial in study.trials] == [True, False, True, True]


def test_uniform_stays_uniform_where_the_pattern_rounds(study: optuna.Study) -> None:
    add(study, 0.0, 10.0, sparsities=[0.5, 0.625, 0.625])
    add(study, 0.1, 9.0, sparsities=[0.5, 0.625, 0.625])
    assert [is_uniform(trial) for trial in study.trials] == [True, False]


def test_scores_of_trials(study: optuna.Study) -> None:
    add(study, 0.0, None, failure="no")
    add(study, 0.1, 9.0)
    assert summarise(study).results.score(study.trials[0], "validation") is None
    assert str(summarise(study).results.score(study.trials[1], "validation")) == "9.00 ± 0.50"


def test_a_real_study(done: Path) -> None:
    study = stored(done)
    summary = summarise(study)
    best = summary.best_trial
    assert best
    assert summary.done == summary.total == len(summary.trials) == 6
    assert best.value == min(t.value for t in study.trials if t.value)
    assert summary.results.score(summary.best_trial, "validation")
    assert summary.results.score(summary.best_trial, "validation").value == best.value
    nlls = best.user_attrs["nlls"]
    assert summary.results.score(summary.best_trial, "validation").stderr == pytest.approx(
        best.value * stdev(nlls) / len(nlls) ** 0.5
    )
    assert summary.results.score("dense", "validation")
    assert summary.results.score("dense", "validation").value == pytest.approx(
        math.exp(fmean(study.user_attrs["dense"]))
    )


def test_the_configuration_of_the_best(done: Path, tmp_path: Path) -> None:
    file, study = study_file(done), stored(done)
    best = best_trial(study)
    assert best
    config = best_config(file, study, tmp_path / "out" / "best.json")
    assert (config.study, config.trial, config.seed) == ("tiny", best.number, 2)
    assert config.model.id == "model"
    assert config.model.fingerprint == study.user_attrs["fingerprint"]["model.content"]
    assert config.model.dtype == "float32"
    assert (config.plan.method, config.plan.allocation) == (best.params["pruner"], "atp")
    assert config.plan.parameters == {"beta": best.params["beta"]}
    assert config.plan.amounts == tuple(best.user_attrs["plan"]["levels"])
    assert (config.sparsity.target, config.sparsity.realised) == (0.5, best.user_attrs["realised"])
    assert config.calibration == file.study.texts.calibration.text
    assert config.batches == best.user_attrs["batches"]
    assert (config.texts.validation, config.texts.test) == (file.study.texts.validation, file.study.texts.test)
    assert config.versions == best.user_attrs["versions"]
    summary = summarise(study)
    assert config.scores["best"] == summary.results.scores(summary.best_trial)
    assert config.scores["uniform"] == summary.results.scores(summary.uniform_trial)
    assert config.folder == "../done"  # where the study's relative paths start, seen from the file


def test_no_value_is_no_configuration(done: Path, study: optuna.Study) -> None:
    add(study, 0.1, None, failure="no")
    with pytest.raises(UserError) as caught:
        best_config(study_file(done), study, done / "x.json")
    assert str(caught.value) == "study s: no trial has a value yet; run: python tune.py --study tiny"
