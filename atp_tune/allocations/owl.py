"""OWL: blocks with more outlier scores stay denser.

    r_i = share of the Wanda scores |W_jk| ‖X_k‖ of all linears of the block above M times their mean
    n_i = (r_i - min r) / (max r - min r)
    s_i = S - 2λ (n_i - n̄)                                                              i = 0 … L-1

S target, M threshold, λ (`lam`) half the range of the sparsities, X the inputs in the dense model, n̄ the mean of n
weighted by block size, which keeps the weighted mean at S. Since n_i - n̄ is in [-1, 1], all s_i are in [0, 1] for every
λ <= min(S, 1-S) / 2. With λ = 0 or equal ratios the allocation is uniform.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", ICML 2024; github.com/luuyin/OWL. The defaults M = 5 and λ = 0.08 are those of their script; the intervals
cover the values that they try. Differences from their code: n̄ is weighted (theirs is not, which is the same for blocks
of equal size); λ has a bound (theirs sets negative sparsities to 0.01 and so misses the target); scores are float32 and
their mean float64 (theirs are float16).
"""

import math

from atp_tune.allocations.budget import Budget, spread

measures_inputs = True
THRESHOLDS = (3.0, 10.0)
WIDTHS = (0.02, 0.2)


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """The authors' intervals of `M` and `lam`; `lam` is limited so that sparsities stay in [0, 1]."""
    low, high = (min(width, _highest(budget)) for width in WIDTHS)
    return {"M": THRESHOLDS, "lam": (low, high)}


def _highest(budget: Budget) -> float:
    return min(budget.target, 1 - budget.target) / 2


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """The authors' defaults, with λ limited to its interval."""
    return [{"M": 5.0, "lam": min(0.08, bounds(budget)["lam"][1])}]


def sparsities(budget: Budget, M: float = 5.0, lam: float = 0.08) -> tuple[float, ...]:
    """One sparsity per block; ValueError for M < 0 or λ outside [0, min(S, 1-S) / 2]."""
    budget.check({"M": (0.0, math.inf), "lam": (0.0, _highest(budget))}, M=M, lam=lam)
    levels = spread(budget.require_dense_metrics("owl").outlier_ratios(M))
    middle = budget.mean(levels)
    return tuple(min(1.0, max(0.0, budget.target - 2 * lam * (level - middle))) for level in levels)
