"""Allocations: how a sparsity target is shared out over the blocks.

An allocation is one module with two functions and one row of `ALLOCATIONS`:

    bounds(budget)                  the admissible interval of each of its parameters
    starts(budget)                  the points that a search begins with: the authors' defaults
    sparsities(budget, **values)    one sparsity per block, or per linear of each block, in [0, 1], whose weighted
                                    mean is the target
"""

from collections.abc import Callable
from typing import Protocol

from atp_tune.allocations import alphapruning, atp, curve, er, global_, owl, uniform
from atp_tune.allocations.budget import Budget, Evidence, LinearSparsities, Shape, Sparsities

__all__ = ["ALLOCATIONS", "Allocation", "Budget", "Evidence", "LinearSparsities", "Shape", "Sparsities"]


class Allocation(Protocol):
    """What every module of this package offers."""

    def bounds(self, budget: Budget) -> dict[str, tuple[float, float]]:
        """The interval of each parameter in which all sparsities are in [0, 1]."""

    def starts(self, budget: Budget) -> list[dict[str, float]]:
        """The points that a search begins with."""

    @property
    def sparsities(self) -> Callable[..., Sparsities]:
        """From a budget and the parameters: the sparsities; ValueError outside the bounds."""


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "atp": atp,
    "curve": curve,
    "owl": owl,
    "alphapruning": alphapruning,
    "er": er,
    "erk": er,
    "global": global_,
}
