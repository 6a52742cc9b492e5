"""The objective: one Optuna trial; and the final scores of a study. torch and Optuna meet in this module only.

plan        ← the space, from the sampler's proposal
weights     ← dense weights, pruned block by block by the plan
NLLs        ← windows of the validation text, group by group; the stopper may end the trial between groups
perplexity  ← exp(mean NLL)
KL          ← mean over windows, against the dense model, if the study minimises it
error rate  ← of images, if the study is by accuracy

A plan that an earlier trial measured, or failed on, is not measured again.
"""

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import sleep
from traceback import clear_frames
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.allocations import is_fitted
from atp_tune.blocks.prune_pass import PrunedBlock, Timer
from atp_tune.checkpoints.devices import (
    device_name,
    is_out_of_memory,
    oom_as_user_error,
    peak_memory,
    reset_peak_memory,
)
from atp_tune.errors import PluginError, TrialError, UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.measures import ACCURACY, MEASURES, PERPLEXITY, Estimate, Measure, perplexity
from atp_tune.metrics import NAMES, PROMPTS
from atp_tune.packed.layout import matrix_bytes
from atp_tune.plan import Plan
from atp_tune.results.goals import best_trial, goal_in
from atp_tune.results.results import allocation_name, attached, is_uniform, store, stored_answers, uniform_beside
from atp_tune.results.status import measured_columns
from atp_tune.results.summary import fits_anew, undrawn, unreported
from atp_tune.run.observers import (
    GROUPS,
    ImageAnswers,
    LeftOut,
    Observer,
    Prompts,
    RoleScores,
    TaskResults,
    can_keep,
)
from atp_tune.run.session import Session
from atp_tune.scores import Scores
from atp_tune.search.runner import POLL, StudyRun
from atp_tune.search.space import Space
from atp_tune.storage.attributes import TRIAL, checked
from atp_tune.storage.database import set_attributes
from atp_tune.storage.fingerprint import stored_batches
from atp_tune.storage.progress import INTERRUPTED, CutOff, counts, given_up, identity, is_alive, trials_in
from atp_tune.utils.cache import versions


@dataclass(frozen=True)
class Objective:
    """A trial's values on the validation text, one per objective; TrialError if the trial gives none."""

    session: Session
    space: Space
    stops: bool  # the study has a stopper
    watch: EventHandler
    objectives: tuple[str, ...] = ("perplexity",)
    tasks: TaskResults | None = None  # the study has a limit of accuracy
    tests: bool = False  # while its blocks are there, each trial is measured on the test text too

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """Measures one trial and stores each attribute as soon as it is known."""
        with reasons(trial):
            set_attributes(trial, identity())
            plan = self.space.suggest(trial)
            self.watch(TrialStarted(f"trial {trial.number}", plan, trial.number))
            set_attributes(trial, {"plan": plan.model_dump(mode="json", exclude_none=True)})
            earlier = find_measured(trial, plan)
            return self._repeat(trial, earlier) if earlier else self._measure(trial, plan)

    def _measure(self, trial: Trial, plan: Plan) -> tuple[float, ...]:
        session, batches, kl = self.session, stored_batches(trial.study), "kl" in self.objectives
        session.begin(batches)
        record = Record(session, self.objectives)
        # Uniform is never stopped: the others are compared with it.
        may_stop = self.stops and not plan.is_uniform and best_trial(trial.study) is not None

        def hear(scores: Scores) -> None:
            record.add(scores)
            seen, windows = record.compared, len(session.windows["validation"])
            is_late = self.stops and is_hopeless(trial, seen, len(scores["nlls"]), windows)
            if len(seen) == windows:
                record.results()  # a TrialError comes before the tasks, which take minutes
            elif is_late and may_stop:
                raise HopelessError

        validation, test = RoleScores("validation", kl, hear, may_stop), RoleScores("test", kl)
        more: list[Observer[Any]] = [*([self.tasks] if self.tasks else []), *([test] if self.tests else [])]
        try:
            session.measure(plan, [record, validation, *more])
        except HopelessError:
            self._store(trial, record)
            return (estimate(trial, record.compared, record.main),)
        results = record.results()
        if self.tasks:
            set_attributes(trial, {"accuracies": self.tasks.accuracies("")})
        if self.tests:
            store_test_scores(trial.study, str(trial.number), test.found[""])
        self._store(trial, record, stderr=results[0].stderr)
        if session.batches != batches and best_trial(trial.study) is None:
            # The first trial ran out of memory and took smaller batches: later trials begin with those.
            trial.study.set_user_attr("batches", session.batches)
        # Over an interval also the share of weights, or the bits, that are left.
        left = () if plan.target is None else (round((plan.target > 0) - plan.target, 6),)
        return (*(result.value for result in results), *left)

    def _store(self, trial: Trial, record: "Record", **more: object) -> None:
        measured = {**record.close(), "batches": self.session.batches, **more}
        set_attributes(trial, {**measured, **measured_columns(measured)})

    def _repeat(self, trial: Trial, earlier: FrozenTrial) -> tuple[float, ...]:
        if earlier.state == TrialState.FAIL:
            reason = earlier.user_attrs.get("failure") or f"cut off {given_up(earlier)}"
            raise TrialError(f"failed before, as trial {earlier.number}: {reason}")
        self.watch(Message(f"trial {trial.number}: measured before, as trial {earlier.number}"))
        set_attributes(trial, {**earlier.user_attrs, **identity(), "repeats": earlier.number})
        assert earlier.values is not None
        return tuple(earlier.values)


@contextmanager
def reasons(trial: Trial) -> Iterator[None]:
    """Stores why a trial has no value: `failure` if its plan fails, `lost` or `cut_off` if it is to run again."""
    try:
        yield
    except KeyboardInterrupt:
        trial.set_user_attr("lost", INTERRUPTED)
        raise
    except PluginError as error:
        trial.set_user_attr("failure", str(error))
        raise
    except (UserError, OptunaError):
        raise
    except Exception as error:
        if not isinstance(error, TrialError) and not is_out_of_memory(error):
            set_attributes(trial, {"lost": "an error", "cut_off": CutOff(crash=type(error).__name__).stored()})
            raise
        reason = str(error) if isinstance(error, TrialError) else "out of memory"
        trial.set_user_attr("failure", reason)
        clear_frames(error.__traceback__)  # Optuna keeps the error in a reference cycle, and so the trial's tensors
        raise TrialError(reason) from error


class HopelessError(Exception):
    """The stopper ends a trial."""


class Record(Observer[None]):
    """Gathers a trial's user attributes while its plan is pruned and evaluated."""

    def __init__(self, session: Session, objectives: Sequence[str] = ("perplexity",)) -> None:
        self._session = session
        self._measures = [MEASURES[name] for name in objectives]
        self.main = self._measures[0]
        self.items: Scores = {}
        self.errors = list[float]()
        self.seconds = dict[str, float]()
        self.peak_bytes = dict[str, int]()
        self.experts_without_tokens = list[str]()
        self._zeros = self._weights = 0
        self._packed, self._itemsize = session.stored_bytes
        self._stored_bits = 0  # of linears that are rounded
        self._device = session.checkpoint.device
        self._timer = Timer(self._device)
        reset_peak_memory(self._device)

    def start(self) -> None:
        """Counts embedding and head, where they are rounded too."""
        for name, kind in self.plan.outer.items() if self.plan else ():
            shape, own = self.session.outer.shapes[name], self.session.quantize
            assert own is not None
            self._stored_bits += own.stored_bits(shape.rows, shape.columns, kind)
            self._weights += shape.size

    def block(self, block: PrunedBlock) -> None:
        """Records the zeros, error and seconds of a pruned block."""
        self.errors += [] if block.error is None else [round(block.error, 6)]
        self.experts_without_tokens += [f"{block.index}.{name}" for name in block.experts_without_tokens]
        for linear in self._session.checkpoint.linears[block.index]:
            shape, zeros = (linear.out_features, linear.in_features), block.zeros[linear.name]
            packed = (linear.size - zeros) * self._itemsize  # as `apply --slim` writes it
            if not block.channels:
                packed = matrix_bytes(*shape, zeros, self._itemsize)
            bits = block.bits.get(linear.name)
            if bits is not None and (quantize := self._session.quantize) is not None:
                self._stored_bits += quantize.stored_bits(*shape, bits, zeros if self._session.methods.prunes else 0)
            self._packed += packed - linear.size * self._itemsize
            self._zeros += zeros
            self._weights += linear.size
        for phase, seconds in block.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.peak_bytes["prune"] = peak_memory(self._device)

    def end(self) -> None:
        """Ends nothing: the trial goes on until `close`."""

    def add(self, scores: Scores) -> None:
        """Records the scores of further windows."""
        for key, values in scores.items():
            self.items.setdefault(key, []).extend(values)

    @property
    def compared(self) -> list[float]:
        """The items that the stopper compares, by window or image."""
        return self.main.each(self.items.get(self.main.items, ()))

    def results(self) -> list[Estimate]:
        """The trial's result in each objective; TrialError if one, or the perplexity, is not finite."""
        estimates = {by: by.loss(by.each(self.items[by.items]), None) for by in (*self._measures, PERPLEXITY)}
        for by, result in estimates.items():
            if not math.isfinite(result.value):
                raise TrialError(f"{by.name} is {result.value}: the pruned model's numbers overflow or are not defined")
        return [estimates[by] for by in self._measures]

    def close(self) -> dict[str, Any]:
        """The trial's user attributes; all time outside pruning counts as evaluation."""
        self._timer.lap("all")
        self.seconds["evaluate"] = self._timer.seconds["all"] - sum(self.seconds.values())
        self.peak_bytes["evaluate"] = peak_memory(self._device)
        # Bits per weight with scales, and bytes of all weights of the model so stored, where they are rounded.
        others = self._session.stored_bytes[0] - self._weights * self._itemsize
        effective, stored = self._stored_bits / self._weights, others + -(-self._stored_bits // 8)
        attributes = {
            "realised": self._zeros / self._weights,
            "packed_bytes": self._packed,
            "errors": self.errors,
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "device": device_name(self._device),
            "dtype": self._session.dtype,
            "versions": versions(),
            "effective_bits": effective or None,
            "quantized_bytes": stored if effective else None,
            **self.items,
            "misses": self.compared if self.main is ACCURACY else None,
            "experts_without_tokens": self.experts_without_tokens or None,
        }
        return {name: value for name, value in attributes.items() if value is not None}


COMPARED = ("method", "levels", "outer")  # keys of plans that do the same


def find_measured(trial: Trial, plan: Plan) -> FrozenTrial | None:
    """An earlier trial of the same point or plan that was fully measured or whose plan failed, if any.

    A pattern may round several points to one plan.
    """
    fields = plan.model_dump(mode="json")
    for other in trials_in(trial.study, TrialState.COMPLETE, TrialState.FAIL):
        earlier = other.user_attrs.get("plan", {})
        same = other.params == trial.params or all(earlier.get(key) == fields.get(key) for key in COMPARED)
        if same and counts(other) and "stopped_after" not in other.user_attrs:
            return other
    return None


def is_hopeless(trial: Trial, seen: list[float], new: int, windows: int) -> bool:
    """Reports the mean NLL or KL (nats per token) of each group that the `new` windows complete, and asks the stopper.

    The groups are the same in all trials, whatever the size of the parts that are evaluated.
    """
    size = -(-windows // GROUPS)
    for group in range((len(seen) - new) // size, -(-len(seen) // size)):
        part = seen[group * size : (group + 1) * size]
        if len(part) == size or len(seen) == windows:
            trial.report(statistics.fmean(part), group)
    return trial.should_prune()


def estimate(trial: Trial, seen: Sequence[float], by: Measure = PERPLEXITY) -> float:
    """The value of a stopped trial, comparable with full measurements.

    The best trial's mean NLL, KL or error over all windows, plus the mean difference from it on the windows seen: a
    mean over the seen windows alone would depend on how hard those windows are.
    """
    best = best_trial(trial.study)
    assert best is not None
    full = by.each(best.user_attrs[by.items])
    difference = statistics.fmean(own - other for own, other in zip(seen, full, strict=False))
    trial.set_user_attr("stopped_after", len(seen))
    return by.loss([max(0.0, statistics.fmean(full) + difference)], len(full)).value


# --- The final scores of a study: dense, uniform and best on the test text, also over draws of the calibration text.
#
# The models that are pruned for it also continue prompts. Trials of a front have their test scores already: the
# objective measures them while it has the pruned blocks, since all of them are compared.

REPORTER = "reporter"  # system attribute of a study: the process that measures on the test text


@dataclass(frozen=True)
class FinalScores:
    """The final measurements of a study, by row of the test text: numbers of trials, and `dense`."""

    run: StudyRun
    study: Study
    session: Session
    space: Space

    def report(self) -> None:
        """Measures dense, uniform and the best of each allocation on the test text.

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
                self.run.note(
                    f"draw {draw + 1} of trial {row} gives no number: {error}; its spread over draws is left out"
                )
                nlls = [math.nan] * len(study.user_attrs["test_nlls"][row])
            study.set_user_attr(f"refits:{row}:{draws}:{draw}" if anew else f"draws:{row}:{draw}", nlls)
            if anew:
                fitted_to = {**study.user_attrs.get("fitted_to", {}), str(draws): list(self.session.fitted_to)}
                study.set_user_attr("fitted_to", fitted_to)

    def _shown(self) -> tuple[dict[str, str], LeftOut | None]:
        """The models that continue prompts, by row, and what collects that; None if nothing does, or it is known.

        These are dense, uniform and the best of each allocation; of an image classifier dense, uniform and the best of
        all answer on images.
        """
        study, session, spec = self.study, self.session, self.run.file.study
        options, best = spec.continuations, best_trial(study)
        uniform = uniform_beside(study, best)
        if (
            best is None
            or uniform is None
            or not options.tokens
            or "continuations" in attached(study, best.number)
            or stored_answers(study, best) is not None
        ):
            return {}, None
        goal = goal_in(study)
        ranked = goal.leaders() if goal.compares else []  # allocations at different sparsities do not compare
        others = ((str(trial.number), allocation_name(trial)) for trial in ranked if not is_uniform(trial))
        names = {"dense": "dense", **{row: name for row, name in others if name not in NAMES}}
        names |= {str(best.number): "best", str(uniform.number): "uniform"}
        if spec.images is not None:
            work: Any = ImageAnswers("validation" if spec.data.test is None else "test")
            return names, LeftOut(work, {*NAMES}, "answers on images", session.watch)
        work = Prompts((*PROMPTS, *options.prompts), options.tokens, "memory")
        shown = LeftOut(work, {*NAMES, *names.values()}, "continuations", session.watch)
        if not can_keep(session.checkpoint):
            shown.leave_out("the model leaves no room for a pruned copy; `tune.py generate` makes them")
        return names, shown

    def _on_test_text(self, row: str, name: str, shown: LeftOut | None) -> Scores:
        """Scores on the test text, or images (else the validation text), with KLs of a trial if minimised.

        `name`: of the row's model, if that is shown too.
        """
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
        observers: Sequence[Observer[Any]],
        name: str,
        drawn: Session | None = None,
        is_refitted: bool = False,
    ) -> None:
        """Passes the blocks of a row's model to observers, with the batch sizes of its measurement.

        Those affect its mask. `drawn`: prunes it, and its plan is fitted to that draw if it `is_refitted`.
        """
        trial = None if row == "dense" else self.study.trials[int(row)]
        plan = self.space.stored_plan(trial) if trial else None
        self.run.watch(TrialStarted(title, plan))
        self.session.begin({**stored_batches(self.study), **(stored_batches(trial) if trial else {})})
        session = drawn or self.session
        with oom_as_user_error(title):
            if is_refitted and trial:
                plan = replace(self.space, budget=session.budget(self.space.budget.target)).plan(trial.params)
            session.measure(plan, observers, name)


def store_test_scores(study: Study, name: str, scores: Scores) -> None:
    """Stores the scores of a trial, or of `dense`, on the test items."""
    for key in sorted(scores, key="nlls".__eq__):  # the NLLs last, which mark a trial as reported
        study.set_user_attr(f"test_{key}:{name}", scores[key])
