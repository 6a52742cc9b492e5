"""A stored trial's allocation and scores, and the uniform trial to compare it with."""

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.metrics.kl import Divergence, divergence
from atp_tune.metrics.perplexity import Perplexity, perplexity
from atp_tune.spec.config import Scores
from atp_tune.storage import progress


def is_uniform(trial: FrozenTrial) -> bool:
    """Whether all linears have the same sparsity, except for the pattern's rounding."""
    attrs, numbers = trial.user_attrs, [value for value in trial.params.values() if not isinstance(value, str)]
    if trial.params.get("allocation") == "uniform" or (numbers and not any(numbers)):
        return True
    return "linear_sparsities" not in attrs and len(set(attrs.get("sparsities", ()))) == 1


def allocation_of(trial: FrozenTrial) -> str:
    """Name of a trial's allocation."""
    return "uniform" if is_uniform(trial) else str(trial.params.get("allocation", "atp"))


def parameters_of(trial: FrozenTrial) -> dict[str, float]:
    """The parameters of a trial's allocation."""
    return {name: value for name, value in trial.params.items() if name not in ("pruner", "allocation")}


def score_of(trial: FrozenTrial) -> Perplexity | None:
    """A trial's validation perplexity with its error; None without one, e.g. if it minimises KL and was stopped."""
    if trial.values is None:
        return None
    if "kls" not in trial.user_attrs:
        return Perplexity(value=trial.values[0], stderr=trial.user_attrs.get("stderr", 0.0))
    nlls = trial.user_attrs.get("nlls")
    return perplexity(nlls) if nlls and "stopped_after" not in trial.user_attrs else None


def kl_of(trial: FrozenTrial) -> Divergence | None:
    """A trial's KL on the validation text; None if its study does not minimise KL."""
    if trial.values is None or "kls" not in trial.user_attrs:
        return None
    return Divergence(value=trial.values[-1], stderr=divergence(trial.user_attrs["kls"]).stderr)


def is_by_kl(trial: FrozenTrial) -> bool:
    """Whether a trial's only value is its KL."""
    return len(progress.values_of(trial)) == 1 and "kls" in trial.user_attrs


def uniform_of(study: optuna.Study, best: FrozenTrial | None) -> FrozenTrial | None:
    """The uniform trial with the best trial's pruner."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pruner = best.params.get("pruner") if best else None
    matching = (trial for trial in done if trial.params.get("pruner") == pruner and is_uniform(trial))
    return next(matching, None)


def best_of_each(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial of each allocation, the best first; a trial with equal sparsities counts as uniform."""
    best: dict[str, FrozenTrial] = {}
    for trial in progress.measured(study):
        best.setdefault(allocation_of(trial), trial)
    return list(best.values())


def scores_of(trial: FrozenTrial | None, reports: dict[str, list[float]]) -> Scores:
    """A trial's perplexities on both texts; `reports`: window NLLs on the test text by trial."""
    if trial is None:
        return Scores(validation=None, test=None)
    return Scores(validation=score_of(trial), test=stored(reports.get(str(trial.number))))


def stored(nlls: list[float] | None) -> Perplexity | None:
    """The perplexity of window NLLs, None without any."""
    return perplexity(nlls) if nlls else None
