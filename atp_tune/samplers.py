"""How Optuna proposes and stops: the sampler and the stopper of a study."""

import itertools
import math
import random
import warnings
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from atp_tune.space import Params, Space
from atp_tune.study import Search

STARTS = 3  # trials before a model of the objective is fitted: plenty for one or two parameters


def make_sampler(search: Search, space: Space, seed: int) -> BaseSampler:
    """The sampler of a study; `seed` grows with the trials that are there, so that a resume does not repeat draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match search.sampler:
            case "gp":
                return LogSampler(GPSampler(seed=seed, n_startup_trials=STARTS))
            case "tpe":
                return TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True)
            case "grid" | "random":  # all points of a grid are among the first trials
                return RandomSampler(seed=seed)


class LogSampler(BaseSampler):
    """Lets a sampler see log perplexity (nats per token), while the study keeps perplexity.

    Perplexity explodes where β is too large: fitted as it is, one such trial flattens the valley that matters.
    """

    def __init__(self, inner: BaseSampler) -> None:
        self._inner = inner

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As the inner sampler does."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the inner sampler proposes in a study in memory that holds the logarithms."""
        if not search_space:
            return {}
        shadow = optuna.create_study()
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        others = study.get_trials(deepcopy=False, states=states)
        shadow.add_trials([_logged(other) for other in others if other.number != trial.number])
        shadow.ask()  # stands for the trial: the inner sampler writes to it
        return self._inner.sample_relative(shadow, shadow.trials[-1], search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the inner sampler does."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


def _logged(trial: FrozenTrial) -> FrozenTrial:
    value = None if trial.value is None else math.log(trial.value)
    return optuna.create_trial(state=trial.state, value=value, params=trial.params, distributions=trial.distributions)


def make_stopper(search: Search) -> BasePruner:
    """What ends hopeless trials early; trials are compared group by group of windows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return WilcoxonPruner() if search.stopper == "wilcoxon" else NopPruner()


def first_trials(search: Search, space: Space) -> list[Params]:
    """What a study asks for before its sampler does: uniform for each pruner, then the points of a grid, shuffled.

    They are queued in the storage, because Optuna's GridSampler loses points over a resume, and ends in a KeyError
    where trials were queued beside a grid of one point.
    """
    points: list[Params] = []
    if search.sampler == "grid":
        grid = space.grid(search.step)
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        random.Random(search.seed).shuffle(points)
    return [*space.uniform(), *points]


def total_trials(search: Search, space: Space) -> int:
    """Trials of the whole study: as asked, and on a grid no more than it has points (and uniform, per pruner)."""
    if search.sampler != "grid":
        assert search.trials is not None
        return search.trials
    all_points = len(first_trials(search, space))
    return min(search.trials or all_points, all_points)
