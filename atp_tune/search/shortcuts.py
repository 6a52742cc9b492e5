"""What spares a trial its full measurement: an earlier trial of the same plan, and a stopper that ends it."""

import statistics

from optuna import Trial
from optuna.trial import FrozenTrial, TrialState

from atp_tune.metrics.perplexity import perplexity
from atp_tune.plan import Plan
from atp_tune.storage.ranking import best_trial
from atp_tune.storage.totals import counts


def planned(plan: Plan) -> dict[str, object]:
    """The sparsities of a plan as user attributes: per block, and per linear where they differ within a block."""
    linears = {"linear_sparsities": list(map(list, plan.linear_sparsities))} if plan.linear_sparsities else {}
    return {"sparsities": list(plan.sparsities), **linears}


def find_measured(trial: Trial, plan: Plan) -> FrozenTrial | None:
    """An earlier trial of the same point, or plan, that has a full measurement or failed by itself, if there is one."""
    for other in trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
        same = other.params == trial.params or is_trial_of(other, plan)
        if same and counts(other) and "stopped_after" not in other.user_attrs:
            return other
    return None


def is_trial_of(trial: FrozenTrial, plan: Plan) -> bool:
    """Whether a trial is of a plan: a pattern may round several points of the space to the same one."""
    own = {key: trial.user_attrs[key] for key in ("sparsities", "linear_sparsities") if key in trial.user_attrs}
    return trial.params.get("pruner") == plan.pruner and own == planned(plan)


def is_hopeless(trial: Trial, nlls: list[float], new: int, windows: int, groups: int) -> bool:
    """Reports the mean NLL or KL (nats per token) of each group of windows that the `new` ones complete, and asks the
    stopper whether to go on. The groups are the same in all trials, whatever comes at a time.
    """
    size = -(-windows // groups)
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
