"""How Optuna proposes and stops: the sampler and the stopper of a study."""

import warnings

from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, GridSampler, RandomSampler, TPESampler

from atp_tune.space import Space
from atp_tune.study import Search

STARTS = 4  # trials before a model of the objective is fitted: plenty for one or two parameters


def make_sampler(search: Search, space: Space, seed: int) -> BaseSampler:
    """The sampler of a study; `seed` grows with the trials that are there, so that a resume does not repeat draws."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        match search.sampler:
            case "gp":
                return GPSampler(seed=seed, n_startup_trials=STARTS, deterministic_objective=True)
            case "tpe":
                return TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True)
            case "grid":
                return GridSampler(space.grid(search.step), seed=seed)
            case "random":
                return RandomSampler(seed=seed)


def make_stopper(search: Search) -> BasePruner:
    """What ends hopeless trials early; trials are compared group by group of windows."""
    return WilcoxonPruner() if search.stopper == "wilcoxon" else NopPruner()


def total_trials(search: Search, space: Space) -> int:
    """Trials of the whole study: as asked, and on a grid no more than it has points (and uniform, per pruner)."""
    if search.sampler != "grid":
        assert search.trials is not None
        return search.trials
    points = 1
    for values in space.grid(search.step).values():
        points *= len(values)
    return min(search.trials or points + len(space.pruners), points + len(space.pruners))
