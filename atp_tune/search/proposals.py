"""The trials of one allocation as a sampler is fitted to them, and where the points that the sampler proposes may lie.

A measured point teaches nothing new. Where the best point is an end of its interval (uniform, if β > 0 does not help),
the GP's acquisition has its maximum at that same point again and again. Then a neighbour is drawn uniformly, at most a
40th of each interval away, and twice as far after each draw that is known too.
"""

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

from atp_tune.plan import METHODS
from atp_tune.search.space import Params, Space
from atp_tune.storage.progress import place

LEAST = 1e-6  # nats per token: a smaller KL is raised to this before its log is taken
NEAR = 1 / 500  # of an interval: two β of SmolLM2 at 60 % this near differ by less than one weight per row
REACH = 1 / 40  # of an interval, for the first draw
DRAWS = 20
ORDER = ("misses", "nlls")  # attributes by which equal values are ordered
GRID = 40  # steps of β at which the posterior is stored

Distributions = dict[str, BaseDistribution]


def branch_study(
    trials: list[FrozenTrial], space: Space, branch: str, kinds: Distributions, objectives: int = 1
) -> optuna.Study:
    """An in-memory study of an allocation's points, with the logs of their first values and what `place` reads."""
    shadow = optuna.create_study(directions=["minimize"] * objectives)
    for trial in trials:
        params = space.within(trial.params, branch) or {}
        if kinds.keys() <= params.keys():  # a trial of another process may lack parameters that it has yet to draw
            done = [] if trial.values is None else trial.values[:objectives]
            logs = [math.log(max(value, LEAST)) for value in done] or None
            own = {name: params[name] for name in kinds}
            attrs = {key: trial.user_attrs[key] for key in ORDER if key in trial.user_attrs}
            shadow.add_trial(
                optuna.create_trial(state=trial.state, values=logs, params=own, distributions=kinds, user_attrs=attrs)
            )
    return shadow


def levelled(screened: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Screening trials without a full measurement, their values scaled to the level of the full measurements.

    The factor is the geometric mean of full / screened at the points that have both; no trials where no point has both.
    """
    known = {_point(trial): trial.value for trial in trials} if screened else {}
    ratios = [
        math.log(max(full, LEAST) / max(trial.value, LEAST))
        for trial in screened
        if trial.value is not None and (full := known.get(_point(trial))) is not None
    ]
    if not ratios:
        return []
    factor = math.exp(statistics.fmean(ratios))
    return [
        optuna.create_trial(value=factor * trial.value, params=trial.params, distributions=trial.distributions)
        for trial in screened
        if _point(trial) not in known and trial.value is not None
    ]


def _point(trial: FrozenTrial) -> tuple[tuple[str, Any], ...]:
    """A trial's parameters sorted by name: databases return them in any order."""
    return tuple(sorted(trial.params.items()))


def around_best(study: Study, kinds: Distributions) -> Distributions:
    """The intervals, narrowed around the best point if there are more than two.

    A dozen trials cannot explore five dimensions: a GP would try all the corners, which are hopeless. So proposals
    stay within 1 / (2 √n) of each interval from the best of n measured points.
    """
    intervals = {name: kind for name, kind in kinds.items() if isinstance(kind, FloatDistribution)}
    done = [trial for trial in study.trials if trial.values is not None]
    if len(intervals) <= 2 or not done or len(study.directions) > 1:
        return kinds
    best, reach = min(done, key=place).params, 0.5 / math.sqrt(len(done))
    return kinds | {name: within_reach(best[name], kind, reach) for name, kind in intervals.items()}


def within_reach(value: float, kind: FloatDistribution, reach: float) -> FloatDistribution:
    """The part of an interval around a value, `reach` of its width to either side."""
    width = reach * (kind.high - kind.low)
    return FloatDistribution(max(kind.low, value - width), min(kind.high, value + width))


def nudge_from_known(point: Params, trials: Sequence[FrozenTrial], kinds: Distributions, seed: int) -> Params:
    """The point itself, or a random neighbour if a trial (finished or running) is near the point."""
    drawn, reach, generator = point, REACH, random.Random(seed)
    intervals = {name: kind for name, kind in kinds.items() if isinstance(kind, FloatDistribution)}
    for _ in range(DRAWS if intervals else 0):
        if not any(is_near(drawn, trial.params, kinds, NEAR) for trial in trials):
            return drawn
        beside = {name: within_reach(point[name], kind, reach) for name, kind in intervals.items()}
        drawn = point | {name: generator.uniform(part.low, part.high) for name, part in beside.items()}
        reach *= 2
    return drawn


def is_near(point: Params, other: Params, kinds: Distributions, share: float) -> bool:
    """Whether two points differ in numbers only, and by no more than this share of each interval."""
    return all(
        abs(point[name] - other[name]) <= share * (kind.high - kind.low)
        if isinstance(kind, FloatDistribution)
        else point[name] == other[name]
        for name, kind in kinds.items()
    )


def gp_posterior(sampler: GPSampler, study: Study, kinds: Distributions, pruners: tuple[str, ...]) -> dict[str, Any]:
    """The GP's posterior of the value over β for each pruner: mean, and mean ± two standard deviations, for plots.

    `study` is the one that the GP was fitted to: its values are logs. `before` counts those values.
    """
    from atp_tune.compat import fitted

    gp = fitted(sampler)
    values = [trial.value for trial in study.trials if trial.value is not None]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    curves = {}
    for pruner in pruners:
        points = [_at(beta, pruner, kinds) for beta in _grid(kinds["beta"])]
        means, deviations = posterior_at(gp, points, kinds)
        middle, width = mean + spread * means, 2 * spread * deviations
        lines = {"mean": middle, "low": middle - width, "high": middle + width}
        betas = [round(point.params["beta"], 8) for point in points]
        curves[pruner] = {"beta": betas} | {name: [round(math.exp(v), 3) for v in line] for name, line in lines.items()}
    return {"before": len(values), "curves": curves}


def posterior_at(gp: Any, points: list[FrozenTrial], kinds: Distributions) -> tuple[Any, Any]:
    """Mean and standard deviation of a fitted GP's posterior at points, as arrays, for standardised values."""
    from atp_tune.compat import SearchSpace

    inputs = gp._X_train.new_tensor(SearchSpace(kinds).get_normalized_params(points))
    means, variances = (tensor.detach().numpy() for tensor in gp.posterior(inputs))
    return -means, variances**0.5  # the GP maximises: its values are negated


def _grid(kind: BaseDistribution) -> list[float]:
    assert isinstance(kind, FloatDistribution)
    steps = [kind.low + (kind.high - kind.low) * k / GRID for k in range(GRID)]
    return [*steps, kind.high]  # a computed end may exceed `high` by rounding, which Optuna refuses


def _at(beta: float, pruner: str, kinds: Distributions) -> FrozenTrial:
    params = {name: pruner if name in METHODS else beta for name in kinds}
    return optuna.create_trial(value=0.0, params=params, distributions=kinds)
