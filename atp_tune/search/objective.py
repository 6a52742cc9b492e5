"""The objective: what one Optuna trial does. Here, and only here, torch and Optuna meet.

plan        ← the space, as the sampler proposes
weights     ← dense weights, pruned block by block as the plan says
NLLs        ← windows of the search text, group by group, until the stopper ends a hopeless trial
perplexity  ← exp(mean NLL)
KL          ← mean over windows, from the dense model, where the study minimises it
"""

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames

from optuna import Trial
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.checkpoints.devices import is_out_of_memory
from atp_tune.errors import TrialError, UserError
from atp_tune.events import Note, TrialStarted, Watch
from atp_tune.metrics.perplexity import perplexity
from atp_tune.plan import Plan
from atp_tune.search.context import TrialContext
from atp_tune.search.record import Record
from atp_tune.search.scoring import GROUPS
from atp_tune.search.space import Space
from atp_tune.storage.cutoffs import CutOff
from atp_tune.storage.database import set_attributes
from atp_tune.storage.fingerprint import PERPLEXITY, batches_of
from atp_tune.storage.lost_trials import INTERRUPTED, given_up
from atp_tune.storage.process_identity import identity
from atp_tune.storage.ranking import best_trial
from atp_tune.storage.totals import counts


@dataclass(frozen=True)
class Objective:
    """Values on the search text of the plan that a trial proposes, one a goal; TrialError where there are none."""

    context: TrialContext
    space: Space
    stops: bool  # the study has a stopper
    watch: Watch
    goals: tuple[str, ...] = PERPLEXITY

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
        began = batches_of(trial.study)
        self.context.begin(began)
        record = Record(self.context.checkpoint.device, self.context.dtype)
        blocks = record.follow(self.context.prune(plan), self.context.checkpoint.sizes)
        windows = len(self.context.windows["search"])
        stops = self.stops and not plan.is_uniform and best_trial(trial.study) is not None  # uniform is its measure
        for nlls, kls in self.context.scores(blocks, "search", stops, "kl" in self.goals):
            record.nlls += nlls
            record.kls += kls
            hopeless = self.stops and is_hopeless(trial, record.kls or record.nlls, len(nlls), windows)
            if stops and hopeless and len(record.nlls) < windows:
                set_attributes(trial, {**record.close(), **self._batches()})
                return (estimate(trial, record.kls or record.nlls, "kls" if record.kls else "nlls"),)
        results = [record.result(goal) for goal in self.goals]
        for goal, result in zip(self.goals, results, strict=True):
            if not math.isfinite(result.value):
                raise TrialError(f"{goal} is {result.value}: the pruned model's numbers overflow or are not defined")
        set_attributes(trial, {**record.close(), **self._batches(), "stderr": results[0].stderr})
        if self.context.batches != began and best_trial(trial.study) is None:
            # The first, where memory ran out: the others need not meet that.
            trial.study.set_user_attr("batches", self.context.batches)
        return tuple(result.value for result in results)

    def _batches(self) -> dict[str, object]:
        return {"batch_windows": self.context.batch("calibration").windows, "batches": self.context.batches}

    def _repeat(self, trial: Trial, earlier: FrozenTrial) -> tuple[float, ...]:
        if earlier.state == TrialState.FAIL:
            reason = earlier.user_attrs.get("failure") or f"cut off {given_up(earlier)}"
            raise TrialError(f"failed before, as trial {earlier.number}: {reason}")
        self.watch(Note(f"trial {trial.number}: measured before, as trial {earlier.number}"))
        set_attributes(trial, {**earlier.user_attrs, **identity(), "repeats": earlier.number})
        assert earlier.values is not None
        return tuple(earlier.values)


def planned(plan: Plan) -> dict[str, object]:
    """The sparsities of a plan as user attributes: per block, and per linear where they differ within a block."""
    linears = {"linear_sparsities": list(map(list, plan.linear_sparsities))} if plan.linear_sparsities else {}
    return {"sparsities": list(plan.sparsities), **linears}


def find_measured(trial: Trial, plan: Plan) -> FrozenTrial | None:
    """An earlier trial of the same point, or plan, that has a full measurement or failed by itself, if there is one."""
    for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        same = other.params == trial.params or is_of(other, plan)
        if same and counts(other) and "stopped_after" not in other.user_attrs:
            return other
    return None


def is_of(trial: FrozenTrial, plan: Plan) -> bool:
    """Whether a trial is of a plan: a pattern may round several points of the space to the same one."""
    own = {key: trial.user_attrs[key] for key in ("sparsities", "linear_sparsities") if key in trial.user_attrs}
    return trial.params.get("pruner") == plan.pruner and own == planned(plan)


def is_hopeless(trial: Trial, nlls: list[float], new: int, windows: int) -> bool:
    """Reports the mean NLL or KL (nats per token) of each group of windows that the `new` ones complete, and asks the
    stopper whether to go on. The groups are the same in all trials, whatever comes at a time.
    """
    size = -(-windows // GROUPS)
    for group in range((len(nlls) - new) // size, -(-len(nlls) // size)):
        part = nlls[group * size : (group + 1) * size]
        if len(part) == size or len(nlls) == windows:
            trial.report(statistics.fmean(part), group)
    return trial.should_prune()


def estimate(trial: Trial, seen: list[float], kind: str = "nlls") -> float:
    """Value of a stopped trial, comparable with the full ones: the best trial's mean NLL or KL over all windows, plus
    the mean difference from it on the windows seen. A mean over those windows alone would be of an easier text.
    """
    best = best_trial(trial.study)
    assert best is not None
    full = best.user_attrs[kind]
    difference = statistics.fmean(own - other for own, other in zip(seen, full, strict=False))
    trial.set_user_attr("stopped_after", len(seen))
    mean = statistics.fmean(full) + difference
    return max(0.0, mean) if kind == "kls" else perplexity([mean]).value


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
