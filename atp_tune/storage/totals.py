"""Which trials count towards a study's total, which are too many, and when a study has settled for fewer."""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.storage.lost_trials import is_double, is_given_up

START = "start"  # attribute of the trials that a study begins with


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's total: it has a value, failed by itself, or was given up."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ("failure" in trial.user_attrs or is_given_up(trial))
    )


def counted(study: optuna.Study) -> int:
    """Number of trials that count towards the total."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def terminate_early(study: optuna.Study, asked: int) -> None:
    """Lowers the total of a study that was asked for so many trials to those that it has, and those that run."""
    have = counted(study) + len(running(study))
    study.set_user_attr("terminated_early", [asked, have])
    study.set_user_attr("total", have)


def total_of(study: optuna.Study, asked: int, goes_on: bool = False) -> int:
    """The total of a study that is asked for so many trials: fewer, if it settled before, unless it `goes_on` all the
    same; more than it was asked for then go on.
    """
    limit, have = study.user_attrs.get("terminated_early", (0, 0))
    return int(have) if asked <= limit and not goes_on else asked


def is_repetition(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether a trial is one that the study begins with, and an earlier one has measured or measures it: two workers
    that begin a study at the same moment both queue its first trials.
    """
    before, trial = trials[:number], trials[number]
    queued = trial.system_attrs.get("fixed_params")
    same = (other for other in before if queued in (other.params, other.system_attrs.get("fixed_params")))
    return START in trial.user_attrs and any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same)


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether the total is reached without this trial, or another takes the place of the same lost one: two workers may
    both begin what they take for the last one, and both queue what a third one has lost.

    Numbers are given out one by one, so that all workers agree on which trials are too many.
    """
    begun = sum(counts(trial) or trial.state == TrialState.RUNNING for trial in trials[:number])
    return begun >= total or is_double(trials, number)


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that run now, here or elsewhere."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
