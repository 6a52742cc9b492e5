"""The search space of a study: pruners, allocations, and the interval of each parameter.

Where the target is a parameter too, the bounds of the others depend on it. Trials then draw shares of the bounds:

    value = u · high for u ≥ 0, u · |low| for u < 0        if low ≤ 0 ≤ high; u in [-1, 1], without a side that is 0
    value = low + u (high - low), u in [0, 1]              else

Points with the same shares are alike at all targets: u = 0 is uniform, and the best u of ATP changes slowly with it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from atp_tune.allocations import ALLOCATIONS, Bounds, Budget, Points, contained_in, contains_uniform
from atp_tune.allocations.bits import share_at
from atp_tune.config.prune import Pattern, make_plan, parse
from atp_tune.config.study import Study
from atp_tune.errors import UserError
from atp_tune.plan import Plan, amount_of, method_in, searched_by, target_in

Distributions = dict[str, BaseDistribution]  # of the parameters of points
Params = dict[str, Any]  # names and values as Optuna stores them
Interval = tuple[float, float]


@dataclass(frozen=True)
class Space:
    """A search space at one target; `intervals`: allocation → parameter → interval.

    `both_signs`: the initial points of an allocation with β, and those of a grid, are repeated with the other sign.
    `method`: what Optuna calls the parameter that chooses one of `pruners`, which are quantizers where weights are
    rounded alone.
    """

    has_leader: ClassVar[bool] = True  # its trials compare, so that one allocation leads

    budget: Budget
    pruners: tuple[str, ...]
    intervals: dict[str, Bounds]
    pattern: Pattern = field(default_factory=Pattern)
    both_signs: bool = False
    method: str = "pruner"

    def is_open(self, allocation: str) -> bool:
        """Whether an allocation has a parameter to search."""
        return any(low < high for low, high in self.intervals[allocation].values())

    def suggest(self, trial: Trial) -> Plan:
        """A trial's plan; only the parameters of the suggested allocation are suggested."""
        params: Params = {self.method: trial.suggest_categorical(self.method, self.pruners)}
        params["allocation"] = trial.suggest_categorical("allocation", tuple(self.intervals))
        for name, kind in self.kinds(params["allocation"]).items():
            if isinstance(kind, FloatDistribution):
                params[name] = trial.suggest_float(name, kind.low, kind.high, step=kind.step)
        return self.plan(params)

    def kinds(self, allocation: str) -> Distributions:
        """Distributions of the pruner or quantizer, and of an allocation's parameters."""
        own = {name: FloatDistribution(*ends) for name, ends in self.intervals[allocation].items()}
        return {self.method: CategoricalDistribution(self.pruners), **own}

    def branch_distributions(self, allocation: str) -> Distributions:
        """Distributions of a point of an allocation, with that of the allocation itself."""
        return {"allocation": CategoricalDistribution(tuple(self.intervals)), **self.kinds(allocation)}

    def plan(self, params: Params) -> Plan:
        """The plan of a stored trial's parameters."""
        allocation = params["allocation"]
        values = {name: float(params[name]) for name in self.intervals[allocation]}
        return make_plan(method_in(params), allocation, self.budget, values, self.pattern)

    def stored_plan(self, trial: FrozenTrial) -> Plan:
        """The plan by which a trial was measured, as it stored it: another version or machine may allocate otherwise.

        UserError if what is stored does not fit the model.
        """
        try:
            if (plan := Plan.stored_in(trial.user_attrs)) is None:
                raise ValueError("has none that this version reads; start another study with --study-name NAME")
            plan.check_fits(self.budget)
        except ValueError as error:
            raise UserError(f"trial {trial.number}: plan: {error}") from None
        return plan

    def uniform(self, target: float | None = None) -> list[Params]:
        """The uniform point of each pruner, which every study measures; `target`: where it is a parameter."""
        allocation = min(baselines(self.intervals), key=lambda name: len(contained_in(name)))
        zeros = dict.fromkeys(self.intervals[allocation], 0.0)
        return [self.at({self.method: each, "allocation": allocation, **zeros}, target) for each in self.pruners]

    def at(self, params: Params, target: float | None = None) -> Params:
        """A point at another target, where that is a parameter."""
        return params

    def starts(self) -> list[Params]:
        """The initial points of each allocation for each pruner, without repetitions and uniform.

        They are ATP's analytic middle and the authors' defaults. An allocation without parameters has this point only.
        """
        points: list[Params] = [
            {self.method: pruner, "allocation": allocation, **start}
            for allocation in self.intervals
            for start in self._starts(allocation)
            for pruner in self.pruners
        ]
        others = [*self.uniform(), *points]
        return [
            point
            for point in points
            if not any(point is not other and point == self.within(other, point["allocation"]) for other in others)
        ]

    def defaults(self, allocation: str) -> dict[str, float]:
        """An allocation's default parameters: all 0 for a progression, which needs a β, else the authors'."""
        if "beta" in self.intervals[allocation]:
            return dict.fromkeys(self.intervals[allocation], 0.0)
        return self._starts(allocation)[0]

    def within(self, params: Params, allocation: str) -> Params | None:
        """A point as a point of this allocation; None if the allocation does not contain the point's own."""
        own = params["allocation"]
        if own == allocation:
            return params
        if own in self.intervals and contains_uniform(own) and not any(map(params.get, self.intervals[own])):
            own = "uniform"  # all its parameters are 0
        if own not in contained_in(allocation):
            return None
        moved = {name: params.get(name, 0.0) for name in self.intervals[allocation]}
        if not all(low <= moved[name] <= high for name, (low, high) in self.intervals[allocation].items()):
            return None
        amount = amount_of(target_in(params))
        return {self.method: method_in(params), **amount, "allocation": allocation, **moved}

    def grid(self, step: float) -> list[Params]:
        """The points of a grid, without uniform: β = step, 2·step, … up to the bound; with `both_signs` -β too."""
        return [
            {self.method: pruner, "allocation": allocation, **beta}
            for pruner in self.pruners
            for allocation in self.intervals
            for beta in self._betas(allocation, step)
        ]

    def _betas(self, allocation: str, step: float) -> list[Params]:
        intervals = self.intervals[allocation]
        if set(intervals) - {"beta"}:
            raise UserError(f'search.sampler: a grid has steps of β alone, {allocation} has more; take "gp"')
        if not intervals:
            return [] if allocation == "uniform" else [{}]
        low, high = intervals["beta"]
        count, below = (int(end / step + 1e-9) for end in (high, -low if self.both_signs else 0))
        if not count:
            raise UserError(f"search.step: {step:g} is larger than the bound of beta, {high:.6g}")
        return [{"beta": round(k * step, 10)} for k in (*range(1, count + 1), *range(-1, -below - 1, -1))]

    def _starts(self, allocation: str) -> Points:
        bounds, points = self.intervals[allocation], ALLOCATIONS[allocation].initial_points(self.budget)
        if self.both_signs and "beta" in bounds:
            points = [*points, *({**point, "beta": -point["beta"]} for point in points)]
        return [{name: min(high, max(low, start[name])) for name, (low, high) in bounds.items()} for start in points]


@dataclass(frozen=True, kw_only=True)
class SpaceOverInterval(Space):
    """A space in which the target is a parameter too, and the others are shares of their bounds there.

    The budget has the highest target. `targets`: their interval, see `plan.target_in`. `bounds_at`: an allocation's
    bounds with another budget.
    """

    has_leader = False
    targets: Interval
    bounds_at: Callable[[str, Budget], Bounds]

    @property
    def step(self) -> float:
        """The distance of the targets."""
        return searched_by(self.targets[0]).step

    def kinds(self, allocation: str) -> Distributions:
        """The distributions of the sparsity, or the bits, then those of the allocation's parameters."""
        kinds = super().kinds(allocation)
        (low, high), [name] = sorted(map(abs, self.targets)), amount_of(self.targets[0])
        return {self.method: kinds[self.method], name: FloatDistribution(low, high, step=self.step), **kinds}

    def plan(self, params: Params) -> Plan:
        """The plan of a stored trial's parameters, with its target."""
        target = round(target_in(params) or 0.0, 6)
        here = self._there(params["allocation"], target)
        values = {}
        for name, (low, high) in here.intervals[params["allocation"]].items():
            share = float(params[name])
            is_signed = low <= 0 <= high
            values[name] = share * (high if share >= 0 else -low) if is_signed else low + share * (high - low)
        return here.plan({**params, **values}).model_copy(update={"target": target})

    def at(self, params: Params, target: float | None = None) -> Params:
        """A point at another target, the highest by default, rounded as trials draw it."""
        low, high = self.targets
        wanted = high if target is None else min(high, max(low, target))
        return {**params, **amount_of(round(low + self.step * round((wanted - low) / self.step), 6))}

    def levels(self, count: int) -> list[float]:
        """Targets at equal distances over the whole interval."""
        low, high = self.targets
        points = (self.at({}, low + (high - low) * k / max(1, count - 1)) for k in range(count))
        return list(dict.fromkeys(target_in(point) or 0.0 for point in points))

    def _starts(self, allocation: str) -> Points:
        here = self._there(allocation, sum(self.targets) / 2)
        starts = here._starts(allocation)
        for start in starts:
            for name, (low, high) in here.intervals[allocation].items():
                least, width = (0.0, high if start[name] >= 0 else -low) if low <= 0 <= high else (low, high - low)
                start[name] = (start[name] - least) / (width or 1.0)
        return starts

    def _there(self, allocation: str, target: float) -> Space:
        """The space of an allocation at one target."""
        budget = replace(self.budget, target=share_at(target, self.budget.widths))
        bounds = {allocation: self.bounds_at(allocation, budget)}
        return Space(budget, self.pruners, bounds, self.pattern, self.both_signs, self.method)


def make_space(study: Study, budget: Budget) -> Space:
    """The space of a study with this budget; UserError for a β out of bounds.

    Uniform, the baseline, is always in it.
    """
    names = study.allocation.short_names
    if not baselines(names):
        names = ("uniform", *names)
    pruners, pattern = study.methods.short_names, parse(study.prune.pattern)
    bounds = {str(name): _intervals(study, name, budget) for name in names}
    both = (study.images is not None or study.by_bits) and study.beta == "both"
    method = "pruner" if study.methods.prunes else "quantizer"
    if study.interval is None:
        return Space(budget, pruners, bounds, pattern, both, method)
    shares = {  # the interval of each parameter's share of its bounds
        name: {
            key: (-1.0 if low < 0 else 0.0, 1.0 if high > 0 else 0.0) if low <= 0 <= high else (0.0, 1.0)
            for key, (low, high) in own.items()
        }
        for name, own in bounds.items()
    }
    return SpaceOverInterval(
        budget, pruners, shares, pattern, both, method, targets=study.interval, bounds_at=partial(_intervals, study)
    )


def baselines(names: Iterable[str]) -> list[str]:
    """The built-in ones among these allocations that are uniform where all parameters are 0."""
    return [name for name in names if ALLOCATIONS.is_built_in(name) and contains_uniform(name)]


def _intervals(study: Study, allocation: str, budget: Budget) -> Bounds:
    bounds, beta = ALLOCATIONS[allocation].bounds(budget), study.beta
    if "beta" not in bounds or beta == "both":
        return bounds
    least, most = bounds["beta"]
    low, high = (0.0, most) if beta == "auto" else beta
    if beta != "auto" and (low < least or high > most):
        raise UserError(
            f"allocation.beta: [{low:g}, {high:g}] leaves the admissible interval [{least:.6g}, {most:.6g}] "
            f"of {len(budget.sizes)} blocks at {'a share of' if budget.widths else 'sparsity'} {budget.target:g}; "
            'narrow it, or write beta = "auto"'
        )
    return {**bounds, "beta": (low, high)}
