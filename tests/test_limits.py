import math
import random
import re
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expect import parametrize

from atp_tune.measures import (
    Divergence,
    Estimate,
    Limit,
    accuracy,
    change,
    difference,
    error_of_gain,
    error_of_share,
    error_rate,
    excess,
    gain,
    interval_factor,
    knee,
    perplexity,
    relative,
)
from atp_tune.report.formats import measure

DENSE = [3.0, 2.5, 3.5, 2.75]
PRUNED = [3.1, 2.75, 3.6, 2.9]


def test_an_increase_is_paired_and_taken_at_the_upper_end_of_its_error() -> None:
    differences = [new - old for old, new in zip(DENSE, PRUNED, strict=True)]
    upper = math.exp(statistics.fmean(differences)) * (1 + statistics.stdev(differences) / 2)  # √4 windows
    assert excess({"max_increase": 0.2}, DENSE, PRUNED) == pytest.approx(math.log(upper / 1.2))
    at_the_limit = change(DENSE, PRUNED).value + change(DENSE, PRUNED).stderr
    assert excess({"max_increase": at_the_limit}, DENSE, PRUNED) == pytest.approx(0, abs=1e-12)
    assert (excess({"max_increase": at_the_limit - 1e-4}, DENSE, PRUNED) or 0) > 0


# Every standard error of the package, of n equal values, or of n pairs that are equal.
ERRORS: dict[str, Callable[[int], Any]] = {
    "perplexity": lambda n: perplexity([3.0] * n),
    "change of perplexity": lambda n: change([3.0] * n, [3.0] * n),
    "same change of all windows": lambda n: change([3.0, 2.0][:n] * n, [3.1, 2.1][:n] * n),
    "KL": lambda n: Divergence.mean([0.25] * n),
    "change of KL": lambda n: relative([0.25] * n, [0.25] * n),
    "accuracy, all right": lambda n: accuracy([0] * n),
    "accuracy, all wrong": lambda n: accuracy([3] * n),
    "error rate": lambda n: error_rate([0] * n),
    "error rate of a stopped trial": lambda n: error_rate([1.0], n),
    "gain of accuracy": lambda n: gain([0] * n, [0] * n),
    "all become right": lambda n: gain([1] * n, [0] * n),
    "score of a task": lambda n: difference([1.0] * n, [1.0] * n),
    "score of a task that is no share": lambda n: difference([2.0] * n, [2.0] * n),
}


@parametrize("windows", [1, 2, 24])
@parametrize("name", ERRORS)
def test_no_error_is_zero(name: str, windows: int) -> None:
    """An error of 0, since nothing changed or one window was there, was printed, and a limit was met by it."""
    found = ERRORS[name](windows)
    said = str(found) if isinstance(found, Estimate) else measure(found, "perplexity")
    assert not re.search(r"± 0[.0]*(%| |$)", said)
    if isinstance(found, Estimate):
        error = found.model_dump(mode="json")["stderr"]
        assert error is None or error > 0
        assert ("±" in said) == (error is not None)
        assert type(found).model_validate_json(found.model_dump_json()) == found


@parametrize(
    ("limit", "numbers"),
    [
        ({"max_increase": 0.05}, {"dense": [3.0], "nlls": [3.0478]}),
        ({"max_perplexity": 100.0}, {"dense": [3.0], "nlls": [3.0]}),
        ({"max_kl": 0.1}, {"dense": None, "nlls": None, "kls": [0.01]}),
        ({"max_drop": 0.1}, {"dense": None, "nlls": None, "ranks": ([0], [0])}),
    ],
)
def test_one_window_is_within_no_limit(limit: Limit, numbers: dict[str, Any]) -> None:
    assert (excess(limit, **numbers) or 0) > 0


@parametrize(("images", "drop", "limit"), [(100, 0.01, 0.005), (100, 0.015, 0.01), (1000, 0.002, 0.001)])
def test_a_drop_beyond_its_limit_is_seldom_within(images: int, drop: float, limit: float) -> None:
    """Where no answer had changed, which was so in 22 to 37 % of all, the drop was 0 ± 0, and within any limit."""
    wrong = np.random.default_rng(0).binomial(images, drop, 4000)  # none becomes right
    ranks = {k: ([0] * images, [1] * k + [0] * (images - k)) for k in set(wrong)}
    found = {k: excess({"max_drop": limit}, None, None, ranks=both) for k, both in ranks.items()}
    assert np.mean([(found[k] or 0) <= 0 for k in wrong]) < 0.23


@parametrize(("images", "better", "worse"), [(50, 0.0, 0.01), (100, 0.02, 0.02), (300, 0.0, 0.05), (40, 0.3, 0.1)])
def test_intervals_of_hits_hold_what_they_say(images: int, better: float, worse: float) -> None:
    """Of the paired difference, and nearly of a share near 0; sd / √n holds the first difference in 40 %."""
    drawn = np.random.default_rng(1).multinomial(images, [better, worse, 1 - better - worse], 4000)
    pairs = {(int(b), int(c)) for b, c, _ in drawn}
    errors = {(b, c): error_of_gain([1] * b + [-1] * c + [0] * (images - b - c)) for b, c in pairs}
    reach = interval_factor(images)
    gains = [abs((b - c) / images - (better - worse)) <= reach * errors[b, c] for b, c, _ in drawn]
    shares = [abs(c / images - worse) <= reach * error_of_share(c, images) for _, c, _ in drawn]
    assert np.mean(gains) > 0.93 and np.mean(shares) > 0.85


@parametrize("seed", range(20))
def test_the_knee_is_the_point_furthest_from_the_chord(seed: int) -> None:
    """By the distance of each point from the line in the unit square, as Kneedle has it."""
    draw = random.Random(seed)
    xs, ys = (sorted(draw.sample(range(1000), 3 + seed % 7)) for _ in range(2))
    found, naive, most = knee([*zip(xs, ys, strict=True)]), None, 0.0
    for k, (x, y) in enumerate(zip(xs, ys, strict=True)):
        across, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        if (distance := (across - up) / math.sqrt(2)) > most + 1e-12:
            naive, most = k, distance
    assert found == naive
    assert knee([(0.0, 0.0), (1.0, 1.0)]) is None
