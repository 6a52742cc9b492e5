"""LSA's rule for blocks: those stay denser whose linears lose less when half of each is pruned greedily.

To prune w_j of a row after the weights P costs w_j² H_jj + 2 w_j Σ_{k∈P} w_k H_jk, H = 2 XᵀX / n; in each 128 columns
the cheapest half goes, one by one. E_i: mean cost of block i's linears, s_i as in DLP. LSA, ICLR 2026, BeiYazi0/LSA.
"""

import torch

from atp_tune.allocations.budget import Budget, spread
from atp_tune.plugins import allocation
from atp_tune.pruners.statistics import Hessian


@allocation("lsa")
class LSA:
    """Blocks stay denser whose linears lose less when half of each is pruned greedily."""

    contains, measures_inputs = ("uniform",), True

    def bounds(self, budget: Budget) -> dict[str, tuple[float, float]]:
        return {"strength": (0.0, min(budget.target, 1 - budget.target) / 2)}

    def sparsities(self, budget: Budget, strength: float) -> tuple[float, ...]:
        levels = spread([-e for e in budget.require_dense_metrics("lsa").of_blocks("lsa", mean_cost, Hessian)])
        return tuple(budget.target - 2 * strength * (level - budget.mean(levels)) for level in levels)


def mean_cost(linears: list[tuple[torch.Tensor, Hessian | None]]) -> float:
    total = 0.0
    for w, h in ((weight.float(), inputs.matrix() * ~inputs.dead()) for weight, inputs in linears if inputs):
        costs = w**2 * h.diagonal()
        for here in (slice(start, start + 128) for start in range(0, w.shape[1], 128)):
            part, own = costs[:, here], w[:, here]  # a cost is infinite once its weight is gone
            for _ in range(own.shape[1] // 2):
                least, at = part.min(1, keepdim=True)
                total += float(least.sum())
                part.add_(2 * own * own.gather(1, at) * h[here, here][at[:, 0]]).scatter_(1, at, torch.inf)
            costs += 2 * w * ((own * part.isinf()) @ h[here])
    return total / len(linears)
