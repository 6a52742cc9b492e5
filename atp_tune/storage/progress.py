"""A study's progress: its measured trials in order, the best, and the trials that count towards its total."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.storage.lost_trials import is_double, is_given_up

START = "start"  # attribute of the trials that a study queues before its search


def measured(study: optuna.Study) -> list[FrozenTrial]:
    """The fully measured trials, the best first."""
    return ranked(study.get_trials(deepcopy=False))


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The fully measured ones among these trials, the lowest value first; with two values, the first counts.

    Of equal accuracies, which are common, the one with the lower cross-entropy.
    """
    done = (trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values is not None)
    return sorted((trial for trial in done if "stopped_after" not in trial.user_attrs), key=place)


def place(trial: FrozenTrial) -> list[float]:
    """The key that orders trials: the values, then, of accuracies, the cross-entropy."""
    nlls = trial.user_attrs.get("nlls") if "misses" in trial.user_attrs else None
    return [*values_of(trial), *([statistics.fmean(nlls)] if nlls else [])]


def values_of(trial: FrozenTrial) -> list[float]:
    """A trial's values, [] if it has none: Optuna's `value` fails where there are two."""
    return trial.values or []


def sparsity_of(trial: FrozenTrial) -> float | None:
    """The target sparsity that a trial drew; None in a study at one sparsity."""
    return trial.params.get("sparsity")


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's total: it has a value, its plan failed, or it was given up."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ("failure" in trial.user_attrs or is_given_up(trial))
    )


def counted(study: optuna.Study) -> int:
    """Number of trials that count towards the total."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that run now, in this process or another."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def points_of(study: optuna.Study) -> list[dict[str, Any]]:
    """The parameters of all trials, of a queued one those that it is to have."""
    trials = study.get_trials(deepcopy=False)
    return [{**trial.system_attrs.get("fixed_params", {}), **trial.params} for trial in trials]


def terminate_early(study: optuna.Study, total: int) -> None:
    """Lowers the study's total from the requested one to its counted and running trials."""
    have = counted(study) + len(running(study))
    study.set_user_attr("terminated_early", [total, have])
    study.set_user_attr("total", have)


def total_of(study: optuna.Study, total: int, goes_on: bool = False) -> int:
    """The study's total where this one is requested: lower if the study terminated early before that total.

    `goes_on`: the request overrides the early termination.
    """
    limit, have = study.user_attrs.get("terminated_early", (0, 0))
    return int(have) if total <= limit and not goes_on else total


def requested(study: optuna.Study) -> int | None:
    """Trials that were asked for, if the study ended after fewer; None if it did not."""
    asked, have = study.user_attrs.get("terminated_early", (0, 0))
    return int(asked) if asked and study.user_attrs.get("total") == have else None


def is_repetition(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether a first trial of the study has been measured, or is being measured, by an earlier trial.

    Two workers that begin a study at the same moment both queue its first trials.
    """
    before, trial = trials[:number], trials[number]
    queued = trial.system_attrs.get("fixed_params")
    same = (other for other in before if queued in (other.params, other.system_attrs.get("fixed_params")))
    return START in trial.user_attrs and any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same)


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether earlier trials reach the total, or one of them repeats the same lost trial.

    Two workers may both begin the last trial, and both queue a lost one. Trial numbers are unique, so all workers agree
    on which trials are surplus.
    """
    begun = sum(counts(trial) or trial.state == TrialState.RUNNING for trial in trials[:number])
    return begun >= total or is_double(trials, number)
