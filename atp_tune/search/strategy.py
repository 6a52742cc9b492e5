"""How a study proposes its trials: its sampler, the points that it queues first, and the goal that may end it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from atp_tune.search.limit_search import LimitSampler, LimitSearch
from atp_tune.search.samplers import first_trials, make_sampler
from atp_tune.search.screening import begins_with, confirmed, over_interval
from atp_tune.search.space import Params, Space
from atp_tune.search.surrogate import Surrogate
from atp_tune.spec.study import Study
from atp_tune.storage import progress


@dataclass(frozen=True)
class Screened:
    """A screening's trials, the best first, and the window NLLs of its dense model; empty until it is complete."""

    trials: Sequence[FrozenTrial] = ()
    dense: Sequence[float] = ()


@dataclass(frozen=True)
class Strategy:
    """A sampler, the points that are queued first, and the goal that may end the study before its total."""

    sampler: BaseSampler
    first: Sequence[Params]
    goal: "Goal | None" = None


class Goal(Protocol):
    """What a study seeks."""

    @property
    def reached(self) -> str:
        """Why nothing is left to measure."""

    def is_idle(self, study: optuna.Study) -> bool:
        """Whether nothing is left to measure for it, beside what is being measured now."""


@dataclass(frozen=True)
class WholeFront:
    """Every point of a front is measured; fewer than the total, where the best point at a sparsity is uniform."""

    points: Sequence[Params]
    reached: str = "the best point at a sparsity is uniform"

    def is_idle(self, study: optuna.Study) -> bool:
        """Whether no point is left that no trial has measured, failed at, or measures now."""
        trials = study.get_trials(deepcopy=False)
        begun = [trial.params for trial in trials if progress.counts(trial) or trial.state == TrialState.RUNNING]
        return bool(self.points) and all(point in begun for point in self.points)


def make_strategy(spec: Study, space: Space, study: optuna.Study, screened: Screened, total: int) -> Strategy:
    """The strategy of a study with this total; `screened`: of its screening, if it has one."""
    search, screen = spec.search, spec.search.screen
    if "screens" in study.user_attrs or (screen is None and spec.limit is None):
        return Strategy(make_sampler(search, space), first_trials(search, space)[:total])
    if space.sparsities is None:
        assert screen is not None
        first = begins_with(confirmed(screened.trials, space, screen.confirm), space, total)
        return Strategy(make_sampler(search, space, screened.trials), first)
    trials, dense = screened.trials, screened.dense or None
    if not trials:  # without a screening never the study's own: a resumed study would propose other points
        trials, dense = progress.measured(study) if screen else [], study.user_attrs.get("dense")
    surrogate = Surrogate(space, trials, search.seed, None if "kl" in search.objective else dense)
    if spec.limit is not None:
        limit = LimitSearch(space, surrogate, spec.limit.given, dense)
        return Strategy(LimitSampler(limit), [], limit)
    assert screen is not None
    points = over_interval(surrogate, space, screen.confirm)[:total] if screened.trials else []
    return Strategy(make_sampler(search, space), points, WholeFront(points) if search.trials is None else None)
