"""Running a study: created or resumed, driven to its total, and completed with the numbers on the test text."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial

from atp_tune.allocations import Budget, is_fitted
from atp_tune.config.plugged import records
from atp_tune.config.search import ScreenConfig
from atp_tune.config.studyfile import TRIALS, StudyFile, settings
from atp_tune.errors import TrialError, UserError, printable
from atp_tune.events import EventHandler, Message, Opened, TrialStarted
from atp_tune.measures import MEASURES, perplexity
from atp_tune.metrics import NAMES, PROMPTS
from atp_tune.results.goals import best_trial, goal_in
from atp_tune.results.results import allocation_name, attached, is_uniform, store, stored_answers, uniform_beside
from atp_tune.results.status import best_config, study_columns
from atp_tune.results.summary import fits_anew, is_reported, made_from, undrawn, unreported
from atp_tune.search.goals import Screened, make_goal, renamed, screening_file
from atp_tune.search.samplers import make_stopper
from atp_tune.search.space import Space
from atp_tune.search.trial_loop import POLL, recover_lost, run_trials
from atp_tune.storage import fingerprint, opening, progress
from atp_tune.storage.attributes import TRIAL, checked
from atp_tune.storage.database import error_reason
from atp_tune.storage.fingerprint import SUFFIX, facts, is_screening
from atp_tune.storage.progress import Trace, identity, is_alive, trials_in
from atp_tune.utils.cache import alone_with, cache_dir, check_room, versions
from atp_tune.utils.system import check_writable

if TYPE_CHECKING:
    from atp_tune.run.observers import LeftOut, Observer, TaskResults
    from atp_tune.run.session import Session
    from atp_tune.scores import Scores

# --- The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text.
#
# The models that are pruned for it also continue prompts. Trials of a front have their test scores already: the
# objective measures them while it has the pruned blocks, since all of them are compared.

REPORTER = "reporter"  # system attribute of a study: the process that measures on the test text


@dataclass(frozen=True)
class FinalScores:
    """The final measurements of a study, by row of the test text: numbers of trials, and `dense`."""

    run: "StudyRun"
    study: optuna.Study
    session: "Session"
    space: Space

    def report(self) -> None:
        """Measures dense, uniform and the best of each allocation on the test text, and writes the best configuration.

        If `texts.calibration.draws` > 1, the trials are pruned with the other draws too; plans that are fitted to the
        calibration text are fitted anew to each draw's own. Each measurement is stored at once, in an attribute of its
        own: two hosts may report at the same moment.
        """
        run, study, draws = self.run, self.study, self.run.file.study.data.calibration.draws
        # Waits while another live process of this host measures the test text: two may reach the total together.
        is_noted = False
        while is_missing := bool(unreported(study) or undrawn(study, draws)):
            other = study._storage.get_study_system_attrs(study._study_id).get(REPORTER)
            if not isinstance(other, dict) or other.get("pid") == os.getpid() or not is_alive(checked(other, TRIAL)):
                break
            if not is_noted:
                run.note("waiting for the numbers on the test text, which another process measures")
            is_noted = True
            sleep(POLL)
        if is_missing:
            study._storage.set_study_system_attr(study._study_id, REPORTER, identity())
        try:
            self.measure(draws, is_missing)
        finally:
            if is_missing:
                study._storage.set_study_system_attr(study._study_id, REPORTER, None)
        write_best(run, study)

    def measure(self, draws: int, is_missing: bool) -> None:
        """Measures and stores what is missing; `is_missing`: a number on the test text, or in a draw of it, is."""
        study, (names, shown) = self.study, self._shown() if is_missing else ({}, None)
        for row in unreported(study):
            store_test_scores(study, row, self._on_test_text(row, names.get(row, ""), shown))
        if shown is not None:
            # The models that were measured before are shown too; then what all of them wrote, or saw, is stored.
            for row, name in names.items():
                if name in shown.wanted:
                    self._pass(row, f"continuations: {name}", [shown], name)
            shown.repeat("best", "uniform")  # one trial may be both
            best, result = best_trial(study), shown.result()
            if result and best:
                store(study, self.run.file.study.data.shown, best.number, result.model_dump(mode="json"))
        anew = fits_anew(study)
        for draw, row in undrawn(study, draws):
            try:
                nlls = self._redrawn(row, draw, anew)
            except TrialError as error:  # of a descent: NaN, which ends the study, and has no spread over draws
                note = f"draw {draw + 1} of trial {row} gives no number: {error}; its spread over draws is left out"
                self.run.note(note)
                nlls = [nan] * len(study.user_attrs["test_nlls"][row])
            study.set_user_attr(f"refits:{row}:{draws}:{draw}" if anew else f"draws:{row}:{draw}", nlls)
            if anew:
                fitted_to = {**study.user_attrs.get("fitted_to", {}), str(draws): list(self.session.fitted_to)}
                study.set_user_attr("fitted_to", fitted_to)

    def _shown(self) -> "tuple[dict[str, str], LeftOut | None]":
        """The models that continue prompts, by row, and what collects that; None if nothing does, or it is known.

        These are dense, uniform and the best of each allocation; of an image classifier dense, uniform and the best of
        all answer on images.
        """
        from atp_tune.run.observers import ImageAnswers, LeftOut, Prompts, can_keep

        study, session, spec = self.study, self.session, self.run.file.study
        options, best = spec.continuations, best_trial(study)
        uniform = uniform_beside(study, best)
        if best is None or uniform is None or not options.tokens:
            return {}, None
        if "continuations" in attached(study, best.number) or stored_answers(study, best) is not None:
            return {}, None
        ranked = goal_in(study).rivals()
        others = {str(trial.number): allocation_name(trial) for trial in ranked if not is_uniform(trial)}
        names = {"dense": "dense", **{row: name for row, name in others.items() if name not in NAMES}}
        names |= {str(best.number): "best", str(uniform.number): "uniform"}
        if spec.images is not None:
            work: Any = ImageAnswers("validation" if spec.data.test is None else "test")
            return names, LeftOut(work, NAMES, "answers on images", session.watch)
        work = Prompts((*PROMPTS, *options.prompts), options.tokens, "memory")
        shown = LeftOut(work, tuple(dict.fromkeys((*NAMES, *names.values()))), "continuations", session.watch)
        if not can_keep(session.checkpoint):
            shown.leave_out("the model leaves no room for a pruned copy; `tune.py generate` makes them")
        return names, shown

    def _on_test_text(self, row: str, name: str, shown: "LeftOut | None") -> "Scores":
        """Scores on the test text, or images (else the validation text), with KLs of a trial if minimised.

        `name`: of the row's model, if that is shown too.
        """
        from atp_tune.run.observers import RoleScores

        spec, is_dense = self.run.file.study, row == "dense"
        if spec.data.test is None:
            attrs = self.study.user_attrs if is_dense else self.study.trials[int(row)].user_attrs
            return {
                by.items: list(attrs[key])
                for by in MEASURES.values()
                if (key := by.dense_items if is_dense else by.items) in attrs
            }
        title = f"test {spec.data.validation.data}: {'dense model' if is_dense else f'trial {row}'}"
        scores = RoleScores("test", "kl" in spec.search.objective and not is_dense)
        self._pass(row, title, [scores, *([shown] if shown else [])], name)
        return scores.found[name]

    def measure_dense(self) -> None:
        """Measures the dense model on the validation text, unless that is done; UserError if it has no perplexity."""
        from atp_tune.run.observers import RoleScores

        if "dense" in self.study.user_attrs:
            return
        observer = RoleScores("validation")
        self._pass("dense", "dense model", [observer], "")
        scores = observer.found[""]
        if not math.isfinite(perplexity(scores["nlls"]).value):
            raise UserError(
                f"model.source: the perplexity of the dense model {self.run.file.study.model.source} is not finite: "
                "its weights hold NaN, or overflow in this number format; give another model, or set model.dtype, and "
                "--study-name NAME"
            )
        for by in reversed(MEASURES.values()):  # at last the NLLs, which mark the dense model as measured
            if by.items in scores:
                self.study.set_user_attr(by.dense_items, scores[by.items])

    def _redrawn(self, row: str, draw: int, anew: bool) -> list[float]:
        """Window NLLs of a trial that another draw prunes; `anew`: a plan that is fitted is fitted to that draw.

        Draw 0 is the trial's own, but for a plan that is fitted anew to less than the study's own plan was.
        """
        from atp_tune.run.observers import RoleScores

        spec = self.run.file.study.data
        is_refitted = anew and is_fitted(allocation_name(self.study.trials[int(row)]))
        if not (draw or (is_refitted and self.session.is_short)):
            return list(self.study.user_attrs["test_nlls"][row])
        scores = RoleScores("validation" if spec.test is None else "test")
        title = f"draw {draw + 1} of {spec.calibration.draws}: trial {row}"
        self._pass(row, title, [scores], "", self.session.drawn(draw), is_refitted)
        return scores.found[""]["nlls"]

    def _pass(
        self,
        row: str,
        title: str,
        observers: "Sequence[Observer[Any]]",
        name: str,
        drawn: "Session | None" = None,
        is_refitted: bool = False,
    ) -> None:
        """Passes the blocks of a row's model to observers, with the batch sizes of its measurement.

        Those affect its mask. `drawn`: prunes it, and its plan is fitted to that draw if it `is_refitted`.
        """
        from atp_tune.checkpoints.devices import oom_as_user_error

        trial = None if row == "dense" else self.study.trials[int(row)]
        plan = self.space.stored_plan(trial) if trial else None
        self.run.watch(TrialStarted(title, plan))
        own = fingerprint.stored_batches(trial) if trial else {}
        self.session.begin({**fingerprint.stored_batches(self.study), **own})
        session = drawn or self.session
        with oom_as_user_error(title):
            if is_refitted and trial:
                plan = replace(self.space, budget=session.budget(self.space.budget.target)).plan(trial.params)
            session.measure(plan, observers, name)


def store_test_scores(study: optuna.Study, name: str, scores: "Scores") -> None:
    """Stores the scores of a trial, or of `dense`, on the test items."""
    for key in sorted(scores, key="nlls".__eq__):  # the NLLs last, which mark a trial as reported
        study.set_user_attr(f"test_{key}:{name}", scores[key])


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
        check_writable(file.best_path(run.name))
    if warning := opening.network_warning(file.storage_url):
        run.note(warning)
    if file.study.search.screen is not None:
        other = load_existing(replace(run, name=run.name + SUFFIX))
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
    if last is None or run.file.sets_trials or not last.sets_trials:
        return run
    search = run.file.study.search.model_copy(update={"trials": last.study.search.trials})
    spec = run.file.study.model_copy(update={"search": search})
    overrides = tuple(override for override in last.overrides if override.startswith(TRIALS))
    return replace(run, file=replace(run.file, study=spec, overrides=(*run.file.overrides, *overrides)))


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
        if run.reports and (done := progress.counted(study)):
            run.note(f"{study.study_name}: goes on, {done} of {study.user_attrs['total']} trials are stored")
        if run.reports:
            items = {role: (len(each), each.positions) for role, each in session.windows.items()}
            total_now = progress.effective_total(study, total, file.goes_on)
            run.watch(Opened(spec, total_now, progress.counted(study), items, session.is_short))
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
            run.publish(study)
        return study


def _screen(run: StudyRun, screen: ScreenConfig, session: "Session") -> tuple[StudyRun, Screened]:
    """Runs or resumes the screening; the run with the time left, and what was screened.

    The screening measures the dense model on its part of the validation text, so the main study measures the dense
    model only after its search, unless it has a limit.
    """
    began, file = monotonic(), screening_file(run.file, screen)
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
