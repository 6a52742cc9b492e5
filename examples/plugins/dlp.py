"""DLP: blocks whose weights have lower Wanda scores stay denser.

    m_i = median of |W_jk| ‖X_k‖₂ over all linears of block i                            i = 0 … L-1
    n_i = (max m - m_i) / (max m - min m)         its importance 1 - m_i / Σ m, mapped to [0, 1]
    s_i = S - 2α (n_i - n̄)

S target, X inputs in the dense model, n̄ the mean of n weighted by size, which keeps the mean at S. α = 0 is uniform. Of
an even number of scores the lower of both medians counts.

Source: Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", ICML 2025, with the default α = 0.15.
"""

import torch

from atp_tune.allocations.budget import Budget, spread
from atp_tune.plugins import allocation
from atp_tune.pruners.statistics import InputNorms


@allocation("dlp")
class DLP:
    """Blocks whose weights have lower Wanda scores, by their median, stay denser."""

    contains, measures_inputs = ("uniform",), True

    def bounds(self, budget: Budget) -> dict[str, tuple[float, float]]:
        return {"alpha": (0.0, min(budget.target, 1 - budget.target) / 2)}  # so that all s_i are in [0, 1]

    def initial_points(self, budget: Budget) -> list[dict[str, float]]:
        return [{"alpha": min(0.15, self.bounds(budget)["alpha"][1])}]

    def sparsities(self, budget: Budget, alpha: float) -> tuple[float, ...]:
        levels = spread([-m for m in budget.require_dense_metrics("dlp").of_blocks("dlp", median_score, InputNorms)])
        return tuple(budget.target - 2 * alpha * (level - budget.mean(levels)) for level in levels)


def median_score(linears: list[tuple[torch.Tensor, InputNorms | None]]) -> float:
    scores = [weight.abs().float() * (inputs.norms() if inputs else 1.0) for weight, inputs in linears]
    return float(torch.cat([part.flatten() for part in scores]).median())
