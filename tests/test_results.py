"""Items by model, text and measure, against loops without an object."""

import math
from statistics import fmean, stdev
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from atp_tune.measures import ACCURACY, KL, MEASURES, PERPLEXITY, TEXTS
from atp_tune.results.results import Results
from atp_tune.scores.next_token import beside_dense

KINDS = {
    "pruner": CategoricalDistribution(("wanda", "magnitude")),
    "allocation": CategoricalDistribution(("atp",)),
    "beta": FloatDistribution(0, 1),
}
DENSE, UNIFORM, ATP = [1.0, 1.5, 2.0], [2.0, 2.4, 3.1], [1.8, 2.3, 2.7]


def trial(number: int, beta: float, values: list[float], pruner: str = "wanda", **attrs: Any) -> FrozenTrial:
    made = optuna.create_trial(
        values=values, params={"pruner": pruner, "allocation": "atp", "beta": beta}, distributions=KINDS,
        user_attrs=attrs,
    )  # fmt: skip
    made.number = number
    return made


def results(**attrs: Any) -> Results:
    uniform = trial(0, 0.0, [12.0, 0.5], nlls=UNIFORM, kls=[0.4, 0.5, 0.6], stderr=0.1)
    other = trial(1, 0.0, [13.0, 0.6], "magnitude", nlls=[4.0] * 3, kls=[0.9] * 3)
    best = trial(2, 0.1, [10.0, 0.3], nlls=ATP, kls=[0.2, 0.3, 0.4], stderr=0.2)
    stopped = trial(3, 0.2, [11.5, 0.4], nlls=[2.0], kls=[0.5], stopped_after=1)
    return Results({"dense": DENSE, **attrs}, [uniform, other, best, stopped], ("perplexity", "kl"))


def test_scores_are_the_values_of_trials_with_the_errors_of_their_items() -> None:
    found = results()
    _, _, best, stopped = found.trials
    one, two = (found.score(best, "validation", by) for by in (PERPLEXITY, KL))
    assert one and two and (one.value, one.stderr, two.value) == (10.0, 0.2, 0.3)
    assert two.stderr == pytest.approx(stdev([0.2, 0.3, 0.4]) / 3**0.5)
    dense = found.score("dense", "validation")
    assert dense and dense.value == pytest.approx(math.exp(fmean(DENSE)))
    assert found.score("dense", "validation", KL) is None and found.shown("dense", "validation", KL) == "0"
    told = found.score(stopped, "validation", KL)
    assert told and (told.value, told.stderr) == (0.4, 0)  # what it was estimated to be
    assert all(found.score(best, "test", by) is None for by in found.measures)
    assert found.measures == (PERPLEXITY, KL) and found.main is PERPLEXITY and found.counts == {"validation": 3}


def test_a_stopped_trial_that_stands_first_does_not_tell_the_number_of_items() -> None:
    stopped = trial(0, 0.2, [0.4], nlls=[1.0] * 10, ranks=[0] * 6 + [2] * 4, stopped_after=10)
    whole = trial(1, 0.1, [10.5 / 41], nlls=[1.0] * 40, ranks=[0] * 30 + [3] * 10)
    found = Results({}, [stopped, whole], ("accuracy",))
    told = found.score(stopped, "validation", ACCURACY)
    assert found.counts == {"validation": 40}
    assert told and told.value == pytest.approx(1 - (41 * 0.4 - 0.5) / 40)


def test_changes_are_paired_and_on_the_test_text_if_both_have_it() -> None:
    found = results()
    uniform, _, best, stopped = found.trials
    against = found.against_uniform(best)
    differences = [new - old for new, old in zip(ATP, UNIFORM, strict=True)]
    assert against and against.on == "validation" and str(against).endswith(" (validation)")
    assert against.change.value == pytest.approx(math.exp(fmean(differences)) - 1)
    assert found.uniform(best) == uniform and found.against_uniform(uniform) is None  # of its own pruner
    assert found.change("dense", stopped) is None  # not the same windows
    tested = results(test_nlls={"dense": [1.0, 2.0], "0": [2.0, 3.0], "2": [1.0, 3.0]}, test_kls={"2": [0.1, 0.2]})
    against = tested.against_uniform(tested.trials[2])
    assert against and against.on == "test" and against.change.value == pytest.approx(math.exp(-0.5) - 1)
    assert tested.against_uniform(tested.trials[2], KL) is None  # uniform has none there
    assert tested.score(tested.trials[2], "test", KL) == KL.score([0.1, 0.2])


def test_an_accuracy_is_of_its_ranks_or_of_the_value_that_was_told() -> None:
    told = trial(0, 0.0, [(1 + 0.5) / 5], nlls=[1.0] * 4, misses=[1, 0, 0, 0])
    ranked = trial(1, 0.1, [(2 + 0.5) / 5], nlls=[1.0] * 4, ranks=[3, 0, 1, 0])
    found = Results({"dense_ranks": [0, 0, 0, 5]}, [told, ranked], ("accuracy",))
    scores = [found.score(model, "validation", ACCURACY) for model in (told, ranked, "dense")]
    assert [score and score.value for score in scores] == [pytest.approx(0.75), 0.5, 0.75]
    assert found.data == found.words.unit == "images"
    perplexity = found.score(ranked, "validation")
    assert perplexity and perplexity.value == pytest.approx(math.e)


@pytest.mark.parametrize("name", MEASURES)
def test_rows_hold_every_measure_on_both_texts(name: str) -> None:
    found = Results({f"dense_{MEASURES[name].items}": [0, 1, 3], "dense": [0.5, 1.0]}, [], ("perplexity",))
    row = dict(found.record("dense"))
    assert {*row} >= {f"{prefix}{name}{end}" for prefix in ("", "test_") for end in ("", "_stderr")}
    scores = found.scores("dense")[name]
    assert [*scores] == [*TEXTS] and scores["test"] is None
    assert row[name] == (scores["validation"] and scores["validation"].value) is not None


def test_beside_dense_is_what_a_loop_counts() -> None:
    draw = torch.Generator().manual_seed(0)
    kls, same = torch.rand((3, 40), generator=draw), torch.rand((3, 40), generator=draw) < 0.7
    counted = torch.rand((3, 40), generator=draw) < 0.8
    parts = [(kls[:, :16], same[:, :16]), (kls[:, 16:], same[:, 16:])]
    for mask in (torch.ones_like(counted), counted):
        found = beside_dense(parts, mask)
        for row in range(3):
            kept = [k for k in range(40) if bool(mask[row, k])]
            expected = np.quantile([float(kls[row, k]) for k in kept], 0.99)
            assert found["kls_99"][row] == pytest.approx(expected, rel=1e-5)
            assert found["same_tops"][row] == pytest.approx(fmean(float(same[row, k]) for k in kept))
