"""One allocation's points as a model of them is fitted, and where the points that it proposes may lie.

A point that was measured says nothing new. Where the best point is the end of an interval, as uniform is where β > 0
does not pay, the maximum of a GP's acquisition is that very point again and again. Then one beside it is drawn instead:
uniformly, at most a 40th of each interval away, and twice as far after each draw that is known too.
"""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from atp_tune.search.space import Params, Space
from atp_tune.storage.ranking import values_of

LEAST = 1e-6  # nats per token: no KL is taken to be less where its log is wanted
NEAR = 1 / 500  # of an interval: β of SmolLM2 at 60 % that are nearer differ by less than a weight in any row
REACH = 1 / 40  # of an interval, at first
DRAWS = 20


def kinds_of(space: Space, branch: str) -> dict[str, BaseDistribution]:
    """Distributions of the pruner and of an allocation's parameters."""
    floats = {name: FloatDistribution(*ends) for name, ends in space.intervals[branch].items()}
    return {"pruner": CategoricalDistribution(space.pruners), **floats}


def branch_study(
    trials: list[FrozenTrial], space: Space, branch: str, kinds: dict[str, BaseDistribution], objectives: int = 1
) -> optuna.Study:
    """A study in memory of the trials that are points of one allocation, with the logs of their values."""
    shadow = optuna.create_study(directions=["minimize"] * objectives)
    for trial in trials:
        params = space.within(trial.params, branch) or {}
        if kinds.keys() <= params.keys():  # another process may not have drawn all of its trial's yet
            shadow.add_trial(_with_logs(trial, {name: params[name] for name in kinds}, kinds))
    return shadow


def levelled(screened: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of a screening that have not been measured in full, as if they had been: the logs of their values
    moved by the mean difference at the points where both are known; none where there is no such point.
    """
    if not screened:
        return []
    known = {_point(trial): trial.value for trial in trials}
    values = [(known.get(_point(trial)), trial.value) for trial in screened]
    both = [(full, part) for full, part in values if full is not None and part is not None]
    moves = [math.log(max(full, LEAST) / max(part, LEAST)) for full, part in both]
    if not moves:
        return []
    factor = math.exp(statistics.fmean(moves))
    new = [trial for trial in screened if _point(trial) not in known and trial.value is not None]
    return [
        optuna.create_trial(value=factor * trial.value, params=trial.params, distributions=trial.distributions)
        for trial in new
        if trial.value is not None
    ]


def _point(trial: FrozenTrial) -> tuple[tuple[str, Any], ...]:
    """A trial's parameters in an order that no database decides."""
    return tuple(sorted(trial.params.items()))


def _with_logs(trial: FrozenTrial, params: Params, distributions: dict[str, BaseDistribution]) -> FrozenTrial:
    logs = None if trial.values is None else [math.log(max(value, LEAST)) for value in trial.values]
    return optuna.create_trial(state=trial.state, values=logs, params=params, distributions=distributions)


def around_best(study: Study, kinds: dict[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """The intervals, narrowed around the best point where there are more than two of them.

    A dozen trials cannot explore five dimensions, whose corners are all hopeless and which a GP would all try. So
    proposals reach from the best point at most 1 / (2 √n) of each interval, n measured points.
    """
    intervals = {name: kind for name, kind in kinds.items() if isinstance(kind, FloatDistribution)}
    done = [trial for trial in study.trials if trial.values is not None]
    if len(intervals) <= 2 or not done:
        return kinds
    best, reach = min(done, key=values_of).params, 0.5 / math.sqrt(len(done))
    return kinds | {name: within_reach(best[name], kind, reach) for name, kind in intervals.items()}


def within_reach(value: float, kind: FloatDistribution, reach: float) -> FloatDistribution:
    """The part of an interval around a value, `reach` of its width to either side."""
    width = reach * (kind.high - kind.low)
    return FloatDistribution(max(kind.low, value - width), min(kind.high, value + width))


def nudge_from_known(
    point: Params, trials: Sequence[FrozenTrial], kinds: dict[str, BaseDistribution], seed: int
) -> Params:
    """The point itself, if no trial is near it, else one beside it; `trials` may still be running."""
    drawn, reach, generator = point, REACH, random.Random(seed)
    intervals = {name: kind for name, kind in kinds.items() if isinstance(kind, FloatDistribution)}
    for _ in range(DRAWS if intervals else 0):
        if not any(is_near(drawn, trial.params, kinds, NEAR) for trial in trials):
            return drawn
        beside = {name: within_reach(point[name], kind, reach) for name, kind in intervals.items()}
        drawn = point | {name: generator.uniform(part.low, part.high) for name, part in beside.items()}
        reach *= 2
    return drawn


def is_near(point: Params, other: Params, kinds: dict[str, BaseDistribution], share: float) -> bool:
    """Whether two points differ in numbers alone, and by no more than a share of each interval."""
    return all(
        abs(point[name] - other[name]) <= share * (kind.high - kind.low)
        if isinstance(kind, FloatDistribution)
        else point[name] == other[name]
        for name, kind in kinds.items()
    )
