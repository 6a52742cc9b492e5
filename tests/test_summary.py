import json
from datetime import datetime
from typing import Any

import optuna
import plans
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from atp_tune.measures import perplexity
from atp_tune.report import formats
from atp_tune.report.formats import gather
from atp_tune.results.results import is_uniform
from atp_tune.results.status import make_status
from atp_tune.results.summary import kinds, summarise

DISTRIBUTIONS = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "allocation": CategoricalDistribution(("atp",)),
    "beta": FloatDistribution(0, 1),
}


pytestmark = pytest.mark.usefixtures("without_warnings")


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
    assert row in formats.markdown(contents).decode() and "25.79 (2.72×)" in formats.html(contents).decode()
    (made,) = json.loads(formats.machine(contents))["studies"]
    assert made["kinds"] == make_status(summary, now).model_dump(mode="json")["kinds"]
    assert [*made["kinds"]] == ["dense", "0", "1", "trained"]
    study.set_user_attr("kinds", ["one", "more", "kind", "than", "there", "are"])
    assert [*summarise(study).kinds] == ["trained"]


def test_uniform_stays_uniform_where_the_pattern_rounds(study: optuna.Study) -> None:
    add(study, 0.0, 10.0, sparsities=[0.5, 0.625, 0.625])
    add(study, 0.1, 9.0, sparsities=[0.5, 0.625, 0.625])
    assert [is_uniform(trial) for trial in study.trials] == [True, False]
