import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import naive_allocations as naive
import pytest
from expect import parametrize, slow
from families import few

from atp_tune.allocations import ALLOCATIONS, Budget, LinearSparsities, Shape
from atp_tune.allocations.budget import level
from atp_tune.allocations.formulas import alphapruning, alphapruning_linear, atp, er, owl
from atp_tune.allocations.rows import RowSparsities

CASES = 200


def budgets() -> list[Budget]:
    generator = random.Random(0)
    return [
        Budget(
            generator.uniform(0.02, 0.98), tuple(generator.randint(1, 5000) for _ in range(generator.randint(2, 40)))
        )
        for _ in range(CASES)
    ]


def weighted(budget: Budget, sparsities: tuple[float, ...]) -> float:
    return math.fsum(s * size for s, size in zip(sparsities, budget.sizes, strict=True)) / sum(budget.sizes)


def admissible(budget: Budget, beta: float) -> bool:
    """The definition: every term of the progression around the weighted centre is a share."""
    centre = math.fsum(i * size for i, size in enumerate(budget.sizes)) / sum(budget.sizes)
    return all(0 <= budget.target + beta * (i - centre) <= 1 for i in range(len(budget.sizes)))


@parametrize(
    ("target", "blocks", "beta", "expected"),
    [
        (0.5, 3, 0.1, (0.4, 0.5, 0.6)),
        (0.7, 4, 0.2, (0.4, 0.6, 0.8, 1.0)),
        (0.3, 3, -0.3, (0.6, 0.3, 0.0)),
        (0.7, 5, 0.0, (0.7,) * 5),
    ],
)
def test_the_progression_of_equal_blocks(target: float, blocks: int, beta: float, expected: tuple[float, ...]) -> None:
    assert atp.sparsities(Budget(target, (64,) * blocks), beta) == pytest.approx(expected, abs=1e-15)


def test_sparsities_meet_the_target_in_order_and_stay_shares() -> None:
    generator = random.Random(1)
    for budget in budgets():
        low, high = atp.bounds(budget)["beta"]
        beta = generator.uniform(low, high)
        sparsities = atp.sparsities(budget, beta)
        assert len(sparsities) == len(budget.sizes)
        assert weighted(budget, sparsities) == pytest.approx(budget.target, abs=1e-12)
        assert budget.mean(sparsities) == pytest.approx(budget.target, abs=1e-12)
        assert all(0 <= s <= 1 for s in sparsities)
        steps = [after - before for before, after in itertools.pairwise(sparsities)]
        assert steps == pytest.approx([beta] * len(steps), abs=1e-12)


@parametrize("factor", [1 + 1e-6, 1.5, 1e6])
@parametrize("side", [0, 1])
def test_outside_the_bound(side: int, factor: float) -> None:
    for budget in budgets():
        beta = atp.bounds(budget)["beta"][side] * factor + math.copysign(1e-8, side - 0.5)
        with pytest.raises(ValueError, match="outside the admissible interval"):
            atp.sparsities(budget, beta)


def test_the_interval_is_the_largest() -> None:
    for budget in budgets():
        low, high = atp.bounds(budget)["beta"]
        assert admissible(budget, high * (1 - 1e-9)) and admissible(budget, low * (1 - 1e-9))
        assert not admissible(budget, high * (1 + 1e-6)) and not admissible(budget, low * (1 + 1e-6))


# Rivals


@dataclass(frozen=True)
class Given:
    """Evidence that is made up."""

    ratios: tuple[float, ...] = ()
    exponents: tuple[tuple[float, ...], ...] = ()
    shares: LinearSparsities = ()
    priced: LinearSparsities = ()

    def outlier_ratios(self, threshold: float) -> tuple[float, ...]:
        return tuple(ratio / threshold for ratio in self.ratios)

    def tail_exponents(self, start: str = "peak") -> tuple[tuple[float, ...], ...]:
        return self.exponents

    def global_sparsities(self, target: float, score: str) -> LinearSparsities:
        return self.shares

    def by_prices(self, target: float, pruner: str, rows: bool) -> RowSparsities:
        return RowSparsities(self.priced)


def anywhere(linears: tuple[tuple[Shape, ...], ...], target: float, generator: random.Random) -> LinearSparsities:
    """Sparsities of linears whose mean by size is the target."""
    sizes = [shape.size for block in linears for shape in block]
    drawn = [generator.gauss(target, 0.3) for _ in sizes]
    excess = math.fsum(s * size for s, size in zip(drawn, sizes, strict=True)) / sum(sizes) - target
    flat = iter(level([s - excess for s in drawn], sizes, target))
    return tuple(tuple(next(flat) for _ in block) for block in linears)


def measured_budgets() -> list[Budget]:
    """Blocks of one to five linears of any shape, with extreme measurements."""
    generator = random.Random(2)

    def budget() -> Budget:
        linears = tuple(
            tuple(
                Shape(generator.randint(1, 90), generator.randint(1, 90), False) for _ in range(generator.randint(1, 5))
            )
            for _ in range(generator.randint(1, 30))
        )
        target = generator.choice([generator.random(), generator.random() ** 9, 1 - generator.random() ** 9, 0.0, 1.0])
        metrics = Given(
            tuple(generator.expovariate(50) for _ in linears),
            tuple(tuple(1 + generator.expovariate(0.3) for _ in block) for block in linears),
            priced=anywhere(linears, target, random.Random(5)),
        )
        return Budget(target, tuple(sum(s.size for s in block) for block in linears), linears, metrics)

    return [budget() for _ in range(CASES)]


def drawn(budget: Budget, name: str, generator: random.Random) -> dict[str, float]:
    """Parameters anywhere in their intervals, ends included."""
    return {
        parameter: generator.choice([low, high, generator.uniform(low, high)])
        for parameter, (low, high) in ALLOCATIONS[name].bounds(budget).items()
    }


def by_linear(budget: Budget, sparsities: Any) -> list[tuple[float, int]]:
    """Sparsity and size of each linear, however they are given."""
    rows = [
        s if isinstance(s, tuple) else (s,) * len(block) for s, block in zip(sparsities, budget.linears, strict=True)
    ]
    return [
        (s, shape.size)
        for row, block in zip(rows, budget.linears, strict=True)
        for s, shape in zip(row, block, strict=True)
    ]


@parametrize("name", few([name for name in ALLOCATIONS if name != "global"], ["owl", "gradient", "gradient-rows"]))
def test_every_allocation_meets_every_target_with_shares(name: str) -> None:
    generator = random.Random(3)
    for budget in measured_budgets():
        given = by_linear(budget, ALLOCATIONS[name].sparsities(budget, **drawn(budget, name, generator)))
        assert all(0 <= s <= 1 for s, _ in given)
        assert math.fsum(s * size for s, size in given) / sum(budget.sizes) == pytest.approx(budget.target, abs=1e-9)


@parametrize("name", ["owl", "alphapruning", "alphapruning-linear", "gradient", "gradient-rows", "global"])
def test_what_is_measured_needs_a_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: needs a model to measure"):
        ALLOCATIONS[name].sparsities(Budget(0.5, (3, 4)))


@slow
def test_owl_is_the_formula() -> None:
    generator = random.Random(4)
    for budget in measured_budgets():
        if len(budget.sizes) == 1:
            continue
        values = drawn(budget, "owl", generator)
        ratios = [ratio / values["M"] for ratio in budget.dense_metrics.ratios]  # type: ignore[union-attr]
        expected = naive.owl(ratios, budget.sizes, budget.target, values["lam"])
        assert owl.sparsities(budget, **values) == pytest.approx(expected, abs=1e-12)


@parametrize(("target", "high"), [(0.5, 0.2), (0.7, 0.15), (0.9, 0.05), (0.1, 0.05), (1.0, 0.0)])
def test_the_bound_of_lambda(target: float, high: float) -> None:
    bounds = owl.bounds(Budget(target, (1, 10**9)))
    assert bounds == {"M": (3.0, 10.0), "lam": (min(0.02, high), pytest.approx(high))}
    extreme = Budget(target, (1, 10**9), dense_metrics=Given((1.0, 0.0)))
    assert all(0 <= s <= 1 for s in owl.sparsities(extreme, lam=bounds["lam"][1]))


@parametrize("name", ["owl", "alphapruning"])
def test_blocks_that_do_not_differ_get_the_target(name: str) -> None:
    budget = Budget(0.6, (1, 20, 3), dense_metrics=Given((0.02,) * 3, ((2.0, 4.0), (3.0,), (4.0, 2.0))))
    assert ALLOCATIONS[name].sparsities(budget) == (0.6, 0.6, 0.6)


@slow
def test_alphapruning_is_the_map_with_a_cap() -> None:
    generator, capped = random.Random(5), 0
    for budget in measured_budgets():
        if len(budget.sizes) == 1 or budget.target in (0, 1):
            continue
        epsilon = generator.uniform(0, 0.5)
        exponents = budget.dense_metrics.exponents  # type: ignore[union-attr]
        expected = naive.alphapruning(exponents, budget.sizes, budget.target, epsilon)
        assert alphapruning.sparsities(budget, epsilon) == pytest.approx(expected, abs=1e-12)
        capped += max(expected) == 1
    assert capped > 10  # or the cap was not tried


@slow
def test_alphapruning_by_linear_is_the_map_with_a_cap() -> None:
    """The authors' map over all linears, whatever their blocks."""
    generator, capped = random.Random(5), 0
    for budget in measured_budgets()[:60]:
        exponents = [a for block in budget.dense_metrics.exponents for a in block]  # type: ignore[union-attr]
        if len(exponents) == 1 or budget.target in (0, 1):
            continue
        epsilon, sizes = generator.uniform(0, 0.5), tuple(s.size for block in budget.linears for s in block)
        found = by_linear(budget, alphapruning_linear.sparsities(budget, epsilon))
        expected = naive.alphapruning([[a] for a in exponents], sizes, budget.target, epsilon)
        assert [s for s, _ in found] == pytest.approx(expected, abs=1e-12)
        capped += max(expected) == 1
    assert capped > 3  # or the cap was not tried


@slow
def test_erdos_renyi_by_bisection() -> None:
    dense = 0
    for budget in measured_budgets():
        if budget.target in (0, 1):
            continue
        shapes = [(shape.rows, shape.columns) for block in budget.linears for shape in block]
        found = [s for s, _ in by_linear(budget, er.sparsities(budget))]
        assert found == pytest.approx(naive.er(shapes, budget.target), abs=1e-12)
        dense += min(found) == 0 < max(found)
    assert dense > 10  # or linears at the bound were not tried
