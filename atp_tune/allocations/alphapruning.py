"""AlphaPruning: blocks whose weights have a heavier-tailed spectrum, a sign of good training, stay denser.

    α_i = mean of the exponents of the block's linears                       low: heavy tail
    w_i = 1 - ε + 2ε (α_i - min α) / (max α - min α)                         in [1-ε, 1+ε]
    s_i = min(1, c w_i)                                                      i = 0 … L-1

c is such that the mean of s weighted by block size is the target S. The exponent of a linear W is that of a power law
fitted to the eigenvalues of WᵀW above some xmin, by Hill's estimator (`evidence`). ε = 0, and exponents that are all
equal, make it uniform.

Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, section 3; github.com/haiquanlu/AlphaPruning. Of their variants this is the one that
their scripts run and their program has as default: `alpha_peak` (xmin near the peak of the spectrum), `block_wise`,
ε = 0.3, which is the default here; the scripts set ε from 0.2 to 0.5 by model and pruner. Other than their code: a
sparsity that would exceed 1 is 1, and the rest is scaled up (theirs goes on with more than 1, so that the target is
missed); means are weighted by the linears' own sizes in blocks that differ; spectra are float64.
"""

from statistics import fmean

from atp_tune.allocations.budget import Budget, proportional, spread

WIDTHS = (0.2, 0.5)


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """The interval of `epsilon`: the values that the authors use."""
    return {"epsilon": WIDTHS}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """The authors' default."""
    return [{"epsilon": 0.3}]


def sparsities(budget: Budget, epsilon: float = 0.3) -> tuple[float, ...]:
    """One sparsity per block; ValueError for an ε outside [0, 1]."""
    budget.check({"epsilon": (0.0, 1.0)}, epsilon=epsilon)
    exponents = [fmean(block) for block in budget.require_evidence("alphapruning").tail_exponents()]
    if min(exponents) == max(exponents):
        return (budget.target,) * len(budget.sizes)
    return proportional([1 - epsilon + 2 * epsilon * level for level in spread(exponents)], budget.sizes, budget.target)
