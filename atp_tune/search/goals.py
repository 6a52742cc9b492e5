"""The goal of a search: the best plan at one sparsity, the front over an interval, or the sparsest plan within a limit.

A goal knows its space and total, which points are queued first, the sampler of the others, and when it is reached.

Within a limit: the screening's model (`search.surrogate`) predicts at each sparsity S the best parameters and their
excess over the limit, g(S). The trials are measured in full, so their excess differs from g by a shift, which changes
slowly with S. The next trial is at the highest S with g(S) + shift ≤ 0, inside the bracket: above the sparsest trial
within the limit, and below the first one beyond it. Without a screening the parameters are the first of the first
allocation, and the log of the measured increase is taken to be linear in S; for accuracies, and where dense itself is
beyond the limit, the bracket is halved. When the bracket has no sparsity left, uniform is measured at the best trial's
sparsity. If it is better there, the model was wrong, and the search goes on with uniform alone; else it has ended.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from atp_tune.allocations import Budget
from atp_tune.config.search import SearchConfig
from atp_tune.config.study import Study
from atp_tune.events import Event, EventHandler, Message, TrialEnded, TrialStarted
from atp_tune.measures import Limit, perplexity
from atp_tune.plan import method_in, searched_by, target_in
from atp_tune.results.goals import best_trial, limit_excess
from atp_tune.results.results import is_uniform, uniform_beside
from atp_tune.search.samplers import (
    Proposer,
    branch_study,
    is_near,
    make_sampler,
    open_kinds,
    posterior_at,
    wait_for_earlier,
    with_value,
)
from atp_tune.search.space import Distributions, Params, Space, SpaceOverInterval, make_space
from atp_tune.storage import progress
from atp_tune.storage.progress import trials_in
from atp_tune.utils.compat import fitted

# --- Screening: a cheaper study before the main study, which then confirms the best points.
#
# The screening is stored beside the main study as NAME.screen. It prunes with the dense model's statistics and measures
# every `stride`-th validation window: a trial is a mask and part of an evaluation, without a pass over the calibration
# text. Its perplexities differ from the main study's, but near the optimum it ranks points alike. The main study begins
# with the best points and measures them in full.

# --- A model of the screened trials over sparsity and parameters: the best parameters at each sparsity.
#
# A Gaussian process is fitted to the log of each point's increase of NLL over the dense model, ln(PPL / PPL of
# dense), or of its KL, in nats per token. That is 0.02 at 20 % and 2 at 70 %, so that in perplexities, or their logs,
# what parameters change at low sparsities would be noise. At one sparsity, the best of `CANDIDATES` random points is
# the one with the lowest mean plus `CAUTION` standard deviations of the posterior: where nothing is gained that is a
# point near measured ones, and not any point of a flat stretch that no trial reached; among so many points some are
# always thought too well of. docs/log.md compares it with one deviation, and with the nearest trials of the Pareto
# front.
#
# An increase below `SMALLEST` counts as `SMALLEST`, and where a model loses nothing by pruning all points do: there
# the process is flat, and any of them would do. So where one of the `NEIGHBOURS` with the nearest sparsities
# increases less, and the process is as flat at the sparsity itself, the best of these neighbours is taken, moved to
# the sparsity.

CANDIDATES = 512
CAUTION = 2.0
LEAST = 3  # points that a process is fitted to
NEIGHBOURS = 5
FLAT = 2.0  # times `SMALLEST`: the process is flat where it predicts no more
SMALLEST, MOST = 0.005, 50.0  # nats per token: smaller increases are noise, larger ones are all the same


@dataclass(frozen=True)
class Predicted:
    """A point, and its increase of NLL or its KL, in nats per token; None where no model was fitted.

    `bound`: that with `CAUTION` standard deviations, by which points are compared.
    """

    params: Params
    increase: float | None
    bound: float = math.inf


class Surrogate:
    """The model; `trials` are measured alike, in any order.

    `dense`: the dense model's window NLLs on the windows of these trials; None if their values are KLs.
    """

    def __init__(
        self, space: Space, trials: Sequence[FrozenTrial], seed: int, dense: Sequence[float] | None = None
    ) -> None:
        self._space = space
        points = []  # with their increase of NLL over the dense model, or their KL, as value
        for trial in trials:
            if trial.values:
                value = trial.values[0]
                if dense is not None:
                    value = min(math.log(value / perplexity(dense).value), MOST) if value > 0 else MOST
                points.append(with_value(trial, value))
        self._branches = {name: Branch(space, name, points, seed) for name in space.intervals}

    def best_at(self, target: float) -> Predicted:
        """The best point at a target; the first pruner's uniform point where no model is fitted."""
        points = [point for branch in self._branches.values() if (point := branch.best_at(target))]
        return min(points, key=lambda one: one.bound, default=Predicted(self._space.uniform(target)[0], None))


class Branch:
    """The model of one allocation's points."""

    def __init__(self, space: Space, name: str, trials: Sequence[FrozenTrial], seed: int) -> None:
        self._space = space
        self._name = name
        self._seed = seed
        self._kinds = space.kinds(name)
        shadow = branch_study(
            [with_value(trial, max(trial.values[0], SMALLEST)) for trial in trials], space, name, self._kinds
        )
        done = shadow.trials
        pairs = [(float(trial.values[0]), space.within(trial.params, name) or {}) for trial in trials]
        self._known = [pair for pair in pairs if self._kinds.keys() <= pair[1].keys()]
        self._process: Any = None  # a Gaussian process of Optuna's, fitted to the study of the logs
        if len(done) >= LEAST:
            sampler = GPSampler(seed=seed, n_startup_trials=LEAST)
            shadow.ask()  # stands in for a trial
            sampler.sample_relative(shadow, shadow.trials[-1], open_kinds(self._kinds))
            self._process = fitted(sampler)
        values = [float(trial.value or 0.0) for trial in done]
        self._mean, self._spread = (statistics.fmean(values), statistics.pstdev(values)) if done else (0.0, 0.0)
        self._points = [trial.params for trial in done]

    def best_at(self, target: float) -> Predicted | None:
        """The best point at a target; None where no model is fitted."""
        if self._process is None:
            return None
        nearest = sorted(self._known, key=lambda one: abs((target_in(one[1]) or 0.0) - target))[:NEIGHBOURS]
        value, point = min(nearest, key=lambda one: one[0])
        moved = self._space.at({name: point[name] for name in self._kinds}, target)
        points = [*self._candidates(target), moved]
        open_ones = open_kinds(self._kinds)
        trials = [
            optuna.create_trial(value=0.0, params={name: point[name] for name in open_ones}, distributions=open_ones)
            for point in points
        ]
        means, deviations = posterior_at(self._process, trials, open_ones)
        if value < SMALLEST and self._increase(means[-1]) < FLAT * SMALLEST:
            return Predicted({"allocation": self._name, **moved}, value, value)
        bounds = means + CAUTION * deviations
        best = int(bounds.argmin())
        params = {"allocation": self._name, **points[best]}
        return Predicted(params, self._increase(means[best]), self._increase(bounds[best]))

    def _increase(self, normal: float) -> float:
        """The increase at a value of the process."""
        return math.exp(self._mean + self._spread * float(normal))

    def _candidates(self, target: float) -> list[Params]:
        """Points at a target: uniform where the allocation contains it, those measured elsewhere, random ones."""
        generator = random.Random(f"{self._seed} {self._name}")
        drawn = [
            {
                name: generator.uniform(kind.low, kind.high)
                if isinstance(kind, FloatDistribution)
                else generator.choice(kind.choices)  # type: ignore[attr-defined]
                for name, kind in self._kinds.items()
            }
            for _ in range(CANDIDATES)
        ]
        points = [
            {name: point[name] for name in self._kinds}
            for uniform in self._space.uniform(target)
            if (point := self._space.within(uniform, self._name))
        ]
        return [self._space.at(point, target) for point in (*points, *self._points, *drawn)]


APART = 1 / 28  # of an interval: half a step (0.002) of the paper's grid, on 32 blocks at 70 %


def renamed(watch: EventHandler) -> EventHandler:
    """A handler that names the trials in events of a screening `screening`."""

    def on_event(event: Event) -> None:
        match event:
            case Message(text):
                event = Message(f"screening: {text}")
            case TrialStarted(title):
                event = replace(event, title=title.replace("trial", "screening", 1))
            case TrialEnded():
                event = replace(event, what="screening")
        watch(event)

    return on_event


def confirmed(screened: Sequence[FrozenTrial], space: Space, count: int) -> list[Params]:
    """Parameters of the best screened trials (given best first) that are not near a better one or uniform."""
    uniform, chosen = space.uniform(), list[Params]()
    for trial in screened:
        point, allocation = trial.params, trial.params["allocation"]
        others = (space.within(other, allocation) for other in (*uniform, *chosen))
        near = (is_near(point, other, space.kinds(allocation), APART) for other in others if other is not None)
        if len(chosen) < count and not any(near):
            chosen.append(point)
    return chosen


@dataclass(frozen=True)
class Screened:
    """A screening's trials, the best first, and the window NLLs of its dense model; empty until it is complete."""

    trials: Sequence[FrozenTrial] = ()
    dense: Sequence[float] = ()


def make_goal(spec: Study, budget: Budget) -> "AtSparsity":
    """The goal of a study with this budget."""
    space = make_space(spec, budget)
    if not isinstance(space, SpaceOverInterval):
        return AtSparsity(spec.search, space)
    return WithinLimit(spec.search, space, spec.limit.given) if spec.limit else OverInterval(spec.search, space)


@dataclass
class AtSparsity:
    """The best plan at one target, or one number of bits."""

    search: SearchConfig
    space: Space
    limit: Limit | None = None
    reached: ClassVar[str] = ""  # why nothing is left to measure before the total
    is_from_dense: ClassVar[bool] = False  # whether values are compared with the dense model's

    @property
    def total(self) -> int:
        """`search.trials`, but at most the number of points on a grid or without parameters.

        The default of a study with a screening is uniform per pruner and the confirmed points.
        """
        screen, trials, space = self.search.screen, self.search.trials, self.space
        points = len(space.uniform()) + screen.confirm if screen else len(self.starts())
        is_finite = self.search.sampler == "grid" or not (screen or any(map(space.is_open, space.intervals)))
        return min(trials or points, points) if is_finite else trials or points

    def starts(self) -> list[Params]:
        """Uniform per pruner, then the allocations' starts, or the grid's points, shuffled.

        The grid is queued too: Optuna's GridSampler loses points over a resume, and ends in a KeyError where trials
        were queued beside a grid of one point.
        """
        if self.search.sampler != "grid":
            return [*self.space.uniform(), *self.space.starts()]
        points = self.space.grid(self.search.step)
        random.Random(self.search.seed).shuffle(points)
        return [*self.space.uniform(), *points]

    def begin(self, study: optuna.Study, screened: Screened, total: int) -> list[Params]:
        """Gives the study its sampler, and returns the points that it queues first.

        After a screening, which found `screened`, they are those to confirm, then uniform.
        """
        study.sampler = make_sampler(self.search, self.space, screened.trials)
        if self.search.screen is None:
            return self.starts()[:total]
        points, uniform = confirmed(screened.trials, self.space, self.search.screen.confirm), self.space.uniform()
        return [*points[: max(0, total - len(uniform))], *uniform][:total]

    def is_idle(self, study: optuna.Study) -> bool:
        """Whether nothing is left to measure for it, beside what is being measured now."""
        return False


@dataclass
class OverInterval(AtSparsity):
    """The front over an interval of targets: at each of some targets the best point, and uniform beside it."""

    reached = "the best point at a target is uniform"
    space: SpaceOverInterval
    queued: Sequence[Params] = ()

    @property
    def total(self) -> int:
        """`search.trials`; by default each confirmed point and uniform at its target."""
        screen = self.search.screen
        return self.search.trials or (2 * len(self.space.levels(screen.confirm)) if screen else 0)

    def starts(self) -> list[Params]:
        """Uniform and the allocations' starts at the ends and the middle of the interval."""
        space = self.space
        return [space.at(point, level) for level in space.levels(3) for point in (*space.uniform(), *space.starts())]

    def begin(self, study: optuna.Study, screened: Screened, total: int) -> list[Params]:
        """Begins as at one target; after a screening with the best point by its model at each level, and uniform."""
        study.sampler = make_sampler(self.search, self.space)
        if self.search.screen is None:
            return self.starts()[:total]
        surrogate, points = self.surrogate(screened.trials, screened.dense), list[Params]()
        for level in self.space.levels(self.search.screen.confirm) if screened.trials else ():
            best = surrogate.best_at(level).params
            uniform = next(point for point in self.space.uniform(level) if method_in(point) == method_in(best))
            points += [best] if uniform == best else [best, uniform]
        self.queued = () if self.search.trials else points[:total]
        return points[:total]

    def surrogate(self, trials: Sequence[FrozenTrial], dense: Sequence[float] | None) -> Surrogate:
        """A model of the value over target and parameters, fitted to these trials."""
        return Surrogate(self.space, trials, self.search.seed, None if "kl" in self.search.objective else dense or None)

    def is_idle(self, study: optuna.Study) -> bool:
        """Whether no queued point is left that no trial has measured, failed at, or measures now."""
        if not self.queued:
            return False
        trials = (trial for trial in trials_in(study) if progress.counts(trial) or trial.state == TrialState.RUNNING)
        begun = [trial.params for trial in trials]
        return all(point in begun for point in self.queued)


@dataclass
class WithinLimit(OverInterval):
    """The smallest plan within a limit; `dense`: window NLLs of the dense model on the windows of the screening."""

    reached = "the next step is beyond the limit"
    is_from_dense = True
    model: Surrogate = field(init=False)
    dense: Sequence[float] | None = None
    _cache: dict[float, float | None] = field(default_factory=dict)

    def begin(self, study: optuna.Study, screened: Screened, total: int) -> list[Params]:
        """Nothing is queued: the sampler chooses every point."""
        trials, self.dense = screened.trials, screened.dense or None
        if not trials:  # without a screening never the study's own: a resumed study would propose other points
            trials = progress.measured(study) if self.search.screen else []
            self.dense = study.user_attrs.get("dense")
        self.model = self.surrogate(trials, self.dense)
        study.sampler = LimitSampler(RandomSampler, self.search.seed, self)
        return []

    def is_idle(self, study: optuna.Study) -> bool:
        """Whether the best trial is known to the step, and uniform is measured at its target."""
        return not self._free(study) and self._missing_uniform(study) is None

    def next_point(self, study: optuna.Study, trial: FrozenTrial) -> Params:
        """The point of the next trial; `trial`: its own, which has no parameters yet."""
        free = self._free(study)
        total = study.user_attrs.get("total")
        is_last = total is not None and progress.counted(study) + 1 >= total
        uniform = self._missing_uniform(study)
        if uniform is not None and (is_last or not free):
            return uniform
        target = self._chosen(study, free) if free else self._levels()[0]
        if leader := self._leader(study):
            return self.space.at(leader, target)
        prediction, starts = self.model.best_at(target), self.space.starts()
        return self.space.at(starts[0], target) if prediction.increase is None and starts else prediction.params

    def _levels(self) -> list[float]:
        low, high = self.space.targets
        return self.space.levels(1 + round((high - low) / self.space.step))

    def _leader(self, study: optuna.Study) -> Params | None:
        """The uniform point that beats the model's at the highest target where both are measured, if it does."""
        pairs = [
            (trial, uniform)
            for trial in progress.measured(study)
            if not is_uniform(trial) and (uniform := uniform_beside(study, trial)) is not None
        ]
        if not pairs:
            return None
        trial, uniform = max(pairs, key=lambda pair: target_in(pair[0].params) or 0.0)
        return None if limit_excess(study, uniform) >= limit_excess(study, trial) else dict(uniform.params)

    def _measured(self, study: optuna.Study, of_leader: bool = False) -> dict[float, float]:
        """The lowest excess at each measured target; a plan that failed is beyond any limit.

        `of_leader`: those of uniform alone, if it leads.
        """
        excesses, only_uniform = dict[float, float](), of_leader and self._leader(study) is not None
        for trial in trials_in(study):
            target = target_in(trial.params)
            if target is not None and progress.counts(trial) and (is_uniform(trial) or not only_uniform):
                excesses[target] = min(limit_excess(study, trial), excesses.get(target, math.inf))
        return excesses

    def _free(self, study: optuna.Study) -> list[float]:
        """The targets that no trial measures now, between the sparsest trial within the limit and one beyond it."""
        low = max((target for target, excess in self._measured(study).items() if excess <= 0), default=-math.inf)
        excesses = self._measured(study, of_leader=True)
        high = min((target for target, excess in excesses.items() if excess > 0 and target > low), default=math.inf)
        busy = [target_in(trial.params) for trial in progress.running(study)]
        near = self.space.step / 2  # two targets nearer than this are the same
        return [
            level
            for level in self._levels()
            if low + near < level < high - near and not any(one and abs(one - level) < near for one in busy)
        ]

    def _chosen(self, study: optuna.Study, free: list[float]) -> float:
        """The highest of these targets whose predicted excess, shifted by the measured ones, is within the limit."""
        shifts = self._shifts(study)
        predicted = {level: self._predicted(level) for level in free}
        if None in predicted.values():
            # One of these targets without a model: the log of the increase is linear.
            allowed = self._excess(0.0)
            measured = self._measured(study, of_leader=True).items()
            points = [
                (math.log(max(1 - excess / allowed, SMALLEST)), target)
                for target, excess in sorted(measured, key=lambda pair: pair[0])
                if allowed is not None and allowed < 0 and math.isfinite(excess)
            ]
            below, above = [one for one in points if one[0] <= 0][-1:], [one for one in points if one[0] > 0][:1]
            match [*below, *above]:
                case [(low, left), (high, right)]:
                    root = left - low * (right - left) / (high - low)
                case [(log, target)]:
                    root = target - log / searched_by(target).growth
                case _:
                    root = free[len(free) // 2]
            return max((level for level in free if level < root + self.space.step / 2), default=free[0])
        inside = [level for level, value in predicted.items() if value is not None and value + shifts(level) <= 0]
        return max(inside, default=free[0] if shifts(free[0]) else free[len(free) // 2])

    def _shifts(self, study: optuna.Study) -> Any:
        """A function of the target: measured minus predicted excess, from the nearest measured ones on both sides."""
        shifts = {
            target: excess - predicted
            for target, excess in sorted(self._measured(study).items())
            if math.isfinite(excess) and (predicted := self._predicted(target)) is not None
        } or {0.0: 0.0}
        return lambda level: np.interp(level, list(shifts), list(shifts.values()))

    def _predicted(self, target: float) -> float | None:
        """The excess that the screening's model predicts for the best point at a target."""
        if target not in self._cache:
            increase = self.model.best_at(target).increase
            self._cache[target] = None if increase is None else self._excess(increase)
        return self._cache[target]

    def _excess(self, increase: float) -> float | None:
        key, value = next(iter((self.limit or {}).items()))
        if isinstance(value, Mapping) or key == "max_drop":
            return None
        if key == "max_kl":
            return increase - value
        if key == "max_increase":
            return increase - math.log1p(value)
        return increase - math.log(value / perplexity(self.dense).value) if self.dense else None

    def _missing_uniform(self, study: optuna.Study) -> Params | None:
        """The uniform point at the best trial's target, unless it is measured, has failed, or is being measured."""
        best = best_trial(study)
        if best is None or is_uniform(best) or uniform_beside(study, best) is not None:
            return None
        points = self.space.uniform(target_in(best.params))
        point = next(point for point in points if method_in(point) == method_in(best.params))
        states = (TrialState.RUNNING, TrialState.FAIL)
        return None if any(other.params == point for other in trials_in(study, *states)) else point


@dataclass(eq=False)
class LimitSampler(Proposer):
    """Proposes the points of a search for the smallest plan within a limit."""

    goal: WithinLimit

    def propose(self, study: optuna.Study, trial: FrozenTrial) -> tuple[Distributions, Params]:
        """Pruner, allocation, target, and the parameters of the allocation of the next point."""
        space = self.goal.space
        wait_for_earlier(study, trial, space)
        point = self.goal.next_point(study, trial)
        return space.branch_distributions(point["allocation"]), point
