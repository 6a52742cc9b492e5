"""The points of a study over an interval of sparsities, each beside dense and uniform at the same sparsity.

Without a limit they are the Pareto front of sparsity and perplexity (or KL), and the best plan at each other sparsity
where uniform is measured too; with one, all plans that were measured in full, each within the limit or beyond it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import optuna
from optuna.trial import FrozenTrial

from atp_tune.errors import UserError
from atp_tune.measures import Limit
from atp_tune.metrics.speed import Speed
from atp_tune.results.annotations import speed_of
from atp_tune.results.trials import is_uniform
from atp_tune.storage import progress


@dataclass(frozen=True)
class Point:
    """A trial at its target sparsity.

    excess       over the study's limit, see `measures.excess`; None without a limit
    is_best      it is the study's best trial
    on_front     no other trial is both sparser and better
    packed_bytes  of all weights in a packed folder; None for trials of earlier versions
    speed        what `speedup` measured; None without
    """

    trial: FrozenTrial
    sparsity: float
    excess: float | None
    is_best: bool
    on_front: bool = True
    packed_bytes: int | None = None
    speed: Speed | None = None

    @property
    def is_within(self) -> bool:
        """Whether it is within the study's limit."""
        return self.excess is not None and self.excess <= 0


def points_of(study: optuna.Study) -> list[Point]:
    """The points by sparsity, the lowest first; [] for a study at one sparsity."""
    if progress.interval_of(study) is None:
        return []
    best = progress.best_trial(study)
    measured, front = progress.measured(study), progress.front_of(study)
    found = measured if study.user_attrs.get("limit") else [*front, *_best_beside_uniform(measured, front)]
    shown = [trial for trial in found if progress.sparsity_of(trial) is not None and "repeats" not in trial.user_attrs]
    shown.sort(key=lambda trial: (trial.params["sparsity"], not is_uniform(trial), trial.number))
    numbers = {trial.number for trial in front}
    return [
        Point(
            trial=trial,
            sparsity=float(trial.params["sparsity"]),
            excess=progress.excess_of(study, trial) if study.user_attrs.get("limit") else None,
            is_best=best is not None and trial.number == best.number,
            on_front=trial.number in numbers,
            packed_bytes=trial.user_attrs.get("packed_bytes"),
            speed=speed_of(study, trial.number),
        )
        for trial in shown
    ]


def _best_beside_uniform(measured: Sequence[FrozenTrial], front: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The best trial at each sparsity where uniform is measured, and where no trial is on the front."""
    found: dict[float, FrozenTrial] = {}
    sparsities = {trial.params.get("sparsity") for trial in measured if is_uniform(trial)}
    sparsities -= {trial.params.get("sparsity") for trial in front}
    for trial in sorted(measured, key=progress.place):
        if trial.params.get("sparsity") in sparsities:
            found.setdefault(trial.params["sparsity"], trial)
    return list(found.values())


def nearest(study: optuna.Study, sparsity: float) -> FrozenTrial:
    """The trial of the Pareto front with the nearest sparsity, the lower of two; UserError without one."""
    front = [trial for trial in progress.front_of(_ranged(study)) if progress.sparsity_of(trial) is not None]
    if not front:
        raise UserError(f"study {study.study_name}: no trial has a value yet")
    return min(front, key=lambda trial: (round(abs(trial.params["sparsity"] - sparsity), 6), trial.params["sparsity"]))


def sparsest_within(study: optuna.Study, limit: Limit) -> tuple[FrozenTrial, float]:
    """The sparsest trial within a limit, or the nearest if none is, and its excess.

    UserError if no trial has the numbers that the limit needs.
    """
    found = progress.best_of(_ranged(study), study.get_trials(deepcopy=False), limit)
    if found is None:
        raise UserError(f"study {study.study_name}: no trial has a value yet")
    excess = progress.excess_of(study, found, limit)
    if excess == inf:
        key = next(iter(limit))
        lacking = {
            "max_kl": "KL divergence; its search.objective has none",
            "max_drop": "accuracy beside dense; --max-drop is of image classifiers",
        }.get(key, "perplexity beside dense")
        raise UserError(f"study {study.study_name}: no trial has a finite {lacking}")
    return found, excess


def _ranged(study: optuna.Study) -> optuna.Study:
    """The study itself; UserError if it is at one sparsity."""
    if progress.interval_of(study) is None:
        only = study.user_attrs.get("fingerprint", {}).get("sparsity")
        at = f"only at {only:.4g}" if isinstance(only, float) else "at one sparsity"
        raise UserError(f"study {study.study_name}: measures plans {at}; choose one of its trials with --trial N")
    return study
