"""The search space of a study: pruners, allocations, and the interval of each parameter."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.errors import UserError
from atp_tune.plan import Plan, make_plan
from atp_tune.spec.patterns import Pattern, parse
from atp_tune.spec.study import Study

Params = dict[str, Any]  # names and values as Optuna stores them
Interval = tuple[float, float]

NEUTRAL = ("uniform", "atp", "curve")  # uniform if all their parameters are 0; each contains the ones before


class Suggests(Protocol):
    """The methods of an Optuna trial that suggest values."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A value in [low, high]."""


@dataclass(frozen=True)
class Space:
    """A search space; `intervals`: allocation → parameter → interval."""

    budget: Budget
    pruners: tuple[str, ...]
    intervals: dict[str, dict[str, Interval]]
    pattern: Pattern = field(default_factory=Pattern)

    def is_open(self, allocation: str) -> bool:
        """Whether an allocation has a parameter to search."""
        return any(low < high for low, high in self.intervals[allocation].values())

    def suggest(self, trial: Suggests) -> Plan:
        """A trial's plan; only the parameters of the suggested allocation are suggested."""
        pruner = trial.suggest_categorical("pruner", self.pruners)
        allocation = trial.suggest_categorical("allocation", tuple(self.intervals))
        intervals = self.intervals[allocation]
        values = {name: trial.suggest_float(name, *interval) for name, interval in intervals.items()}
        return make_plan(pruner, allocation, self.budget, values, self.pattern)

    def plan(self, params: Params) -> Plan:
        """The plan of a stored trial's parameters."""
        names = self.intervals[params["allocation"]]
        values = {name: float(params[name]) for name in names}
        return make_plan(params["pruner"], params["allocation"], self.budget, values, self.pattern)

    def uniform(self) -> list[Params]:
        """The uniform point of each pruner, which every study measures."""
        allocation = next(name for name in NEUTRAL if name in self.intervals)
        zeros = dict.fromkeys(self.intervals[allocation], 0.0)
        return [{"pruner": pruner, "allocation": allocation, **zeros} for pruner in self.pruners]

    def starts(self) -> list[Params]:
        """The initial points of each allocation for each pruner, without repetitions and uniform.

        They are ATP's analytic middle and the authors' defaults. An allocation without parameters has this point only.
        """
        points: list[Params] = []
        for allocation in self.intervals:
            for start in self._starts(allocation):
                points += [{"pruner": pruner, "allocation": allocation, **start} for pruner in self.pruners]
        known = [*self.uniform(), *points]
        return [point for point in points if not any(self._repeats(point, other) for other in known)]

    def defaults(self, allocation: str) -> dict[str, float]:
        """An allocation's default parameters: all 0 if that is uniform, else the authors'."""
        if allocation in NEUTRAL:
            return dict.fromkeys(self.intervals[allocation], 0.0)
        return self._starts(allocation)[0]

    def within(self, params: Params, allocation: str) -> Params | None:
        """A point as a point of this allocation; None if the allocation does not contain the point's own."""
        own = params["allocation"]
        if own == allocation:
            return params
        if own not in NEUTRAL or allocation not in NEUTRAL[NEUTRAL.index(own) :]:
            return None
        moved = {name: params.get(name, 0.0) for name in self.intervals[allocation]}
        return {"pruner": params["pruner"], "allocation": allocation, **moved}

    def grid(self, step: float) -> list[Params]:
        """The points of a grid, without uniform: β = step, 2·step, … up to the bound."""
        betas = {allocation: self._betas(allocation, step) for allocation in self.intervals}
        return [
            {"pruner": pruner, "allocation": allocation, **beta}
            for pruner in self.pruners
            for allocation in self.intervals
            for beta in betas[allocation]
        ]

    def _betas(self, allocation: str, step: float) -> list[Params]:
        intervals = self.intervals[allocation]
        if set(intervals) - {"beta"}:
            raise UserError(f'search.sampler: a grid has steps of β alone, {allocation} has more; take "gp"')
        if not intervals:
            return [] if allocation == "uniform" else [{}]
        high = intervals["beta"][1]
        count = int(high / step + 1e-9)
        if not count:
            raise UserError(f"search.step: {step:g} is larger than the bound of beta, {high:.6g}")
        return [{"beta": round(k * step, 10)} for k in range(1, count + 1)]

    def _starts(self, allocation: str) -> list[dict[str, float]]:
        intervals = self.intervals[allocation]
        return [
            {name: min(high, max(low, start[name])) for name, (low, high) in intervals.items()}
            for start in ALLOCATIONS[allocation].initial_points(self.budget)
        ]

    def _repeats(self, point: Params, other: Params) -> bool:
        """Whether `point` is the same as `other`, which an allocation that `point` belongs to may contain."""
        return point is not other and point == self.within(other, point["allocation"])


def make_space(study: Study, budget: Budget) -> Space:
    """The space of a study with this budget; UserError for a β out of bounds.

    Uniform, the baseline, is always in it.
    """
    names = study.allocation.names
    if not set(names) & set(NEUTRAL):
        names = ("uniform", *names)
    intervals = {str(name): _intervals(study, name, budget) for name in names}
    return Space(budget, study.prune.pruners, intervals, parse(study.prune.pattern))


def _intervals(study: Study, allocation: str, budget: Budget) -> dict[str, Interval]:
    bounds = ALLOCATIONS[allocation].bounds(budget)
    if "beta" in bounds:
        bounds["beta"] = _beta_interval(study.allocation.beta, bounds["beta"], budget)
    return bounds


def _beta_interval(asked: Any, bounds: Interval, budget: Budget) -> Interval:
    if asked == "auto":
        return 0.0, bounds[1]
    if asked == "both":
        return bounds
    low, high = asked
    if low < bounds[0] or high > bounds[1]:
        raise UserError(
            f"allocation.beta: [{low:g}, {high:g}] leaves the admissible interval [{bounds[0]:.6g}, {bounds[1]:.6g}] "
            f'of {len(budget.sizes)} blocks at sparsity {budget.target:g}; narrow it, or write beta = "auto"'
        )
    return low, high
