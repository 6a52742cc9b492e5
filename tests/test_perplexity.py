import math
import statistics

import pytest
from expect import parametrize

from atp_tune.measures import Change, Perplexity, change, perplexity


def test_the_exponential_of_the_mean() -> None:
    assert perplexity([math.log(8.0), math.log(2.0)]).value == pytest.approx(4.0)


def test_the_error_is_by_the_delta_method() -> None:
    nlls = [1.0, 2.0, 4.0, 4.5]
    expected = math.exp(2.875) * statistics.stdev(nlls) / 2
    assert perplexity(nlls).stderr == pytest.approx(expected)


def test_the_error_is_the_spread_of_perplexities_over_texts() -> None:
    """One standard error of the mean NLL, pushed through exp, as a number."""
    nlls = [2.0 + 0.001 * k for k in range(-50, 51)]
    shift = statistics.stdev(nlls) / math.sqrt(len(nlls))
    result = perplexity(nlls)
    assert math.exp(2.0 + shift) - result.value == pytest.approx(result.stderr, rel=0.01)


@parametrize("nlls", [[800.0, 900.0], [701.0], [math.inf, 1.0], [math.nan, 1.0], [math.nan]])
def test_what_overflows_or_is_not_defined_is_infinite(nlls: list[float]) -> None:
    assert perplexity(nlls) == Perplexity(value=math.inf, stderr=math.inf)


def test_a_change_is_paired_by_windows() -> None:
    """Windows differ a lot, the two models by the same little in each: the change is known much better than either."""
    before = [1.0, 3.0, 2.0, 4.0]
    after = [nll + 0.1 + 0.001 * k for k, nll in enumerate(before)]
    found = change(before, after)
    assert found.value == pytest.approx(math.exp(0.1015) - 1)
    assert found.stderr == pytest.approx(math.exp(0.1015) * statistics.stdev([0.0, 0.001, 0.002, 0.003]) / 2)
    assert found.stderr < 0.01 * perplexity(before).stderr / perplexity(before).value
    assert str(found) == "+10.7% ± 0.1%"
    with pytest.raises(ValueError, match="zip"):
        change(before, after[:3])


@parametrize(("value", "windows", "expected"), [(-0.036, 4, True), (-0.08, 4, False), (-0.05, 1, False)])
def test_a_change_within_its_interval_may_be_chance(value: float, windows: int, expected: bool) -> None:
    """t(3) is 3.18: ± 2.2 % over 4 windows reaches 7 %."""
    assert Change(value=value, stderr=0.022).may_be_chance(windows) == expected
    assert not Change(value=0.01, stderr=0.0).may_be_chance(windows)
