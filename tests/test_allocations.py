import inspect
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import Any

import naive_allocations as naive
import pytest
from families import few
from pydantic import ValidationError

from atp_tune.allocations import ALLOCATIONS, Budget, LinearSparsities, Shape
from atp_tune.allocations.budget import level, proportional
from atp_tune.allocations.formulas import alphapruning, alphapruning_linear, atp, er, owl, uniform
from atp_tune.allocations.rows import RowSparsities
from atp_tune.config.study import AllocationConfig

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
    zeros = math.fsum(s * size for s, size in zip(sparsities, budget.sizes, strict=True))
    return zeros / sum(budget.sizes)


def admissible(budget: Budget, beta: float) -> bool:
    """The definition: every term of the progression around the weighted centre is a share."""
    centre = math.fsum(i * size for i, size in enumerate(budget.sizes)) / sum(budget.sizes)
    return all(0 <= budget.target + beta * (i - centre) <= 1 for i in range(len(budget.sizes)))


def test_the_table_is_what_a_study_may_name() -> None:
    names = tuple(ALLOCATIONS)
    assert names[:6] == ("uniform", "atp", "curve", "owl", "alphapruning", "alphapruning-linear")
    assert names[6:11] == ("er", "erk", "gradient", "gradient-rows", "global")
    assert AllocationConfig(names=names).names == names
    with pytest.raises(ValidationError, match=r"Input should be 'uniform', .* or 'global'"):
        AllocationConfig(names=("none",))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_bounds_name_the_parameters(name: str) -> None:
    allocation = ALLOCATIONS[name]
    parameters = list(inspect.signature(allocation.sparsities).parameters)
    assert parameters[0] == "budget"
    assert list(allocation.bounds(Budget(0.5, (3, 4, 5)))) == parameters[1:]


def test_uniform_gives_every_block_the_target() -> None:
    budget = Budget(0.37, (1, 20, 3))
    assert uniform.sparsities(budget) == (0.37, 0.37, 0.37)
    assert uniform.bounds(budget) == {}


def test_the_mean_of_a_budget_is_weighted() -> None:
    assert Budget(0.5, (1, 3)).mean((0.0, 1.0)) == 0.75
    assert Budget(0.5, (1, 3)).centre == 0.75
    assert Budget(0.5, (7,) * 5).centre == 2


def test_a_mean_needs_one_sparsity_per_block() -> None:
    with pytest.raises(ValueError, match="argument"):
        Budget(0.5, (1, 3)).mean((0.5,))


@pytest.mark.parametrize(
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


@pytest.mark.parametrize("target", [0.1, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("blocks", [2, 3, 32, 80])
def test_the_bound_of_equal_blocks(target: float, blocks: int) -> None:
    low, high = atp.bounds(Budget(target, (8,) * blocks))["beta"]
    assert high == pytest.approx(2 * min(target, 1 - target) / (blocks - 1), rel=1e-12)
    assert low == -high


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


@pytest.mark.parametrize("side", [0, 1])
def test_at_the_bound_one_end_is_dense_or_empty(side: int) -> None:
    for budget in budgets():
        sparsities = atp.sparsities(budget, atp.bounds(budget)["beta"][side])
        assert min(*sparsities, 1 - max(sparsities)) == pytest.approx(0, abs=1e-12)
        assert all(0 <= s <= 1 for s in sparsities)
        assert weighted(budget, sparsities) == pytest.approx(budget.target, abs=1e-12)


@pytest.mark.parametrize("factor", [1 + 1e-6, 1.5, 1e6])
@pytest.mark.parametrize("side", [0, 1])
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


def test_one_block_has_nothing_to_share_out() -> None:
    budget = Budget(0.7, (10,))
    assert atp.bounds(budget) == {"beta": (0.0, 0.0)}
    assert atp.sparsities(budget, 0.0) == (0.7,)
    with pytest.raises(ValueError, match="outside"):
        atp.sparsities(budget, 0.1)


def test_not_a_number_is_not_admissible() -> None:
    with pytest.raises(ValueError, match="outside"):
        atp.sparsities(Budget(0.5, (1, 1)), math.nan)


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

    def priced_sparsities(self, target: float, pruner: str) -> LinearSparsities:
        return self.priced

    def row_priced_sparsities(self, target: float, pruner: str) -> RowSparsities:
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


@pytest.mark.parametrize(
    "name", few([name for name in ALLOCATIONS if name != "global"], ["owl", "gradient", "gradient-rows"])
)
def test_every_allocation_meets_every_target_with_shares(name: str) -> None:
    generator = random.Random(3)
    for budget in measured_budgets():
        given = by_linear(budget, ALLOCATIONS[name].sparsities(budget, **drawn(budget, name, generator)))
        assert all(0 <= s <= 1 for s, _ in given)
        assert math.fsum(s * size for s, size in given) / sum(budget.sizes) == pytest.approx(budget.target, abs=1e-9)


def admissible_of(budget: Budget, name: str) -> dict[str, tuple[float, float]]:
    """Where the sparsities are shares; the authors' intervals, which are searched, are narrower."""
    if name == "owl":
        return {"M": (0.0, math.inf), "lam": (0.0, min(budget.target, 1 - budget.target) / 2)}
    return {"epsilon": (0.0, 1.0)} if name.startswith("alphapruning") else ALLOCATIONS[name].bounds(budget)


@pytest.mark.parametrize("name", few(ALLOCATIONS, ["owl"]))
def test_outside_an_interval(name: str) -> None:
    for budget in measured_budgets()[:20]:
        bounds = ALLOCATIONS[name].bounds(budget)
        inside = {parameter: high for parameter, (_, high) in bounds.items()}
        for parameter, (low, high) in admissible_of(budget, name).items():
            assert low <= bounds[parameter][0] <= bounds[parameter][1] <= high
            for value in (low - 1e-6, high + 1e-6, math.nan):
                if value == math.inf:
                    continue
                with pytest.raises(ValueError, match="is outside the admissible interval"):
                    ALLOCATIONS[name].sparsities(budget, **inside | {parameter: value})


@pytest.mark.parametrize("name", ["owl", "alphapruning", "alphapruning-linear", "gradient", "gradient-rows", "global"])
def test_what_is_measured_needs_a_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: needs a model to measure"):
        ALLOCATIONS[name].sparsities(Budget(0.5, (3, 4)))


@pytest.mark.slow
def test_owl_is_the_formula() -> None:
    generator = random.Random(4)
    for budget in measured_budgets():
        if len(budget.sizes) == 1:
            continue
        values = drawn(budget, "owl", generator)
        ratios = [ratio / values["M"] for ratio in budget.dense_metrics.ratios]  # type: ignore[union-attr]
        expected = naive.owl(ratios, budget.sizes, budget.target, values["lam"])
        assert owl.sparsities(budget, **values) == pytest.approx(expected, abs=1e-12)


def test_owl_of_a_few_blocks() -> None:
    """By hand: n = 1, 0, 0.5 with mean 0.5; the most outliers, the densest."""
    budget = Budget(0.7, (10, 10, 10), dense_metrics=Given((0.09, 0.01, 0.05)))
    assert owl.sparsities(budget) == pytest.approx((0.62, 0.78, 0.7), abs=1e-12)
    assert owl.sparsities(budget, M=3.0, lam=0.15) == pytest.approx((0.55, 0.85, 0.7), abs=1e-12)


@pytest.mark.parametrize(("target", "high"), [(0.5, 0.2), (0.7, 0.15), (0.9, 0.05), (0.1, 0.05), (1.0, 0.0)])
def test_the_bound_of_lambda(target: float, high: float) -> None:
    bounds = owl.bounds(Budget(target, (1, 10**9)))
    assert bounds == {"M": (3.0, 10.0), "lam": (min(0.02, high), pytest.approx(high))}
    extreme = Budget(target, (1, 10**9), dense_metrics=Given((1.0, 0.0)))
    assert all(0 <= s <= 1 for s in owl.sparsities(extreme, lam=bounds["lam"][1]))


@pytest.mark.parametrize("name", ["owl", "alphapruning"])
def test_blocks_that_do_not_differ_get_the_target(name: str) -> None:
    budget = Budget(0.6, (1, 20, 3), dense_metrics=Given((0.02,) * 3, ((2.0, 4.0), (3.0,), (4.0, 2.0))))
    assert ALLOCATIONS[name].sparsities(budget) == (0.6, 0.6, 0.6)


@pytest.mark.slow
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


def test_alphapruning_of_a_few_blocks() -> None:
    """By hand: w = 0.7, 1.3, 1.0 and c = 0.6; at 0.9 the second block is full and c = 1.7 / 1.7."""
    metrics = Given(exponents=((1.0, 3.0), (6.0, 6.0), (4.0, 4.0)))
    budget = Budget(0.6, (10, 10, 10), dense_metrics=metrics)
    assert alphapruning.sparsities(budget) == pytest.approx((0.42, 0.78, 0.6), abs=1e-12)
    assert alphapruning.sparsities(replace(budget, target=0.9)) == pytest.approx((0.7, 1.0, 1.0), abs=1e-12)


@pytest.mark.slow
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


def test_linears_that_do_not_differ_get_the_target() -> None:
    linears = ((Shape(2, 3, True),), (Shape(4, 5, True), Shape(6, 7, False)))
    budget = Budget(0.6, (6, 62), linears, Given((), ((2.0,), (2.0, 2.0))))
    assert alphapruning_linear.sparsities(budget) == (0.6, 0.6)


@pytest.mark.slow
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


def test_erdos_renyi_of_a_few_linears() -> None:
    """By hand: (r + c) / (r c) = 3/4 and 5/16 on 8 and 64 weights keep 6 c + 20 c = 26 c of 72."""
    budget = Budget(1 - 26 / 72, (72,), ((Shape(2, 4, True), Shape(4, 16, False)),))
    assert er.sparsities(budget) == (pytest.approx((0.25, 0.6875), abs=1e-12),)
    fuller = replace(budget, target=1 - 40 / 72)  # the first would keep more than it has
    assert er.sparsities(fuller) == (pytest.approx((0.0, 0.5), abs=1e-12),)
    assert ALLOCATIONS["erk"] is ALLOCATIONS["er"]


def test_global_is_what_was_measured() -> None:
    budget = Budget(0.5, (3, 4), dense_metrics=Given(shares=((0.5,), (0.25, 1.0))))
    assert ALLOCATIONS["global"].sparsities(budget) == ((0.5,), (0.25, 1.0))


def test_shares_in_proportion() -> None:
    assert proportional([1, 3], [2, 2], 0.5) == (0.25, 0.75)
    assert proportional([1, 9], [2, 2], 0.75) == (0.5, 1.0)
    assert proportional([1, 9, 2], [1, 1, 1], 1.0) == (1.0, 1.0, 1.0)
    assert proportional([1, 9], [1, 1], 0.0) == (0.0, 0.0)
