"""The measured trials of a study in order, the best of them, and the Pareto front of several objectives."""

from collections.abc import Iterable

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.storage.validation import readable


def measured(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were measured in full, the best first."""
    return ranked(study.get_trials(deepcopy=False))


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those of the trials that were measured in full, the lowest value first; of two values the first counts."""
    done = (trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values is not None)
    return sorted((trial for trial in done if "stopped_after" not in trial.user_attrs), key=values_of)


def values_of(trial: FrozenTrial) -> list[float]:
    """A trial's values, none where it has none: Optuna's own property fails where there are two."""
    return trial.values or []


def front_of(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study of several objectives that no other beats in one value without losing in another (the
    Pareto front), the lowest perplexity first; none of a study that has one.
    """
    if len(study.directions) == 1:
        return []
    with readable(study.study_name):
        return [trial for trial in ranked(study.best_trials) if "repeats" not in trial.user_attrs]


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The best trial among those measured in full, if there is one: the lowest value, of two values the first."""
    return next(iter(measured(study)), None)
