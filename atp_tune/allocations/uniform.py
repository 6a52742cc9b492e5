"""Uniform: every block has the target sparsity, s_i = S."""

from atp_tune.allocations.budget import Budget, no_bounds, only_point

bounds, initial_points = no_bounds, only_point


def sparsities(budget: Budget) -> tuple[float, ...]:
    """One sparsity per block, all equal to the target S."""
    return (budget.target,) * len(budget.sizes)
