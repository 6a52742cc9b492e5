"""What the search's Gaussian process holds likely, written down for plots."""

import math
import statistics
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

GRID = 40  # steps of β in which a posterior is written down


def gp_posterior(
    sampler: GPSampler, study: Study, kinds: dict[str, BaseDistribution], pruners: tuple[str, ...]
) -> dict[str, Any]:
    """The posterior of the value over β of a sampler's GP, for each pruner: mean, and two standard deviations around.

    `study` is the one that the GP was fitted to: its values are logs. `before` is how many there were.
    """
    from atp_tune.compat import SearchSpace, fitted

    gp = fitted(sampler)
    values = [trial.value for trial in study.trials if trial.value is not None]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    curves = {}
    for pruner in pruners:
        points = [_at(beta, pruner, kinds) for beta in _grid(kinds["beta"])]
        inputs = gp._X_train.new_tensor(SearchSpace(kinds).get_normalized_params(points))
        means, variances = (tensor.detach().numpy() for tensor in gp.posterior(inputs))
        middle, width = mean - spread * means, 2 * spread * variances**0.5
        lines = {"mean": middle, "low": middle - width, "high": middle + width}  # the GP sees them upside down
        betas = [round(point.params["beta"], 8) for point in points]
        curves[pruner] = {"beta": betas} | {name: [round(math.exp(v), 3) for v in line] for name, line in lines.items()}
    return {"before": len(values), "curves": curves}


def _grid(kind: BaseDistribution) -> list[float]:
    assert isinstance(kind, FloatDistribution)
    steps = [kind.low + (kind.high - kind.low) * k / GRID for k in range(GRID)]
    return [*steps, kind.high]  # exactly: a sum may end a bit above it, which Optuna refuses


def _at(beta: float, pruner: str, kinds: dict[str, BaseDistribution]) -> FrozenTrial:
    params = {name: pruner if name == "pruner" else beta for name in kinds}
    return optuna.create_trial(value=0.0, params=params, distributions=kinds)
