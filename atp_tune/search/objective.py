"""The objective: one Optuna trial. torch and Optuna meet in this module only.

plan        ← the space, from the sampler's proposal
weights     ← dense weights, pruned block by block by the plan
NLLs        ← windows of the validation text, group by group; the stopper may end the trial between groups
perplexity  ← exp(mean NLL)
KL          ← mean over windows, against the dense model, if the study minimises it
error rate  ← of images, if the study is by accuracy

A plan that an earlier trial measured, or failed on, is not measured again.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any

from optuna import Trial
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.blocks.prune_pass import PrunedBlock, Timer
from atp_tune.checkpoints.devices import device_name, is_out_of_memory, peak_memory, reset_peak_memory
from atp_tune.errors import PluginError, TrialError, UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.measures import ACCURACY, MEASURES, Estimate, Measure
from atp_tune.measures import PERPLEXITY as MEASURE
from atp_tune.packed.layout import matrix_bytes
from atp_tune.plan import Plan
from atp_tune.results.goals import best_trial
from atp_tune.results.status import measured_columns
from atp_tune.run.observers import GROUPS, Observer, RoleScores, TaskResults
from atp_tune.run.session import Session
from atp_tune.scores import Scores
from atp_tune.search.runner import store_test_scores
from atp_tune.search.space import Space
from atp_tune.storage.database import set_attributes
from atp_tune.storage.fingerprint import PERPLEXITY, stored_batches
from atp_tune.storage.progress import INTERRUPTED, CutOff, counts, given_up, identity, trials_in
from atp_tune.utils.cache import versions


@dataclass(frozen=True)
class Objective:
    """A trial's values on the validation text, one per objective; TrialError if the trial gives none."""

    session: Session
    space: Space
    stops: bool  # the study has a stopper
    watch: EventHandler
    objectives: tuple[str, ...] = PERPLEXITY
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
        density = () if plan.target is None else (round(1 - plan.target, 6),)
        return (*(result.value for result in results), *density)

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

    def __init__(self, session: Session, objectives: Sequence[str] = PERPLEXITY) -> None:
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
        estimates = {by: by.loss(by.each(self.items[by.items]), None) for by in (*self._measures, MEASURE)}
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


def find_measured(trial: Trial, plan: Plan) -> FrozenTrial | None:
    """An earlier trial of the same point or plan that was fully measured or whose plan failed, if any.

    A pattern may round several points to one plan.
    """
    fields = plan.model_dump(mode="json")
    for other in trials_in(trial.study, TrialState.COMPLETE, TrialState.FAIL):
        earlier = other.user_attrs.get("plan", {})
        same = other.params == trial.params or all(earlier.get(key) == fields[key] for key in ("method", "levels"))
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


def estimate(trial: Trial, seen: Sequence[float], by: Measure = MEASURE) -> float:
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
