"""The loop over trials: runs them, recovers lost trials, and waits for trials of other processes."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from time import monotonic, sleep
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import TrialError, UserError
from atp_tune.events import TrialEnded
from atp_tune.plan import method_in
from atp_tune.results.formatting import why_lost
from atp_tune.results.goals import goal_in
from atp_tune.results.results import Results
from atp_tune.search.goals import AtSparsity
from atp_tune.search.samplers import branch_study
from atp_tune.search.space import Distributions, Space
from atp_tune.storage import progress
from atp_tune.storage.attributes import ValidatedStudy
from atp_tune.storage.fingerprint import facts_in, stored_objectives
from atp_tune.storage.progress import GRACE, Trace, ranked, trials_in

if TYPE_CHECKING:
    from atp_tune.run.session import Session
    from atp_tune.search.objective import Objective
    from atp_tune.search.runner import StudyRun

# --- Early termination: a study ends when a better point is expected to gain less than `GAIN`.
#
# For each of the last `RUN` trials, without a new best among them, every allocation must have
#
#     points    at least `LEAST`: fewer may fit a model by chance
#     regret    below `GAIN`: how much lower the log of perplexity or KL could be, bounded at 90 % confidence by a
#               Gaussian process over the better half of the points: its upper bound at the best points minus the
#               minimum of its lower bound
#     no gaps   beside a point within `NEAR` of the best, no stretch without a point is wider than `GAP` of its
#               parameter's interval: a model that has seen one valley predicts a flat curve elsewhere
#
# Trials are read in the order in which they ended, so interruptions and several workers do not change the verdict. The
# bound holds for the validation text only (docs/speed.md has measurements).
#
# Source: Makarova et al., "Automatic Termination for Hyperparameter Optimization", AutoML 2022, as
# `RegretBoundEvaluator` in Optuna. The paper compares the regret with the noise of cross-validation; docs/log.md says
# why this module does not.

GAIN = 0.02  # relative gain of a better point below which the study ends
LEAST = 8  # different points of an allocation
RUN = 3  # trials in a row
GAP = 1 / 5  # of an interval
NEAR = 0.1  # difference of logs


def should_terminate(study: optuna.Study, space: Space) -> bool:
    """Whether, after each of the last `RUN` trials, all regret bounds were below `GAIN` and the best was the same.

    A new best among these trials would show that the model was wrong.
    """
    # The measured trials, without repetitions, in the order in which they ended.
    own = (trial for trial in trials_in(study, TrialState.COMPLETE) if "repeats" not in trial.user_attrs)
    trials = sorted(own, key=lambda trial: (trial.datetime_complete or datetime.min, trial.number))
    branches = [branch for branch in space.intervals if space.is_open(branch)]
    parts = [trials[: len(trials) - back] for back in range(RUN)]
    if not branches or len({_best_number(part) for part in parts}) > 1:
        return False
    limit = -math.log1p(-GAIN)
    return all(regret_bound(part, space, branch) < limit for part in parts for branch in branches)


def _best_number(trials: Sequence[FrozenTrial]) -> int | None:
    return next((trial.number for trial in ranked(trials)), None)


def regret_bound(trials: Sequence[FrozenTrial], space: Space, branch: str) -> float:
    """Bound of the regret in one allocation, as a difference of logs; infinite with too few points or a gap."""
    from optuna.terminator import RegretBoundEvaluator

    kinds = space.kinds(branch)
    points = branch_study(list(trials), space, branch, kinds).trials
    if len(points) < LEAST or has_gap(points, kinds):
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RegretBoundEvaluator(min_n_trials=LEAST, seed=0).evaluate(points, StudyDirection.MINIMIZE)


def has_gap(points: Sequence[FrozenTrial], kinds: Distributions) -> bool:
    """Whether a pruner has a point near the best beside a wide stretch of a parameter without a point.

    `points`: an allocation's trials with the logs of their values; `kinds`: its distributions.
    """
    near_best = min(point.value for point in points if point.value is not None) + NEAR
    for pruner in {method_in(point.params) for point in points}:
        own = [point for point in points if method_in(point.params) == pruner]
        for name, kind in kinds.items():
            if not isinstance(kind, FloatDistribution):
                continue
            # The points by this parameter between its interval's ends; of two neighbours the lower value counts.
            pairs = sorted((point.params[name], math.inf if point.value is None else point.value) for point in own)
            if any(
                right - left > GAP * (kind.high - kind.low) and min(a, b) < near_best
                for (left, a), (right, b) in pairwise([(kind.low, math.inf), *pairs, (kind.high, math.inf)])
            ):
                return True
    return False


POLL = 2  # seconds between looks at a trial of another process
PUBLISH = 30  # seconds between writes of note and figures, each of which takes half a second


def run_trials(run: "StudyRun", study: optuna.Study, session: "Session", goal: AtSparsity, total: int) -> int:
    """Runs trials until the total is reached or the time is up, and returns the study's present total.

    Another run may change the total meanwhile. Trials that other processes run are not run again.
    """
    from atp_tune.search.objective import Objective

    search = run.file.study.search
    objective = Objective(
        session,
        goal.space,
        search.stopper != "none",
        run.watch,
        search.objective,
        None if run.screens else run.tasks,
        run.file.study.compares_all,
    )
    callbacks = Callbacks(run)
    end = None if run.timeout is None else monotonic() + run.timeout
    while end is None or monotonic() < end:
        trials = recover_lost(run, study)
        total = study.user_attrs.get("total", total)
        elsewhere = [trial for trial in trials if trial.state == TrialState.RUNNING]
        remaining = total - sum(map(progress.counts, trials)) - len(elsewhere)
        is_idle = goal.is_idle(study)
        if is_idle and remaining > 0 and not elsewhere:
            run.note(f"ended after {total - remaining} of {total}: {goal.reached}")
            progress.terminate_early(study, total)
        elif remaining > 0 and not is_idle:
            _optimise(run, study, objective, remaining, total, end, callbacks, goal)
        elif elsewhere:
            # Waits until a trial of another process ends or is recovered as lost.
            number, where = elsewhere[0].number, elsewhere[0].user_attrs.get("host", "another process")
            run.note(f"waiting for trial {number}, which {where} runs (or was running when it stopped)")
            while any(other.number == number for other in progress.running(study)):
                sleep(POLL)
                recover_lost(run, study)
        else:
            break
    return total


def recover_lost(run: "StudyRun", study: optuna.Study) -> list[FrozenTrial]:
    """Fails and reports the running trials without a live process; returns all trials after that."""
    trials = trials_in(study)
    if lost := progress.requeue_lost(study, trials):
        trials = trials_in(study)
        for number in lost:
            run.note(why_lost(trials[number]))
    return trials


def _optimise(
    run: "StudyRun",
    study: optuna.Study,
    objective: "Objective",
    n_trials: int,
    total: int,
    end: float | None,
    callbacks: "Callbacks",
    goal: AtSparsity,
) -> None:
    def ended(study: optuna.Study, trial: FrozenTrial) -> None:
        trials = recover_lost(run, study)  # read once: reading a long study costs time at each short trial
        best, done = goal_in(study).best(trials), sum(map(progress.counts, trials))
        reason = trial.user_attrs.get("failure") if trial.state == TrialState.FAIL else None
        if trial.values is not None or reason:
            objectives = stored_objectives(facts_in(study))
            # The event of a trial's end, with its values and the best.
            results = Results({}, trials, objectives)
            scores = {
                by.name: score.value for by in results.measures if (score := results.score(trial, "validation", by))
            }
            lowest = results.score(best, "validation", results.main)
            run.watch(
                TrialEnded(
                    trial.number,
                    scores,
                    reason,
                    {results.main.name: lowest.value} if lowest else {},
                    done,
                    total,
                    best_sparsity=progress.target_sparsity(best) if best else None,
                )
            )
        callbacks(study, trial, best, done, total)
        if run.file.study.search.early_termination and done < total and should_terminate(study, objective.space):
            progress.terminate_early(study, total)
            run.note(
                f"terminated early after {done} of {total}: a better point is expected to gain less than {GAIN:.0%}"
            )
            study.stop()
        if goal.is_idle(study):
            study.stop()
        is_late = end is not None and monotonic() >= end  # Optuna's timeout depends on the wall clock
        running = sum(other.state == TrialState.RUNNING for other in trials)
        if is_late or done + running >= total:  # other processes run the remaining trials
            study.stop()

    attempt = Attempt(objective, total, run.trace)
    try:
        study.optimize(attempt, n_trials=n_trials, catch=(TrialError,), callbacks=[ended])
    except KeyboardInterrupt:
        progress.requeue_lost(study)
        raise
    except UnboundLocalError as error:  # Optuna's bug where it can neither tell nor read a trial, or at Ctrl-C
        cause = error.__context__
        if isinstance(cause, KeyboardInterrupt):
            progress.end_interrupted(study, attempt.number)
        raise cause if isinstance(cause, UserError | KeyboardInterrupt) else error from None
    except (UpdateFinishedTrialError, ValueError, AssertionError) as error:
        if isinstance(error.__context__, UserError):  # the storage accepted neither the value nor the failure
            raise error.__context__ from None
        if not attempt.is_lost(study):
            raise
        run.note(f"trial {attempt.number} sent no heartbeat for {GRACE} s: it is run again")
    if callbacks.error is not None:
        raise callbacks.error


@dataclass(eq=False)
class Callbacks:
    """Calls the run's callbacks after a trial; the first `error` of one ends the loop, and is raised after it.

    Raised at once, an error of theirs could be taken for one of Optuna's. Before them, the reporting worker publishes
    the study when its best trial has changed, at most every `PUBLISH` seconds.
    """

    run: "StudyRun"
    error: Exception | None = None
    _best: int = -1
    _time: float = field(default_factory=monotonic)  # a run that ends sooner publishes at its end alone

    def __call__(
        self, study: optuna.Study, trial: FrozenTrial, best: FrozenTrial | None, done: int, total: int
    ) -> None:
        """Calls each; if one stops the study, the trials so far are its total. `best`: the study's best trial now."""
        if best is not None and best.number != self._best and self.run.reports and monotonic() - self._time >= PUBLISH:
            self._best, self._time = best.number, monotonic()
            self.run.publish(study)
        assert isinstance(study, ValidatedStudy)
        study.is_stopped = False
        try:
            for callback in self.run.callbacks:
                callback(study, trial)
        except Exception as error:
            self.error = error
            optuna.Study.stop(study)
            return
        if study.is_stopped and done < total:
            progress.terminate_early(study, total)
            self.run.note(f"ended after {done} of {total}: a callback stopped the study")


@dataclass(eq=False)
class Attempt:
    """Calls the objective unless other workers have reached the total, and says whether they ended the trial as lost.

    Optuna raises unspecific errors when a process tells a trial that another one ended; `is_lost` identifies them.
    """

    objective: Callable[[optuna.Trial], tuple[float, ...]]
    total: int
    trace: Trace
    number: int = -1
    _is_bug: bool = False

    def __call__(self, trial: optuna.Trial) -> tuple[float, ...]:
        """The objective's values."""
        self.number, self._is_bug = trial.number, True
        try:
            trials, number = trials_in(trial.study), trial.number
            if progress.is_surplus(trials, number, self.total) or progress.is_repetition(trials, number):
                trial.set_user_attr("lost", progress.SURPLUS)
                raise TrialError("not needed")
            with self.trace.of(trial.study.study_name, trial.number):
                value = self.objective(trial)
        except (TrialError, UpdateFinishedTrialError):
            self._is_bug = False
            raise
        self._is_bug = False
        return value

    def is_lost(self, study: optuna.Study) -> bool:
        """Whether another process ended the last trial."""
        return self.number >= 0 and not self._is_bug and study.trials[self.number].state.is_finished()
