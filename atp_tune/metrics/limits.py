"""How far a pruned model is beyond a limit of quality, at the upper end of its standard error.

    max_increase    ln(1 + r + e) - ln(1 + limit)                    r ± e paired change of perplexity against dense
    max_perplexity  as max_increase with 1 + limit = limit / PPL of the dense model
    max_kl          k + e - limit                                     k ± e mean KL in nats per token

Negative or 0: within the limit. Each grows with sparsity, and is smooth enough to be interpolated.
"""

import math
from collections.abc import Mapping, Sequence

from atp_tune.metrics.kl import divergence
from atp_tune.metrics.perplexity import change, perplexity


def excess(
    limit: Mapping[str, float],
    dense: Sequence[float] | None,
    nlls: Sequence[float] | None,
    kls: Sequence[float] | None = None,
) -> float | None:
    """The excess over a limit, from window NLLs [n] of the dense and the pruned model, or window KLs [n].

    `limit`: one of the keys above and its value. None if the numbers that it needs are missing.
    """
    key, value = next(iter(limit.items()))
    if key == "max_kl":
        if not kls:
            return None
        found = divergence(kls)
        return found.value + found.stderr - value
    if not dense or not nlls or len(dense) != len(nlls):
        return None
    worst = value / perplexity(dense).value if key == "max_perplexity" else 1 + value
    against = change(dense, nlls)
    upper = 1 + against.value + against.stderr
    return math.log(upper / worst) if 0 < upper < math.inf else math.inf
