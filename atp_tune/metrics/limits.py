"""How far a pruned model is beyond a limit of quality, at the upper end of its standard error.

    max_increase    ln(1 + r + e) - ln(1 + limit)                    r ± e paired change of perplexity against dense
    max_perplexity  as max_increase with 1 + limit = limit / PPL of the dense model
    max_kl          k + e - limit                                     k ± e mean KL in nats per token
    max_drop        e - d - limit                                     d ± e paired change of accuracy against dense
    min_accuracy    limit - (a - e), the largest over the tasks       a ± e accuracy

Negative or 0: within the limit; of one window the error is not known, and nothing is. Each grows with sparsity, and is
smooth enough to be interpolated; accuracies are not, which move in steps of one item.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from atp_tune.metrics.accuracy import gain
from atp_tune.metrics.kl import divergence
from atp_tune.metrics.perplexity import change, perplexity

Limit: TypeAlias = Mapping[str, float | Mapping[str, float]]  # one key and its value


def excess(
    limit: Limit,
    dense: Sequence[float] | None,
    nlls: Sequence[float] | None,
    kls: Sequence[float] | None = None,
    accuracies: Mapping[str, Sequence[float]] | None = None,
    ranks: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
) -> float | None:
    """The excess over a limit, from window NLLs [n] of the dense and the pruned model, or window KLs [n].

    `limit`: one of the keys above and its value. `accuracies`: of each task, with its standard error. `ranks` [n]: of
    the right classes of images, by the dense and the pruned model. None if numbers that the limit needs are missing.
    """
    key, value = next(iter(limit.items()))
    if isinstance(value, Mapping):
        return _below(value, accuracies or {})
    if key == "max_drop":
        return _lost(value, *ranks)
    if key == "max_kl":
        if not kls:
            return None
        found = divergence(kls)
        return found.value + found.stderr - value if len(kls) > 1 else math.inf
    if not dense or not nlls or len(dense) != len(nlls):
        return None
    worst = value / perplexity(dense).value if key == "max_perplexity" else 1 + value
    against = change(dense, nlls)
    upper = 1 + against.value + against.stderr
    return math.log(upper / worst) if 0 < upper < math.inf and len(nlls) > 1 else math.inf


def _below(limit: Mapping[str, float], accuracies: Mapping[str, Sequence[float]]) -> float | None:
    """The excess of accuracies on tasks."""
    if not limit.keys() <= accuracies.keys():
        return None
    return max(least - (accuracies[task][0] - accuracies[task][1]) for task, least in limit.items())


def _lost(limit: float, before: Sequence[int] | None, after: Sequence[int] | None) -> float | None:
    """The excess of a drop of accuracy between ranks [n] of the same images."""
    if not before or not after or len(before) != len(after):
        return None
    found = gain(before, after)
    return found.stderr - found.value - limit
