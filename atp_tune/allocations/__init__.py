"""Allocations: how a sparsity target is shared out over the blocks.

An allocation is one module with three functions, registered in `ALLOCATIONS`:

    bounds(budget)                  the admissible interval of each of its parameters
    initial_points(budget)          the points that a search begins with: the authors' defaults
    sparsities(budget, **values)    one sparsity per block, or per linear of each block, in [0, 1], whose weighted
                                    mean is the target
"""

from collections.abc import Callable
from typing import Protocol

from atp_tune.allocations.budget import Budget, DenseMetricsProtocol, LinearSparsities, Shape, Sparsities
from atp_tune.registry import Registry

__all__ = ["ALLOCATIONS", "Allocation", "Budget", "DenseMetricsProtocol", "LinearSparsities", "Shape", "Sparsities"]


class Allocation(Protocol):
    """What every module of this package offers."""

    def bounds(self, budget: Budget) -> dict[str, tuple[float, float]]:
        """The interval of each parameter in which all sparsities are in [0, 1]."""

    def initial_points(self, budget: Budget) -> list[dict[str, float]]:
        """The points that a search begins with."""

    @property
    def sparsities(self) -> Callable[..., Sparsities]:
        """From a budget and the parameters: the sparsities; ValueError outside the bounds."""


ALLOCATIONS = Registry[Allocation](
    "allocation",
    {
        "uniform": "atp_tune.allocations.uniform",
        "atp": "atp_tune.allocations.atp",
        "curve": "atp_tune.allocations.curve",
        "owl": "atp_tune.allocations.owl",
        "alphapruning": "atp_tune.allocations.alphapruning",
        "er": "atp_tune.allocations.er",
        "erk": "atp_tune.allocations.er",
        "global": "atp_tune.allocations.global_",
    },
)
