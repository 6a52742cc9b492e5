"""Allocations: how a sparsity target is shared out over the blocks.

An allocation is an object with three functions, registered in `ALLOCATIONS`:

    bounds(budget)                  the admissible interval of each parameter
    initial_points(budget)          the first points of a search: the authors' defaults
    sparsities(budget, **values)    one sparsity in [0, 1] per block, or per linear of each block; the weighted mean is
                                    the target

A plug-in may be an object or a class; without `bounds` it has no parameters, without `initial_points` it begins in the
middle. It may also say

    contains = ("uniform", …)       the allocations that it equals where its other parameters are 0
    measures_inputs = True          it needs the statistics of the dense model's inputs

`gradient-rows` has one function more, `row_offsets`: how much sparser than its linear each row is.
"""

from collections.abc import Callable
from typing import Protocol

from atp_tune.allocations.budget import Budget, DenseMetricsProtocol, LinearSparsities, Shape, Sparsities
from atp_tune.utils.registry import Registry

__all__ = ["ALLOCATIONS", "Allocation", "Budget", "DenseMetricsProtocol", "LinearSparsities", "Shape", "Sparsities"]


class Allocation(Protocol):
    """The parts of each allocation."""

    contains: tuple[str, ...]
    measures_inputs: bool

    def bounds(self, budget: Budget) -> dict[str, tuple[float, float]]:
        """The interval of each parameter that keeps all sparsities in [0, 1]."""

    def initial_points(self, budget: Budget) -> list[dict[str, float]]:
        """The first points of a search."""

    @property
    def sparsities(self) -> Callable[..., Sparsities]:
        """The function from budget and parameters to sparsities; it raises ValueError outside the bounds."""


ALLOCATIONS = Registry[Allocation](
    "allocation",
    {
        "uniform": "atp_tune.allocations.formulas:uniform",
        "atp": "atp_tune.allocations.formulas:atp",
        "curve": "atp_tune.allocations.formulas:curve",
        "owl": "atp_tune.allocations.formulas:owl",
        "alphapruning": "atp_tune.allocations.formulas:alphapruning",
        "alphapruning-linear": "atp_tune.allocations.formulas:alphapruning_linear",
        "er": "atp_tune.allocations.formulas:er",
        "erk": "atp_tune.allocations.formulas:er",
        "gradient": "atp_tune.allocations.gradient:by_linear",
        "gradient-rows": "atp_tune.allocations.gradient:by_row",
        "global": "atp_tune.allocations.formulas:globally",
    },
    "atp_tune.allocations",
    "atp_tune.allocations.checked:finished",
)


def contents_of(name: str) -> tuple[str, ...]:
    """The allocations that this one contains: it equals them where its other parameters are 0; itself the last."""
    return (*ALLOCATIONS[name].contains, name)


def is_fitted(name: str) -> bool:
    """Whether an allocation's plan depends on the calibration text: it measures inputs, or is a plug-in, which may."""
    return not ALLOCATIONS.is_built_in(name) or ALLOCATIONS[name].measures_inputs


def contains_uniform(name: str) -> bool:
    """Whether an allocation is uniform where all its parameters are 0."""
    return "uniform" in contents_of(name)
