"""A stored trial's allocation and scores, and the uniform trial to compare it with."""

import statistics
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.measures import Divergence, Perplexity, divergence, perplexity
from atp_tune.plan import METHODS, Plan, is_zero, method_in
from atp_tune.spec.config import Divergences, Scores
from atp_tune.storage import progress

NO_PARAMETERS = (*METHODS, "allocation", "sparsity")  # of an allocation, among a trial's parameters


def is_uniform(trial: FrozenTrial) -> bool:
    """Whether all linears have the same sparsity, except for the pattern's rounding."""
    attrs, allocation = trial.user_attrs, str(trial.params.get("allocation", "atp"))
    numbers = [value for name, value in trial.params.items() if name not in NO_PARAMETERS]
    if allocation == "uniform" or is_zero(allocation, numbers):
        return True
    levels = attrs.get("plan", {}).get("levels", [])  # as they are stored: this is asked of all trials of a study
    has_linears = isinstance(levels[0], dict) and "linears" in levels[0] if levels else True
    return not has_linears and all(level == levels[0] for level in levels)


def levels_of(trial: FrozenTrial | None) -> list[float] | None:
    """A trial's bits of each block, or means of its linears, else sparsities of each block; None without a plan."""
    plan = Plan.stored_in(trial.user_attrs) if trial else None
    return None if plan is None else list(plan.amounts)


def allocation_of(trial: FrozenTrial) -> str:
    """Name of a trial's allocation."""
    return "uniform" if is_uniform(trial) else str(trial.params.get("allocation", "atp"))


def parameters_of(trial: FrozenTrial) -> dict[str, float]:
    """The parameters of a trial's allocation.

    Over an interval of sparsities a trial draws shares of their bounds, and stores the values when it has its plan.
    """
    if "sparsity" in trial.params:
        return dict(trial.user_attrs.get("plan", {}).get("parameters", {}))
    return {name: value for name, value in trial.params.items() if name not in NO_PARAMETERS}


def score_of(trial: FrozenTrial) -> Perplexity | None:
    """A trial's validation perplexity with its error; None without one, e.g. if it is by KL and was stopped."""
    if trial.values is None:
        return None
    if "kls" not in trial.user_attrs and not is_by_accuracy(trial):
        return Perplexity(value=trial.values[0], stderr=trial.user_attrs.get("stderr", 0.0))
    nlls = trial.user_attrs.get("nlls")
    return perplexity(nlls) if nlls and "stopped_after" not in trial.user_attrs else None


def kl_of(trial: FrozenTrial) -> Divergence | None:
    """A trial's KL on the validation text; None if its study does not minimise KL."""
    if trial.values is None or "kls" not in trial.user_attrs:
        return None
    value = trial.values[0] if is_by_kl(trial) else trial.values[-1]
    return Divergence(value=value, stderr=divergence(trial.user_attrs["kls"]).stderr)


def divergences_of(study: optuna.Study) -> dict[int, Divergences]:
    """The KL of each trial that has one, on both texts."""
    reports = study.user_attrs.get("test_kls", {})
    found = {trial.number: (kl_of(trial), reports.get(str(trial.number))) for trial in study.get_trials(deepcopy=False)}
    return {
        number: Divergences(validation=search, test=divergence(report) if report else None)
        for number, (search, report) in found.items()
        if search
    }


def is_by_kl(trial: FrozenTrial) -> bool:
    """Whether a trial's only value, or its only one beside the density, is its KL."""
    return len(progress.values_of(trial)) - ("sparsity" in trial.params) == 1 and "kls" in trial.user_attrs


def is_by_accuracy(trial: FrozenTrial) -> bool:
    """Whether a trial's value is its top-1 error."""
    return "misses" in trial.user_attrs


def error_of(trial: FrozenTrial) -> float | None:
    """A trial's top-1 error on the validation images, estimated if it was stopped; None if it is not minimised."""
    if not trial.values or not is_by_accuracy(trial):
        return None
    return trial.values[0] if "stopped_after" in trial.user_attrs else statistics.fmean(trial.user_attrs["misses"])


def uniform_of(study: optuna.Study, best: FrozenTrial | None) -> FrozenTrial | None:
    """The uniform trial with the best trial's pruner and sparsity."""
    return None if best is None else uniform_among(study.get_trials(deepcopy=False), best)


def uniform_among(trials: Iterable[FrozenTrial], best: FrozenTrial) -> FrozenTrial | None:
    """The first measured one of these trials that is uniform and has a trial's pruner and sparsity."""
    kind, done = _kind(best), (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return next((trial for trial in done if _kind(trial) == kind and is_uniform(trial)), None)


def uniforms_of(study: optuna.Study) -> list[FrozenTrial]:
    """The uniform trial of each pruner, in the order of trials."""
    found: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        if is_uniform(trial):
            found.setdefault(method_in(trial.params), trial)
    return list(found.values())


def _kind(trial: FrozenTrial) -> tuple[Any, ...]:
    return method_in(trial.params), progress.sparsity_of(trial)


def best_of_each(study: optuna.Study) -> list[FrozenTrial]:
    """The best trial of each allocation, the best first; a trial with equal sparsities counts as uniform.

    Over an interval of sparsities, where trials at different sparsities do not compare: the best trial, and without a
    limit the others of the Pareto front.
    """
    if progress.interval_of(study) is not None:
        leading = progress.best_trial(study)
        front = [] if study.user_attrs.get("limit") else progress.front_of(study)
        return [leading, *(trial for trial in front if trial.number != leading.number)] if leading else []
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
