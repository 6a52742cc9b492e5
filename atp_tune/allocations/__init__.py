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

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Protocol

from atp_tune.allocations.budget import (
    ROUNDING,
    Bounds,
    Budget,
    DenseMetricsProtocol,
    LinearSparsities,
    Points,
    Shape,
    Sparsities,
)
from atp_tune.plugins import Checked, guarded
from atp_tune.utils.registry import Origin, Registry

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "Bounds",
    "Budget",
    "DenseMetricsProtocol",
    "LinearSparsities",
    "Points",
    "Shape",
]


class Allocation(Protocol):
    """The parts of each allocation."""

    contains: tuple[str, ...]
    measures_inputs: bool

    def bounds(self, budget: Budget) -> Bounds:
        """The interval of each parameter that keeps all sparsities in [0, 1]."""

    def initial_points(self, budget: Budget) -> Points:
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
    "atp_tune.allocations:finished",
)


def contained_in(name: str) -> tuple[str, ...]:
    """The allocations that this one contains: it equals them where its other parameters are 0; itself the last."""
    return (*ALLOCATIONS[name].contains, name)


def is_fitted(name: str) -> bool:
    """Whether an allocation's plan depends on the calibration text: it measures inputs, or is a plug-in, which may."""
    return not ALLOCATIONS.is_built_in(name) or ALLOCATIONS[name].measures_inputs


def contains_uniform(name: str) -> bool:
    """Whether an allocation is uniform where all its parameters are 0."""
    return "uniform" in contained_in(name)


# --- An allocation that is a plug-in, checked each time that it is asked.
#
# Bounds are finite intervals of parameters with names of their own; sparsities are one number in [0, 1] per block, or
# per linear of each block, and their mean weighted by size is the target within one weight of the model.

TAKEN = ("pruner", "quantizer", "allocation", "sparsity")  # names of a trial's other parameters
UNITS = 1e-6  # least tolerance of the mean, beside one weight


class CheckedAllocation(Checked):
    """The `Allocation` around a plug-in."""

    def __init__(self, plugin: Any, origin: Origin) -> None:
        super().__init__(plugin, origin)
        self.measures_inputs = bool(getattr(plugin, "measures_inputs", False))
        self.contains = tuple(getattr(plugin, "contains", ()))

    def bounds(self, budget: Budget) -> Bounds:
        """The interval of each parameter."""
        with guarded(self._origin, "bounds"):
            bounds = self._plugin.bounds(budget) if hasattr(self._plugin, "bounds") else {}
            if not isinstance(bounds, Mapping):
                raise self.wrong("bounds", f"returned {bounds!r}, not a dict of intervals")
            return {name: self._interval(name, ends) for name, ends in bounds.items()}

    def initial_points(self, budget: Budget) -> Points:
        """The plug-in's first points, or the middle of its bounds."""
        names = self.bounds(budget)
        with guarded(self._origin, "initial_points"):
            if not hasattr(self._plugin, "initial_points"):
                return [{name: (low + high) / 2 for name, (low, high) in names.items()}]
            points = [dict(point) for point in self._plugin.initial_points(budget)]
            if not points or any(point.keys() != names.keys() for point in points):
                raise self.wrong("initial_points", f"must return points with {', '.join(names) or 'no parameter'}")
            if not all(_is_number(value) for point in points for value in point.values()):
                raise self.wrong("initial_points", "returned a value that is no finite number")
            return points

    def sparsities(self, budget: Budget, **values: float) -> Sparsities:
        """The plug-in's sparsities, clipped to [0, 1] where they are outside it by rounding.

        ValueError outside the bounds, as of every allocation.
        """
        names = self.bounds(budget)
        if values.keys() != names.keys():
            raise self.wrong("sparsities", f"needs the parameters {', '.join(names) or 'none'}")
        budget.check(names, **values)
        at = ", ".join(f"{name}={value:g}" for name, value in values.items())
        with guarded(self._origin, f"sparsities at {at}" if at else "sparsities"):
            sparsities = list(self._plugin.sparsities(budget, **values))
            by_linear = any(isinstance(row, tuple | list) for row in sparsities)
            rows = [list(row) for row in sparsities] if by_linear else [[one] for one in sparsities]
        shapes = [[shape.size for shape in row] for row in budget.linears] if by_linear else [[n] for n in budget.sizes]
        if [len(row) for row in rows] != [len(row) for row in shapes]:
            many = "one row per block, of one value per linear" if by_linear else f"{len(shapes)}, one per block"
            raise self.wrong("sparsities", f"returned {len(sparsities)} values, where there must be {many}")
        flat, sizes = [s for row in rows for s in row], [size for row in shapes for size in row]
        wrong = next((s for s in flat if not _is_number(s) or not -ROUNDING <= s <= 1 + ROUNDING), None)
        if wrong is not None:
            raise self.wrong("sparsities", f"returned {wrong!r}, which is no sparsity in [0, 1]")
        mean = math.fsum(s * size for s, size in zip(flat, sizes, strict=True)) / sum(sizes)
        if abs(mean - budget.target) > max(UNITS, 1 / sum(sizes)):
            raise self.wrong("sparsities", f"returned a mean of {mean:.6g} by size, the target is {budget.target:.6g}")
        clipped = tuple(tuple(min(1.0, max(0.0, float(s))) for s in row) for row in rows)
        return clipped if by_linear else tuple(row[0] for row in clipped)

    def _interval(self, name: Any, ends: Any) -> tuple[float, float]:
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise self.wrong("bounds", f"names a parameter {name!r}; choose another name")
        if name == "beta" and "uniform" not in self.contains:
            raise self.wrong("bounds", "names a parameter beta, which is the progression of atp; choose another name")
        low, high = ends
        if not (_is_number(low) and _is_number(high) and low <= high):
            raise self.wrong("bounds", f"gave {name} the interval {ends!r}, which must run from a number to a higher")
        return float(low), float(high)


def finished(allocation: Any, origin: Origin) -> CheckedAllocation:
    """The allocation of a plug-in; UserError if it is none."""
    return CheckedAllocation.finished(allocation, origin, sparsities="(budget, **parameters)")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
