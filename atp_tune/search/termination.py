"""Early termination: a study ends when a better point is expected to gain less than `GAIN`.

For each of the last `RUN` trials, without a new best among them, every allocation must have

    points    at least `LEAST`: fewer may fit a model by chance
    regret    below `GAIN`: how much lower the log of perplexity or KL could be, bounded at 90 % confidence by a
              Gaussian process over the better half of the points: its upper bound at the best points minus the minimum
              of its lower bound
    no gaps   beside a point within `NEAR` of the best, no stretch without a point is wider than `GAP` of its
              parameter's interval: a model that has seen one valley predicts a flat curve elsewhere

Trials are read in the order in which they ended, so interruptions and several workers do not change the verdict. The
bound holds for the validation text only (docs/speed.md has measurements).

Source: Makarova et al., "Automatic Termination for Hyperparameter Optimization", AutoML 2022, as `RegretBoundEvaluator`
in Optuna. The paper compares the regret with the noise of cross-validation; docs/log.md says why this module does not.
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

from atp_tune.plan import method_in
from atp_tune.search.proposals import branch_study
from atp_tune.search.space import Space
from atp_tune.storage.progress import ranked

GAIN = 0.02  # relative gain of a better point below which the study ends
LEAST = 8  # different points of an allocation
RUN = 3  # trials in a row
GAP = 1 / 5  # of an interval
NEAR = 0.1  # difference of logs


def should_terminate(study: optuna.Study, space: Space) -> bool:
    """Whether, after each of the last `RUN` trials, all regret bounds were below `GAIN` and the best was the same.

    A new best among these trials would show that the model was wrong.
    """
    trials, branches = _in_order(study), [branch for branch in space.intervals if space.is_open(branch)]
    parts = [trials[: len(trials) - back] for back in range(RUN)]
    if not branches or len({_best_of(part) for part in parts}) > 1:
        return False
    limit = -math.log1p(-GAIN)
    return all(regret_of(part, space, branch) < limit for part in parts for branch in branches)


def _in_order(study: optuna.Study) -> list[FrozenTrial]:
    """The measured trials, without repetitions, in the order in which they ended."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    own = (trial for trial in trials if "repeats" not in trial.user_attrs)
    return sorted(own, key=lambda trial: (trial.datetime_complete or datetime.min, trial.number))


def _best_of(trials: Sequence[FrozenTrial]) -> int | None:
    return next((trial.number for trial in ranked(trials)), None)


def regret_of(trials: Sequence[FrozenTrial], space: Space, branch: str) -> float:
    """Bound of the regret in one allocation, as a difference of logs; infinite with too few points or a gap."""
    from optuna.terminator import RegretBoundEvaluator

    kinds = space.kinds(branch)
    points = branch_study(list(trials), space, branch, kinds).trials
    if len(points) < LEAST or has_gap(points, kinds):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RegretBoundEvaluator(min_n_trials=LEAST, seed=0).evaluate(points, StudyDirection.MINIMIZE)


def has_gap(points: Sequence[FrozenTrial], kinds: dict[str, BaseDistribution]) -> bool:
    """Whether a pruner has a point near the best beside a wide stretch of a parameter without a point.

    `points`: an allocation's trials with the logs of their values; `kinds`: its distributions.
    """
    limit = min(point.value for point in points if point.value is not None) + NEAR
    for pruner in {method_in(point.params) for point in points}:
        own = [point for point in points if method_in(point.params) == pruner]
        for name, kind in kinds.items():
            if isinstance(kind, FloatDistribution) and any(
                width > GAP * (kind.high - kind.low) and value < limit for width, value in _stretches(own, name, kind)
            ):
                return True
    return False


def _stretches(points: Sequence[FrozenTrial], name: str, kind: FloatDistribution) -> list[tuple[float, float]]:
    """Widths between neighbouring points of a parameter and its interval's ends, each with the lower adjacent value."""
    known = sorted((point.params[name], math.inf if point.value is None else point.value) for point in points)
    ends = [(kind.low, math.inf), *known, (kind.high, math.inf)]
    return [(right - left, min(a, b)) for (left, a), (right, b) in pairwise(ends)]
