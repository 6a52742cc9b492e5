"""A stored trial's allocation and scores, and the uniform trial to compare it with."""

from collections.abc import Iterable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from atp_tune.plan import METHODS, Plan, is_zero, method_in
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
