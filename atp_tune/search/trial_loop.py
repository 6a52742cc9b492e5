"""The loop over trials until the total is reached: runs them, recovers lost ones, waits for those elsewhere."""

from collections.abc import Callable
from time import monotonic, sleep
from typing import TYPE_CHECKING

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import TrialError, UserError
from atp_tune.events import TrialEnded
from atp_tune.results.formatting import loss_of
from atp_tune.results.trials import is_by_kl, kl_of, score_of
from atp_tune.search.space import Space
from atp_tune.search.study_run import StudyRun
from atp_tune.search.termination import GAIN, should_terminate
from atp_tune.storage import lost_trials, ranking, totals
from atp_tune.storage.process_identity import GRACE
from atp_tune.storage.trace import Trace

if TYPE_CHECKING:
    from atp_tune.search.context import TrialContext
    from atp_tune.search.objective import Objective

POLL = 2  # seconds between looks at a trial that runs elsewhere


def run_trials(run: StudyRun, study: optuna.Study, context: "TrialContext", space: Space, total: int) -> int:
    """Runs trials until the total is reached or the time is up; trials that run elsewhere count as theirs.

    The total that was reached, or is to be: another run may ask for another one meanwhile.
    """
    from atp_tune.search.objective import Objective

    search = run.file.study.search
    objective = Objective(context, space, search.stopper != "none", run.watch, search.objective)
    end = None if run.timeout is None else monotonic() + run.timeout
    while end is None or monotonic() < end:
        trials = recover_lost(run, study)
        total = study.user_attrs.get("total", total)
        elsewhere = [trial for trial in trials if trial.state == TrialState.RUNNING]
        remaining = total - sum(map(totals.counts, trials)) - len(elsewhere)
        if remaining > 0:
            _optimise(run, study, objective, remaining, total, end)
        elif elsewhere:
            _wait(run, study, elsewhere[0])
        else:
            break
    return total


def recover_lost(run: StudyRun, study: optuna.Study) -> list[FrozenTrial]:
    """Ends the trials that nobody runs any more, and tells of them; all trials as they are then."""
    trials = study.get_trials(deepcopy=False)
    if lost := lost_trials.recover(study, trials):
        trials = study.get_trials(deepcopy=False)
        for number in lost:
            run.note(loss_of(trials[number]))
    return trials


def _optimise(
    run: StudyRun,
    study: optuna.Study,
    objective: "Objective",
    n_trials: int,
    total: int,
    end: float | None,
) -> None:
    def ended(study: optuna.Study, trial: FrozenTrial) -> None:
        trials = recover_lost(run, study)  # read once: a study of many workers is long, and its trials are short
        best, done = next(iter(ranking.ranked(trials)), None), sum(map(totals.counts, trials))
        reason = trial.user_attrs.get("failure") if trial.state == TrialState.FAIL else None
        if trial.values is not None or reason:
            run.watch(_ended(trial, reason, best, done, total))
        if run.file.study.search.early_termination and done < total and should_terminate(study, objective.space):
            totals.terminate_early(study, total)
            run.note(
                f"terminated early after {done} of {total}: a better point is expected to gain less than {GAIN:.0%}"
            )
            study.stop()
        is_late = end is not None and monotonic() >= end  # Optuna's own timeout goes by a clock that may be set
        running = sum(other.state == TrialState.RUNNING for other in trials)
        if is_late or done + running >= total:  # other processes have done, or do, the rest
            study.stop()

    attempt = Attempt(objective, total, run.trace)
    try:
        study.optimize(attempt, n_trials=n_trials, catch=(TrialError,), callbacks=[ended])
    except KeyboardInterrupt:
        lost_trials.recover(study)
        raise
    except UnboundLocalError as error:  # Optuna's own, where a trial can neither be told nor read, or Ctrl-C came then
        cause = error.__context__
        if isinstance(cause, KeyboardInterrupt):
            lost_trials.end_interrupted(study, attempt.number)
        raise cause if isinstance(cause, UserError | KeyboardInterrupt) else error from None
    except (UpdateFinishedTrialError, ValueError, AssertionError) as error:
        if isinstance(error.__context__, UserError):  # the storage took neither the value nor the failure
            raise error.__context__ from None
        if not attempt.is_lost(study):
            raise
        run.note(f"trial {attempt.number} gave no sign of life for {GRACE} s: it is run again")


def _ended(trial: FrozenTrial, reason: str | None, best: FrozenTrial | None, done: int, total: int) -> TrialEnded:
    """What is told of a trial: what it came to, and the best."""
    value, kl = (found.value if found else None for found in (score_of(trial), kl_of(trial)))
    best_value, best_kl = (of(best) if best else None for of in (score_of, kl_of))
    return TrialEnded(
        trial.number, value, reason, best_value.value if best_value else None, done, total,
        kl=kl, best_kl=best_kl.value if best and best_kl and is_by_kl(best) else None,
    )  # fmt: skip


class Attempt:
    """Calls the objective unless other workers have reached the total, and knows afterwards whether they took its trial
    for lost while it ran: Optuna has no error of its own for telling such a trial, what it raises looks like a bug.
    """

    def __init__(self, objective: Callable[[optuna.Trial], tuple[float, ...]], total: int, trace: Trace) -> None:
        self.number = -1
        self._objective = objective
        self._total = total
        self._trace = trace
        self._is_bug = False

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The objective's values."""
        self.number, self._is_bug = trial.number, True
        try:
            self._check_need(trial)
            with self._trace.of(trial.study.study_name, trial.number):
                value = self._objective(trial)
        except (TrialError, UpdateFinishedTrialError):
            self._is_bug = False
            raise
        self._is_bug = False
        return value

    def _check_need(self, trial: optuna.Trial) -> None:
        trials, number = trial.study.get_trials(deepcopy=False), trial.number
        if totals.is_surplus(trials, number, self._total) or totals.is_repetition(trials, number):
            trial.set_user_attr("lost", lost_trials.SURPLUS)
            raise TrialError("not needed")

    def is_lost(self, study: optuna.Study) -> bool:
        """Whether the last trial was ended by somebody else."""
        return self.number >= 0 and not self._is_bug and study.trials[self.number].state.is_finished()


def _wait(run: StudyRun, study: optuna.Study, trial: FrozenTrial) -> None:
    """Gives a trial that runs elsewhere the time to end, or to show no sign of life."""
    where = trial.user_attrs.get("host", "another process")
    run.note(f"waiting for trial {trial.number}, which {where} runs (or was running when it stopped)")
    while any(other.number == trial.number for other in totals.running(study)):
        sleep(POLL)
        recover_lost(run, study)
