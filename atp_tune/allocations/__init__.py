"""Allocations: how a sparsity target is shared out over the blocks.

An allocation is one module with two functions and one row of `ALLOCATIONS`:

    bounds(budget)                  the admissible interval of each of its parameters
    sparsities(budget, **values)    one sparsity per block, in [0, 1], whose weighted mean is the target
"""

from typing import Protocol

from atp_tune.allocations import atp, uniform
from atp_tune.allocations.budget import Budget

__all__ = ["ALLOCATIONS", "Allocation", "Budget"]


class Allocation(Protocol):
    """What every module of this package offers."""

    @staticmethod
    def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
        """The interval of each parameter in which all sparsities are in [0, 1]."""

    @staticmethod
    def sparsities(budget: Budget, **parameters: float) -> tuple[float, ...]:
        """One sparsity per block; ValueError outside the bounds."""


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "atp": atp,
}
