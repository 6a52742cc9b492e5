import itertools
import random

import pytest

from atp_tune.config.prune import Pattern, parse


def test_names() -> None:
    for text, pattern, sparsity in (
        ("unstructured", Pattern(), None),
        ("2:4", Pattern(4, 2), 0.5),
        ("4:8", Pattern(8, 4), 0.5),
        ("1:3", Pattern(3, 1), 1 / 3),
        ("mixed:8", Pattern(8), None),
        ("mixed:2", Pattern(2), None),
    ):
        assert parse(text) == pattern
        assert parse(text).sparsity == sparsity


def test_what_is_no_pattern() -> None:
    wrong = ("", "4:2", "2:2", "0:4", "2:0", "2:4:8", "mixed", "mixed:1", "mixed:0", "mixed:-8", " 2:4", "2:4\n", "n:m")
    for text in wrong:
        with pytest.raises(ValueError, match="must be unstructured, N:M with N < M as in 2:4, or mixed:M"):
            parse(text)


def mean(sparsities: tuple[float, ...], sizes: tuple[int, ...]) -> float:
    return sum(s * size for s, size in zip(sparsities, sizes, strict=True)) / sum(sizes)


def test_a_fixed_pattern_has_one_sparsity() -> None:
    assert Pattern(3, 1).round((0.3, 0.333333), (3, 4)) == (1 / 3, 1 / 3)


def test_largest_remainders_go_up() -> None:
    assert parse("mixed:8").round((0.40, 0.45, 0.50, 0.55, 0.60), (7,) * 5) == (0.375, 0.5, 0.5, 0.5, 0.625)
    assert parse("mixed:4").round((0.4,) * 5, (7,) * 5) == (0.25, 0.25, 0.5, 0.5, 0.5)
    assert parse("mixed:10").round((0.7, 0.3, 1.0, 0.0), (5, 6, 7, 8)) == (0.7, 0.3, 1.0, 0.0)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_no_rounding_of_equal_blocks_is_nearer(group: int) -> None:
    """Against all ways to round each block up or down."""
    draw = random.Random(group)
    for _ in range(50):
        exact = tuple(draw.random() for _ in range(6))
        rounded = parse(f"mixed:{group}").round(exact, (5,) * 6)
        ways = itertools.product(*[(int(s * group) / group, (int(s * group) + 1) / group) for s in exact])
        best = min(abs(mean(way, (5,) * 6) - mean(exact, (5,) * 6)) for way in ways)
        assert abs(mean(rounded, (5,) * 6) - mean(exact, (5,) * 6)) == pytest.approx(best)
        assert all(abs(a - b) < 1 / group and (a * group).is_integer() for a, b in zip(rounded, exact, strict=True))
