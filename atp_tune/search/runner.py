"""Running a study: created or resumed, driven to its total, and completed with the numbers on the test text."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from atp_tune.allocations import Budget
from atp_tune.config.plugged import records
from atp_tune.config.search import ScreenConfig
from atp_tune.config.studyfile import TRIALS, StudyFile, overridden, settings
from atp_tune.errors import TrialError, UserError, printable
from atp_tune.events import EventHandler, Message, Opened, TrialEnded
from atp_tune.plan import method_in
from atp_tune.results.formatting import why_lost
from atp_tune.results.goals import best_trial, goal_in
from atp_tune.results.results import Results
from atp_tune.results.status import best_config, study_columns
from atp_tune.results.summary import is_reported, made_from
from atp_tune.search.goals import AtSparsity, Screened, make_goal, renamed
from atp_tune.search.samplers import branch_study, make_stopper
from atp_tune.search.space import Distributions, Space
from atp_tune.storage import fingerprint, opening, progress
from atp_tune.storage.attributes import ValidatedStudy
from atp_tune.storage.database import error_reason
from atp_tune.storage.fingerprint import CHANGED, SUFFIX, facts, facts_in, is_screening, stored_objectives
from atp_tune.storage.progress import GRACE, Trace, experimental, ranked, trials_in
from atp_tune.utils.cache import alone_with, cache_dir, check_room, versions
from atp_tune.utils.system import check_writable

if TYPE_CHECKING:
    from atp_tune.run.observers import TaskResults
    from atp_tune.run.session import Session
    from atp_tune.search.objective import Objective


def write_best(run: "StudyRun", study: optuna.Study) -> None:
    """Writes the best configuration unless the file has it: the last run may have been killed before it wrote."""
    if not run.writes or best_trial(study) is None:
        return
    out = run.file.best_path(run.name)
    with alone_with(out):
        config = best_config(run.file, study, out)
        if not out.exists() or out.read_bytes() != config.to_json().encode():
            config.write(out)


Callback = Callable[[optuna.Study, FrozenTrial], object]

NOTE = "dashboard:note_ver"  # the attribute of a study that has a note
LONGEST = 200  # bytes of a study's name: files are named after it


@dataclass(frozen=True)
class StudyRun:
    """One run of a study by one process: study file, study name, and the limit in seconds (`timeout`).

    `session`: already open, with this model and these texts. `reports`: at the total, measure the test text. `writes`:
    write the best configuration. Of several workers one reports, and their parent process writes. `mix`: accept another
    device or number format than the study began with. `screens`: the name of the study that this one screens for.
    `tasks`: what measures the accuracies of a limit.
    `callbacks`: called after each trial, as by `optuna.Study.optimize`; not for a screening. `opened`: called with the
    session of a study that has no trial yet. `publisher`: writes the note, figures and files for Optuna's
    dashboard; it gets the study, the storage's URL and the folder of the artifacts.
    """

    file: StudyFile
    name: str
    timeout: float | None
    watch: EventHandler
    session: "Session | None" = None
    reports: bool = True
    writes: bool = True
    mix: bool = False
    screens: str | None = None
    callbacks: Sequence[Callback] = ()
    tasks: "TaskResults | None" = None
    opened: "Callable[[Session], object] | None" = None
    publisher: Callable[[optuna.Study, str, Path | None], object] = lambda study, address, folder: None
    trace: Trace = field(default_factory=Trace)

    def note(self, text: str) -> None:
        """Reports one line."""
        self.watch(Message(text))

    def publish(self, study: optuna.Study) -> None:
        """Writes note, figures and files for Optuna's dashboard; what prevents it is reported, and ends no run."""
        try:
            self.publisher(study, self.file.storage_url, self.file.artifacts)
        except (OSError, StorageInternalError, UserError) as error:
            self.note(f"warning: the dashboard's note and figures could not be written: {error_reason(error)}")


def tune(run: StudyRun) -> optuna.Study:
    """Creates or resumes the study and drives it to its total; KeyboardInterrupt leaves it ready to resume.

    A complete study is returned without loading torch or the model. UserError for bad input.
    """
    return finished_study(run) or drive(run)


def drive(run: StudyRun) -> optuna.Study:
    """`tune` of a study that is not complete."""
    return _drive(replace(run, watch=run.trace.heard_by(run.watch)))


def finished_study(run: StudyRun) -> optuna.Study | None:
    """The study if it is complete; UserError if its facts differ or it cannot be stored."""
    # UserError for a study name that is unfit for files and terminals.
    name, file = run.name, run.file
    if not name or printable(name) != name or len(name.encode()) > LONGEST:
        shown = name if len(name) <= 40 else f"{name[:39]}…"
        raise UserError(
            f"study {shown}: its name must have 1 to {LONGEST} bytes, all printable; choose --study-name NAME"
        )
    opening.check_writable(file.storage_url)
    if run.writes:
        check_writable(file.best_path(name))
    if warning := opening.network_warning(file.storage_url):
        run.note(warning)
    if file.study.search.screen is not None:
        other = load_existing(replace(run, name=name + SUFFIX))
        if other is not None and not fingerprint.is_new(other) and not is_screening(other):
            raise UserError(
                f"search.screen: the screening would be called {other.study_name}, as a study of its own is; "
                "choose another --study-name NAME"
            )
    study = load_existing(run)
    if study is None or fingerprint.is_new(study):
        return None
    own = facts(file.study, file.folder)
    fingerprint.take_plugins(study, own)
    fingerprint.check_facts(study, own, partly=True, any_dtype=run.mix)
    run = _with_stored_total(run, study)
    if not is_complete(study, run.file):
        if not run.mix:
            from atp_tune.checkpoints.devices import device_name, find_device

            device = run.session.checkpoint.device if run.session else find_device(file.study.device)
            fingerprint.check_device(study, device_name(device))
        return None
    write_best(run, study)
    if run.reports and NOTE not in study._storage.get_study_system_attrs(study._study_id):
        run.publish(study)  # the run that completed it died before
    return study


def load_existing(run: StudyRun) -> optuna.Study | None:
    """The stored study, if there is one."""
    return opening.stored(run.file.storage_url, run.name)


def _with_stored_total(run: StudyRun, study: optuna.Study) -> StudyRun:
    """The run with the total of the study's last run, unless this command sets one."""
    last = made_from(study)
    if last is None or any(text.startswith(TRIALS) for text in run.file.overrides):
        return run
    totals, file = [text for text in last.overrides if text.startswith(TRIALS)], run.file
    return replace(run, file=overridden(file, totals, file.trusts_plugins))


def is_complete(study: optuna.Study, file: StudyFile) -> bool:
    """Whether the total is reached, no trial runs, and the best trials have their final numbers.

    Not with another limit than the study's: then another trial may be the best.
    """
    sizes = study.user_attrs.get("sizes")
    if sizes is None or progress.running(study) or _has_other_limit(study, file):
        return False
    total = make_goal(file.study, Budget(file.study.highest, tuple(sizes))).total
    done = progress.counted(study) >= progress.effective_total(study, total, file.goes_on)
    return done and is_reported(study, file.study.data.calibration.draws)


def _has_other_limit(study: optuna.Study, file: StudyFile) -> bool:
    return study.user_attrs.get("limit") != (file.study.limit and file.study.limit.given)


def _drive(run: StudyRun) -> optuna.Study:
    """Drives a new or incomplete study to its total."""
    from atp_tune.search.objective import FinalScores

    db = opening.open_storage(run.file.storage_url, create=False)  # before loading, when the server may go away
    before = opening.find_study(db, run.name) if db else None
    if before:
        run = _with_stored_total(run, before)
        recover_lost(run, before)  # before loading: other hosts would fail these trials without reading their traces
    if run.tasks is None and (limit := run.file.study.limit) and limit.min_accuracy is not None:
        from atp_tune.run.observers import TaskResults

        run = replace(run, tasks=TaskResults.of_limit(limit.min_accuracy, limit.items, run.file.folder, run.watch))
    opened = nullcontext(run.session) if run.session else open_context(run, before)
    with opened as session:
        # The part of the run that needs a session; `before`: the study found in `db`.
        batches = {**session.batches, **(fingerprint.stored_batches(before) if before else {})}
        session.begin(batches)
        file, spec = run.file, run.file.study
        goal = make_goal(spec, session.budget(spec.highest))
        if goal.is_from_dense and len(session.windows["validation"]) == 1:
            raise UserError(
                "limit: holds within the standard error, which one validation window has not; give two or more"
            )
        total = goal.total
        db = db or opening.open_storage(file.storage_url, create=True)
        assert db is not None
        study = fingerprint.create_study(db, run.name, {**facts(spec, file.folder), **session.contents()}, run.mix)
        _describe(run, study, session, total, batches)
        _compare_versions(run, study)
        if run.reports:
            if done := progress.counted(study):
                run.note(f"{study.study_name}: goes on, {done} of {study.user_attrs['total']} trials are stored")
            items = {role: (len(each), each.positions) for role, each in session.windows.items()}
            total_now = progress.effective_total(study, total, file.goes_on)
            run.watch(Opened(spec, total_now, done, items, session.is_short))
            if run.opened is not None and not trials_in(study):
                run.opened(session)
        study.pruner = make_stopper(spec.search)
        screened = Screened()
        final = FinalScores(run, study, session, goal.space)
        if spec.search.screen is None or goal.is_from_dense:
            final.measure_dense()
        if spec.search.screen is not None:
            run, screened = _screen(run, spec.search.screen, session)
        for params in goal.begin(study, screened, total):
            study.enqueue_trial(params, {progress.START: True}, skip_if_exists=True)
        total = run_trials(run, study, session, goal, total)
        if run.reports and progress.counted(study) >= total:
            final.measure_dense()
            final.report()
            write_best(run, study)
            run.publish(study)
        return study


def _screen(run: StudyRun, screen: ScreenConfig, session: "Session") -> tuple[StudyRun, Screened]:
    """Runs or resumes the screening; the run with the time left, and what was screened.

    The screening measures the dense model on its part of the validation text, so the main study measures the dense
    model only after its search, unless it has a limit.
    """
    # The main study file with overrides, without a limit.
    values = ("dense", screen.stride, screen.trials, "none", "none")
    keys = [key.replace("texts.", f"{run.file.study.data.table}.") for key in CHANGED]
    own = ["limit=none", *(f"{key}={value}" for key, value in zip(keys, values, strict=True))]
    began, file = monotonic(), overridden(run.file, own, run.file.trusts_plugins)
    inner = replace(
        run, file=file, name=run.name + SUFFIX, watch=renamed(run.watch), reports=False, writes=False, callbacks=(),
        session=session.screening(screen.stride), screens=run.name,
    )  # fmt: skip
    study = load_existing(inner)
    if study is None or not is_complete(study, file):
        study = _drive(inner)
    if run.timeout is not None:
        run = replace(run, timeout=max(0.0, run.timeout - (monotonic() - began)))
    if not is_complete(study, file):
        return run, Screened()
    return run, Screened(progress.measured(study), study.user_attrs.get("dense", ()))


def open_context(run: StudyRun, study: optuna.Study | None = None) -> "Session":
    """Loads the model and the texts; windows begin with BOS if those of an existing study do."""
    from atp_tune.checkpoints.devices import oom_as_user_error
    from atp_tune.run.session import Session, Setup

    spec = run.file.study
    if note := spec.without_effect:
        run.note(note)
    run.note(f"loading the model and the {spec.data.table}")
    setup = Setup.of_study(spec, run.file.folder, fingerprint.stored_bos(spec, study), run.watch)
    if spec.recover is not None and run.reports:  # at the end: two folders as large as the model
        setup = replace(setup, ask=lambda folder, size: check_room(cache_dir("recovered"), 2 * size))
    with oom_as_user_error("loading"):
        return Session.open(setup)


def _describe(run: StudyRun, study: optuna.Study, session: "Session", total: int, batches: dict[str, int]) -> None:
    spec, model, attrs = run.file.study, session.checkpoint, study.user_attrs
    total = progress.effective_total(study, total, run.file.goes_on or _has_other_limit(study, run.file))
    attributes = {
        "sizes": list(model.sizes), "blocks": model.blocks_name, "linears": model.linear_names,
        "conv1d": (spec.by_bits and model.has_conv1d) or None,
        "dense_bytes": session.stored_bytes[0], "total": total, "made_from": settings(run.file),
        "batches": attrs.get("batches", batches), "screens": run.screens, "limit": spec.limit and spec.limit.given,
        "kinds": [*getattr(spec.test_text, "turns", ())] or None, "model.source": spec.model.source,
        "plugins": records(spec, run.file.folder) or None,
        "bos": attrs.get("bos") if session.bos_effect is None else session.bos_effect.model_dump(),
        **study_columns({"total": total, "fingerprint": attrs["fingerprint"]}),
    }  # fmt: skip
    for name, value in attributes.items():
        if attrs.get(name) != value:
            study.set_user_attr(name, value)


def _compare_versions(run: StudyRun, study: optuna.Study) -> None:
    """Notes that earlier trials were measured with other versions, by which the last digits may differ."""
    own = versions()
    for trial in trials_in(study):
        other = trial.user_attrs.get("versions", own)
        if other != own:
            names = [name for name in own if other.get(name) != own[name]]
            was, now = (", ".join(f"{name} {all_.get(name, '?')}" for name in names) for all_ in (other, own))
            run.note(f"trial {trial.number} was measured with {was}; now it is {now}: last digits may differ")
            return


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
    branches = list(filter(space.is_open, space.intervals))
    parts = [trials[: len(trials) - back] for back in range(RUN)]
    if not branches or len({next((one.number for one in ranked(part)), None) for part in parts}) > 1:
        return False
    limit = -math.log1p(-GAIN)
    return all(regret_bound(part, space, branch) < limit for part in parts for branch in branches)


def regret_bound(trials: Sequence[FrozenTrial], space: Space, branch: str) -> float:
    """Bound of the regret in one allocation, as a difference of logs; infinite with too few points or a gap."""
    from optuna.terminator import RegretBoundEvaluator

    kinds = space.kinds(branch)
    points = branch_study(trials, space, branch, kinds).trials
    if len(points) < LEAST or has_gap(points, kinds):
        return math.inf
    with experimental():
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


def run_trials(run: StudyRun, study: optuna.Study, session: "Session", goal: AtSparsity, total: int) -> int:
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
    end = None if run.timeout is None else monotonic() + run.timeout
    ended = Ended(run, goal, end, total)
    while end is None or monotonic() < end:
        trials = recover_lost(run, study)
        ended.total = total = study.user_attrs.get("total", total)
        elsewhere = [trial for trial in trials if trial.state == TrialState.RUNNING]
        remaining = total - sum(map(progress.counts, trials)) - len(elsewhere)
        is_idle = goal.is_idle(study)
        if is_idle and remaining > 0 and not elsewhere:
            run.note(f"ended after {total - remaining} of {total}: {goal.reached}")
            progress.terminate_early(study, total)
        elif remaining > 0 and not is_idle:
            _optimise(study, objective, remaining, ended)
        elif elsewhere:
            # Waits until a trial of another process ends or is recovered as lost.
            number = elsewhere[0].number
            run.note(
                f"waiting for trial {number}, which {elsewhere[0].user_attrs.get('host', 'another process')} runs (or "
                "was running when it stopped)"
            )
            while any(other.number == number for other in progress.running(study)):
                sleep(POLL)
                recover_lost(run, study)
        else:
            break
    return total


def recover_lost(run: StudyRun, study: optuna.Study) -> list[FrozenTrial]:
    """Fails and reports the running trials without a live process; returns all trials after that."""
    trials = trials_in(study)
    if lost := progress.requeue_lost(study, trials):
        trials = trials_in(study)
        for number in lost:
            run.note(why_lost(trials[number]))
    return trials


def _optimise(study: optuna.Study, objective: "Objective", n_trials: int, ended: "Ended") -> None:
    run, attempt = ended.run, Attempt(objective, ended.total, ended.run.trace)
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
    if ended.error is not None:
        raise ended.error


@dataclass(eq=False)
class Ended:
    """Called after each trial: reports it, calls the run's callbacks, and says when the loop is to end.

    The first `error` of a callback ends the loop, and is raised after it: raised at once, it could be taken for one of
    Optuna's. Before them, the reporting worker publishes the study when its best trial has changed, at most every
    `PUBLISH` seconds. `end`: the time after which no trial starts.
    """

    run: StudyRun
    goal: AtSparsity
    end: float | None
    total: int
    error: Exception | None = None
    _best: int = -1
    _time: float = field(default_factory=monotonic)  # a run that ends sooner publishes at its end alone

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Takes a trial that has ended; if a callback stops the study, the trials so far are its total."""
        run, total = self.run, self.total
        trials = recover_lost(run, study)  # read once: reading a long study costs time at each short trial
        best, done = goal_in(study).best(trials), sum(map(progress.counts, trials))
        reason = trial.user_attrs.get("failure") if trial.state == TrialState.FAIL else None
        if trial.values is not None or reason:
            # The event of a trial's end, with its values and the best.
            results = Results({}, trials, stored_objectives(facts_in(study)))
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
                    best_params=best.params if best else {},
                )
            )
        if best is not None and best.number != self._best and run.reports and monotonic() - self._time >= PUBLISH:
            self._best, self._time = best.number, monotonic()
            run.publish(study)
        assert isinstance(study, ValidatedStudy)
        study.is_stopped = False
        try:
            for callback in run.callbacks:
                callback(study, trial)
        except Exception as error:
            self.error = error
            optuna.Study.stop(study)
        else:
            if study.is_stopped and done < total:
                progress.terminate_early(study, total)
                run.note(f"ended after {done} of {total}: a callback stopped the study")
        if run.file.study.search.early_termination and done < total and should_terminate(study, self.goal.space):
            progress.terminate_early(study, total)
            run.note(
                f"terminated early after {done} of {total}: a better point is expected to gain less than {GAIN:.0%}"
            )
            study.stop()
        is_late = self.end is not None and monotonic() >= self.end  # Optuna's timeout depends on the wall clock
        running = sum(other.state == TrialState.RUNNING for other in trials)  # they run the remaining trials
        if self.goal.is_idle(study) or is_late or done + running >= total:
            study.stop()


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
