import math
import statistics

import pytest

from atp_tune.metrics.limits import excess
from atp_tune.metrics.perplexity import change, perplexity

DENSE = [3.0, 2.5, 3.5, 2.75]
PRUNED = [3.1, 2.75, 3.6, 2.9]


def test_an_increase_is_paired_and_taken_at_the_upper_end_of_its_error() -> None:
    differences = [new - old for old, new in zip(DENSE, PRUNED, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    upper = ratio * (1 + statistics.stdev(differences) / 2)  # √4 windows
    assert excess({"max_increase": 0.2}, DENSE, PRUNED) == pytest.approx(math.log(upper / 1.2))
    at_the_limit = change(DENSE, PRUNED).value + change(DENSE, PRUNED).stderr
    assert excess({"max_increase": at_the_limit}, DENSE, PRUNED) == pytest.approx(0, abs=1e-12)
    assert (excess({"max_increase": at_the_limit - 1e-4}, DENSE, PRUNED) or 0) > 0


def test_a_perplexity_is_an_increase_from_the_dense_one() -> None:
    most = perplexity(DENSE).value * 1.2
    found = excess({"max_perplexity": most}, DENSE, PRUNED)
    assert found == pytest.approx(excess({"max_increase": 0.2}, DENSE, PRUNED))


def test_a_kl_is_in_nats() -> None:
    kls = [0.1, 0.2, 0.3]
    assert excess({"max_kl": 0.25}, None, None, kls) == pytest.approx(0.2 + 0.1 / math.sqrt(3) - 0.25)


@pytest.mark.parametrize(
    ("limit", "dense", "nlls"),
    [("max_increase", None, PRUNED), ("max_increase", DENSE, None), ("max_increase", DENSE, PRUNED[:2])],
)
def test_what_is_not_measured_has_none(limit: str, dense: list[float] | None, nlls: list[float] | None) -> None:
    assert excess({limit: 0.1}, dense, nlls) is None
    assert excess({"max_kl": 0.1}, dense, nlls) is None


def test_an_infinite_perplexity_is_beyond_any_limit() -> None:
    assert excess({"max_increase": 0.1}, DENSE, [8000.0, *PRUNED[1:]]) == math.inf
