"""Uniform allocation: every block gets the target, s_i = S."""

from atp_tune.allocations.budget import Budget


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """Uniform has no parameters."""
    return {}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """Its only point."""
    return [{}]


def sparsities(budget: Budget) -> tuple[float, ...]:
    """One sparsity per block, all equal to the target S."""
    return (budget.target,) * len(budget.sizes)
