"""AlphaPruning: blocks whose weights have a heavier-tailed spectrum, a sign of better training, stay denser.

    α_i = mean exponent of the linears of block i                            low: heavy tail
    w_i = 1 - ε + 2ε (α_i - min α) / (max α - min α)                         in [1-ε, 1+ε]
    s_i = min(1, c w_i)                                                      i = 0 … L-1

c makes the mean of s weighted by block size equal to the target S. The exponent of a linear W is that of a power law
fitted by Hill's estimator to the eigenvalues of WᵀW above some xmin (`blocks/dense_metrics.py`). With ε = 0 or equal
exponents the allocation is uniform.

Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, section 3; github.com/haiquanlu/AlphaPruning. This is the default variant of their
program: `alpha_peak` (xmin near the peak of the spectrum), `block_wise`, ε = 0.3, also the default here; their scripts
set ε from 0.2 to 0.5 by model and pruner. Differences from their code: a sparsity above 1 is set to 1 and the others
are scaled up (theirs keeps it and misses the target); means are weighted by the sizes of blocks; spectra are float64.
"""

from statistics import fmean

from atp_tune.allocations.budget import Budget, proportional, spread

WIDTHS = (0.2, 0.5)


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """The interval of `epsilon` covers the values that the authors use."""
    return {"epsilon": WIDTHS}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """The authors' default."""
    return [{"epsilon": 0.3}]


def sparsities(budget: Budget, epsilon: float = 0.3) -> tuple[float, ...]:
    """One sparsity per block; ValueError for an ε outside [0, 1]."""
    budget.check({"epsilon": (0.0, 1.0)}, epsilon=epsilon)
    exponents = [fmean(block) for block in budget.require_dense_metrics("alphapruning").tail_exponents()]
    if min(exponents) == max(exponents):
        return (budget.target,) * len(budget.sizes)
    return proportional([1 - epsilon + 2 * epsilon * level for level in spread(exponents)], budget.sizes, budget.target)
