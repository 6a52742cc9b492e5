"""When a study has settled: no better trial is to be expected that could be told from the best.

Two differences of logs, of perplexity (so in nats per token) or of KL; a difference d is a change by e^d - 1:

    regret    how much lower the log could still be: of a Gaussian process over the trials of an allocation,
              the best value that its lower bound allows, against the upper bound at the best trials
    noise     the standard error with which the best is told from uniform, over paired windows, or uniform, if it is
              the best, from the first other point; where the two are not there yet, nothing has settled

Settled is a study in which the regret of every allocation is below the noise. A gain that a further trial may bring is
then smaller than the error of the very comparison that the study is made for.

Source: Makarova et al., "Automatic Termination for Hyperparameter Optimization", AutoML 2022, as `RegretBoundEvaluator`
in Optuna, which bounds the regret; there the noise is that of cross-validation.
"""

import math
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from atp_tune.results.summary import is_uniform, uniform_of
from atp_tune.scores.divergence import relative
from atp_tune.scores.perplexity import change
from atp_tune.search.samplers import STARTS, branch_study, kinds_of
from atp_tune.search.space import Space
from atp_tune.trials.storage import best_trial, measured

LEAST = STARTS + 2  # measured points of an allocation, below which a model of it says little


def has_settled(study: optuna.Study, space: Space) -> bool:
    """Whether a further trial of any allocation is expected to gain less than the noise."""
    noise = noise_of(study)
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    return noise is not None and all(
        regret_of(trials, space, branch) < noise for branch in space.intervals if space.is_open(branch)
    )


def noise_of(study: optuna.Study) -> float | None:
    """Standard error of the log of the best trial's value over that of another, by paired windows."""
    best = best_trial(study)
    other = uniform_of(study, best)
    if best is not None and other is best:
        other = _first_other(study, best)
    kind = "kls" if best and "kls" in best.user_attrs else "nlls"
    own, base = (trial.user_attrs.get(kind, []) if trial else [] for trial in (best, other))
    if len(own) != len(base) or len(own) < 2:
        return None
    paired = relative(base, own) if kind == "kls" else change(base, own)
    return paired.stderr / (1 + paired.value) if paired and paired.value > -1 else None


def _first_other(study: optuna.Study, uniform: FrozenTrial) -> FrozenTrial | None:
    """The first trial with uniform's pruner that is another point: where an allocation's search begins."""
    own = (trial for trial in measured(study) if trial.params.get("pruner") == uniform.params.get("pruner"))
    return min((trial for trial in own if not is_uniform(trial)), key=lambda trial: trial.number, default=None)


def regret_of(trials: list[FrozenTrial], space: Space, branch: str) -> float:
    """Bound of the regret in one allocation, as a difference of logs; infinite where too few trials say enough."""
    from optuna.terminator import RegretBoundEvaluator

    points = branch_study(trials, space, branch, kinds_of(space, branch)).trials
    if len(points) < LEAST:
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RegretBoundEvaluator(min_n_trials=LEAST, seed=0).evaluate(points, StudyDirection.MINIMIZE)
