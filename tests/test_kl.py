import math
from statistics import fmean

import pytest

from atp_tune.measures import Divergence, relative

BEFORE, AFTER = [0.4, 0.6, 0.5, 0.9], [0.3, 0.5, 0.45, 0.6]


def test_mean_and_standard_error() -> None:
    found = Divergence.mean(BEFORE)
    assert found.value == pytest.approx(0.6)
    assert found.stderr == pytest.approx(math.sqrt(sum((k - 0.6) ** 2 for k in BEFORE) / 3 / 4))
    assert str(found) == "0.6000 ± 0.1080"
    assert Divergence.mean([0.25]).stderr == 0


def test_a_relative_change_is_paired_by_windows() -> None:
    found = relative(BEFORE, AFTER)
    assert found
    assert found.value == pytest.approx(fmean(AFTER) / fmean(BEFORE) - 1)
    assert found.stderr < Divergence.mean(AFTER).stderr / fmean(BEFORE)  # what the windows share falls out
    scaled = relative(BEFORE, [0.8 * k for k in BEFORE])
    assert scaled
    assert (scaled.value, scaled.stderr) == (pytest.approx(-0.2), pytest.approx(0, abs=1e-12))


def test_its_error_is_that_of_leaving_windows_out() -> None:
    """The jackknife, which knows nothing of the formula, comes to nearly the same with many windows."""
    before = [0.5 + 0.3 * math.sin(k) for k in range(200)]
    after = [0.8 * k + 0.05 * math.cos(3 * i) for i, k in enumerate(before)]
    found, n = relative(before, after), len(before)
    assert found
    left = [fmean(after[:k] + after[k + 1 :]) / fmean(before[:k] + before[k + 1 :]) - 1 for k in range(n)]
    jackknife = math.sqrt((n - 1) / n * sum((one - fmean(left)) ** 2 for one in left))
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
