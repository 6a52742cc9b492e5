import itertools
import math
import random

import pytest
from expect import parametrize

from atp_tune.allocations import Budget, Shape
from atp_tune.allocations.formulas import atp, curve

NAMES = ["beta", "gamma", "ends", "split", "value"]
ZERO = dict.fromkeys(NAMES, 0.0)
LLAMA = (
    Shape(24, 24, True),
    Shape(8, 24, True),
    Shape(8, 24, True, value=True),
    Shape(24, 24, True),
    Shape(64, 24, False),
    Shape(64, 24, False),
    Shape(24, 64, False),
)


def budget_of(target: float, linears: list[tuple[Shape, ...]]) -> Budget:
    return Budget(target, tuple(sum(shape.size for shape in row) for row in linears), tuple(linears))


def budgets() -> list[Budget]:
    """Targets and depths of all kinds; in every third model each block has its own width."""
    generator = random.Random(0)
    found = []
    for k in range(60):
        widths = [generator.randint(1, 5) if k % 3 == 0 else 1 for _ in range(generator.randint(2, 30))]
        rows = [tuple(Shape(s.rows * w, s.columns, s.attention, s.value) for s in LLAMA) for w in widths]
        found.append(budget_of(generator.uniform(0.05, 0.95), rows))
    return found


def as_linears(budget: Budget, values: dict[str, float]) -> list[list[float]]:
    """One sparsity per linear, also where the allocation gives one per block."""
    shared = curve.sparsities(budget, **values)
    return [list(s) if isinstance(s, tuple) else [s] * len(row) for s, row in zip(shared, budget.linears, strict=True)]


def naive(budget: Budget, beta: float, gamma: float, ends: float, split: float, value: float) -> list[list[float]]:
    """The equation of the docstring, term by term, before anything is cut off."""
    last = len(budget.sizes) - 1
    terms = []
    for i, row in enumerate(budget.linears):
        u = 2 * i / last - 1
        e = {0: 1.0, last: 0.5}.get(i, 0.0)
        terms.append(
            [beta * i + gamma * u * u + ends * e + split * shape.attention + value * shape.value for shape in row]
        )
    flat = [
        (term, shape.size) for row, shapes in zip(terms, budget.linears, strict=True)
        for term, shape in zip(row, shapes, strict=True)
    ]  # fmt: skip
    mean = math.fsum(term * size for term, size in flat) / sum(size for _, size in flat)
    return [[budget.target + term - mean for term in row] for row in terms]


def weighted(budget: Budget, rows: list[list[float]]) -> float:
    pairs = [(s, shape.size) for row, shapes in zip(rows, budget.linears, strict=True)
             for s, shape in zip(row, shapes, strict=True)]  # fmt: skip
    return math.fsum(s * size for s, size in pairs) / sum(size for _, size in pairs)


def test_all_zero_is_uniform_and_beta_alone_is_atp_to_the_last_bit() -> None:
    for budget in budgets():
        assert curve.sparsities(budget, **ZERO) == (budget.target,) * len(budget.sizes)
        for share in (-1, -0.3, 0.5, 1):
            beta = atp.bounds(budget)["beta"][1 if share > 0 else 0] * abs(share)
            assert curve.sparsities(budget, **{**ZERO, "beta": beta}) == atp.sparsities(budget, beta)


def test_corners_keep_the_mean_and_the_order() -> None:
    """Where all terms are at their ends, values are cut off and shifted, never swapped."""
    budget = budget_of(0.6, [LLAMA] * 12)
    for corner in itertools.product(*curve.bounds(budget).values()):
        values = dict(zip(NAMES, corner, strict=True))
        rows, wanted = as_linears(budget, values), naive(budget, **values)
        assert weighted(budget, rows) == pytest.approx(0.6, abs=1e-9)
        own = [s for row in rows for s in row]
        asked = [s for row in wanted for s in row]
        order = sorted(range(len(asked)), key=lambda k: asked[k])
        assert all(own[a] <= own[b] + 1e-12 for a, b in itertools.pairwise(order))


@parametrize(
    ("name", "expected"),
    [("gamma", (-0.2, 0.2)), ("split", (-0.2, 0.2)), ("ends", (-0.4, 0.0)), ("value", (-0.4, 0.0))],
)
@parametrize("target", [0.6, 0.4])
def test_intervals_come_from_the_nearer_wall(name: str, expected: tuple[float, float], target: float) -> None:
    assert curve.bounds(budget_of(target, [LLAMA] * 5))[name] == pytest.approx(expected)


def test_terms_that_a_model_has_no_place_for() -> None:
    fused = (Shape(72, 24, True), Shape(24, 24, True), Shape(96, 24, False))
    assert curve.bounds(budget_of(0.6, [fused] * 5))["value"] == (0.0, 0.0)
    assert curve.bounds(budget_of(0.6, [LLAMA[4:]] * 5))["split"] == (0.0, 0.0)
    two = curve.bounds(budget_of(0.6, [LLAMA] * 2))
    assert (two["gamma"], two["ends"]) == ((0.0, 0.0), (0.0, 0.0))
    assert curve.bounds(Budget(0.6, (10,)))["beta"] == (0.0, 0.0)
    assert curve.sparsities(Budget(0.6, (10,)), **ZERO) == (0.6,)
