"""When a study has settled: what a better point could still gain is bounded by `GAIN`.

That takes three things of every allocation, after each of the last `RUN` trials, and nothing better found meanwhile:

    points    `LEAST` of them, since a few suit a model by chance
    regret    how much lower the log of the value (perplexity or KL) could still be, bounded at 90 % confidence by a
              Gaussian process over the better half of the points: from the upper bound at the best ones to the lowest
              value that its lower bound allows anywhere
    no gaps   a model that has seen one basin takes the rest for flat: beside a point that is nearly as good as the best
              (`NEAR`), no stretch without a point may be wider than `GAP` of its parameter's interval

These verdicts are read from the trials in the order in which they ended, so that a study that was interrupted, or has
several workers, ends as any other does. The bound is of the validation text; it says nothing about another text
(docs/speed.md, with what was measured).

Source: Makarova et al., "Automatic Termination for Hyperparameter Optimization", AutoML 2022, as `RegretBoundEvaluator`
in Optuna. There the regret is compared with the noise of cross-validation; why it is not here: docs/log.md.
"""

import math
import warnings
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from atp_tune.search.proposals import branch_study, kinds_of
from atp_tune.search.space import Space
from atp_tune.storage.ranking import ranked

GAIN = 0.02  # of the value: what a better point may still gain once a study has settled
LEAST = 8  # different points of an allocation
RUN = 3  # trials in a row
GAP = 1 / 5  # of an interval
NEAR = 0.1  # a difference of logs


def should_terminate(study: optuna.Study, space: Space) -> bool:
    """Whether a better point of any allocation would gain less than `GAIN`, by each of the last `RUN` verdicts, which
    must be about one point: a model that was right does not find a better one meanwhile.
    """
    trials, branches = _in_order(study), [branch for branch in space.intervals if space.is_open(branch)]
    parts = [trials[: len(trials) - back] for back in range(RUN)]
    if not branches or len({_best_of(part) for part in parts}) > 1:
        return False
    limit = -math.log1p(-GAIN)
    return all(regret_of(part, space, branch) < limit for part in parts for branch in branches)


def _in_order(study: optuna.Study) -> list[FrozenTrial]:
    """The trials with a value of their own in the order in which they ended; a repetition teaches nothing."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    own = (trial for trial in trials if "repeats" not in trial.user_attrs)
    return sorted(own, key=lambda trial: (trial.datetime_complete or datetime.min, trial.number))


def _best_of(trials: Sequence[FrozenTrial]) -> int | None:
    return next((trial.number for trial in ranked(trials)), None)


def regret_of(trials: Sequence[FrozenTrial], space: Space, branch: str) -> float:
    """Bound of the regret in one allocation, as a difference of logs; infinite where too little is known to say."""
    from optuna.terminator import RegretBoundEvaluator

    kinds = kinds_of(space, branch)
    points = branch_study(list(trials), space, branch, kinds).trials
    if len(points) < LEAST or has_gap(points, kinds):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RegretBoundEvaluator(min_n_trials=LEAST, seed=0).evaluate(points, StudyDirection.MINIMIZE)


def has_gap(points: Sequence[FrozenTrial], kinds: dict[str, BaseDistribution]) -> bool:
    """Whether some pruner has a wide stretch of a parameter without a point, and beside it one nearly the best.

    `points` are an allocation's trials with the logs of their values, `kinds` its distributions.
    """
    limit = min(point.value for point in points if point.value is not None) + NEAR
    for pruner in {point.params["pruner"] for point in points}:
        own = [point for point in points if point.params["pruner"] == pruner]
        for name, kind in kinds.items():
            if isinstance(kind, FloatDistribution) and any(
                width > GAP * (kind.high - kind.low) and value < limit for width, value in _stretches(own, name, kind)
            ):
                return True
    return False


def _stretches(points: Sequence[FrozenTrial], name: str, kind: FloatDistribution) -> list[tuple[float, float]]:
    """Widths of the stretches between neighbours in a parameter and the ends of its interval, each with the lower of
    the values beside it.
    """
    known = sorted((point.params[name], math.inf if point.value is None else point.value) for point in points)
    ends = [(kind.low, math.inf), *known, (kind.high, math.inf)]
    return [(right - left, min(a, b)) for (left, a), (right, b) in pairwise(ends)]
