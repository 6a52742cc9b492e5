"""The objective: what one Optuna trial does. Here, and only here, torch and Optuna meet.

plan        ← the space, as the sampler proposes
weights     ← dense weights, pruned block by block as the plan says
NLLs        ← windows of the validation text, group by group, until the stopper ends a hopeless trial
perplexity  ← exp(mean NLL)
KL          ← mean over windows, from the dense model, where the study minimises it

`shortcuts` has what spares all that: an earlier trial of the same plan, and the stopper's question.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames

from optuna import Trial
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.errors import TrialError, UserError
from atp_tune.events import EventHandler, Message, TrialStarted
from atp_tune.plan import Plan
from atp_tune.search.context import TrialContext
from atp_tune.search.record import Record
from atp_tune.search.scoring import GROUPS
from atp_tune.search.shortcuts import estimate, find_measured, is_hopeless, planned
from atp_tune.search.space import Space
from atp_tune.storage.database import set_attributes
from atp_tune.storage.fingerprint import PERPLEXITY, batches_of
from atp_tune.storage.lost_trials import INTERRUPTED, CutOff, given_up
from atp_tune.storage.process_identity import identity
from atp_tune.storage.ranking import best_trial


@dataclass(frozen=True)
class Objective:
    """Values on the validation text of the plan that a trial proposes, one each objective; TrialError without any."""

    context: TrialContext
    space: Space
    stops: bool  # the study has a stopper
    watch: EventHandler
    objectives: tuple[str, ...] = PERPLEXITY

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """Measures one trial and stores its attributes as they become known."""
        with reasons(trial):
            set_attributes(trial, identity())
            plan = self.space.suggest(trial)
            self.watch(TrialStarted(f"trial {trial.number}", plan, trial.number))
            set_attributes(trial, planned(plan))
            earlier = find_measured(trial, plan)
            return self._repeat(trial, earlier) if earlier else self._measure(trial, plan)

    def _measure(self, trial: Trial, plan: Plan) -> tuple[float, ...]:
        context, batches = self.context, batches_of(trial.study)
        context.begin(batches)
        record = Record(context.checkpoint.device, context.dtype)
        pruned = record.follow(context.prune(plan), context.checkpoint.sizes)
        may_stop = self.stops and not plan.is_uniform and best_trial(trial.study) is not None  # uniform is its measure
        for scores in context.scores(pruned, "validation", may_stop, "kl" in self.objectives):
            record.add(scores)
            if self._is_hopeless(trial, record, len(scores.nlls)) and may_stop:
                self._store(trial, record)
                return (estimate(trial, record.kls or record.nlls, "kls" if record.kls else "nlls"),)
        results = record.results(self.objectives)
        self._store(trial, record, stderr=results[0].stderr)
        if context.batches != batches and best_trial(trial.study) is None:
            # The first, where memory ran out: the others need not meet that.
            trial.study.set_user_attr("batches", context.batches)
        return tuple(result.value for result in results)

    def _is_hopeless(self, trial: Trial, record: Record, new: int) -> bool:
        """Whether the stopper would end the trial now, before its last windows."""
        windows, seen = len(self.context.windows["validation"]), record.kls or record.nlls
        return self.stops and is_hopeless(trial, seen, new, windows, GROUPS) and len(seen) < windows

    def _store(self, trial: Trial, record: Record, **more: object) -> None:
        batches = {"batch_windows": self.context.batch("calibration").windows, "batches": self.context.batches}
        set_attributes(trial, {**record.close(), **batches, **more})

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
    """Stores why a trial gives no value: `failure` if it is its own, `lost` or `cut_off` if it can be run again."""
    try:
        yield
    except KeyboardInterrupt:
        trial.set_user_attr("lost", INTERRUPTED)
        raise
    except (UserError, OptunaError):
        raise
    except Exception as error:
        if not isinstance(error, TrialError) and not is_out_of_memory(error):
            set_attributes(trial, {"lost": "an error", "cut_off": CutOff(crash=type(error).__name__).stored()})
            raise
        reason = str(error) if isinstance(error, TrialError) else "out of memory"
        trial.set_user_attr("failure", reason)
        clear_frames(error.__traceback__)  # Optuna keeps the error in a circle, and the trial's tensors with it
        raise TrialError(reason) from error
