"""The space that a study searches: which pruners and allocations, and the interval of each parameter."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.errors import UserError
from atp_tune.patterns import Pattern, parse
from atp_tune.plan import Plan, make_plan
from atp_tune.study import Study

Params = dict[str, Any]  # names and values as Optuna stores them


class Suggests(Protocol):
    """The part of an Optuna trial that proposes values."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """One of the choices."""

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A value in [low, high]."""


@dataclass(frozen=True)
class Space:
    """What Optuna may choose; `intervals` holds the parameters of each allocation."""

    budget: Budget
    pruners: tuple[str, ...]
    intervals: dict[str, dict[str, tuple[float, float]]]
    pattern: Pattern = field(default_factory=Pattern)

    def suggest(self, trial: Suggests) -> Plan:
        """The plan that a trial proposes."""
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
        """Parameters of the uniform allocation, once for each pruner: the trials that every study starts with."""
        allocation = next(iter(self.intervals))
        zeros = dict.fromkeys(self.intervals[allocation], 0.0)
        return [{"pruner": pruner, "allocation": allocation, **zeros} for pruner in self.pruners]

    def grid(self, step: float) -> dict[str, list[Any]]:
        """Values of each parameter on a grid: β = step, 2·step, … until the bound (uniform is asked for apart)."""
        values: dict[str, list[Any]] = {"pruner": list(self.pruners), "allocation": list(self.intervals)}
        for intervals in self.intervals.values():
            for name, (_, high) in intervals.items():
                values[name] = [round(k * step, 10) for k in range(1, int(high / step + 1e-9) + 1)]
                if not values[name]:
                    raise UserError(f"search.step: {step:g} is larger than the bound of {name}, {high:.6g}")
        return values


def make_space(study: Study, budget: Budget) -> Space:
    """The space of a study that shares out this budget; UserError for a β out of bounds."""
    intervals = {str(name): _intervals(study, name, budget) for name in study.allocation.names}
    return Space(budget, study.prune.pruners, intervals, parse(study.prune.pattern))


def _intervals(study: Study, allocation: str, budget: Budget) -> dict[str, tuple[float, float]]:
    bounds = ALLOCATIONS[allocation].bounds(budget)
    if "beta" in bounds:
        bounds["beta"] = _beta_interval(study.allocation.beta, bounds["beta"], budget)
    return bounds


def _beta_interval(asked: Any, bounds: tuple[float, float], budget: Budget) -> tuple[float, float]:
    if asked == "auto":
        return 0.0, bounds[1]
    low, high = asked
    if low < bounds[0] or high > bounds[1]:
        raise UserError(
            f"allocation.beta: [{low:g}, {high:g}] leaves the admissible interval [{bounds[0]:.6g}, {bounds[1]:.6g}] "
            f'of {len(budget.sizes)} blocks at sparsity {budget.target:g}; narrow it, or write beta = "auto"'
        )
    return low, high
