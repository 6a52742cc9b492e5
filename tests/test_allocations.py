import inspect
import itertools
import math
import random
from typing import get_args

import pytest

from atp_tune.allocations import ALLOCATIONS, Budget, atp, uniform
from atp_tune.study import AllocationName

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
    assert set(ALLOCATIONS) == set(get_args(AllocationName))


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
