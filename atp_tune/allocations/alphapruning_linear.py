"""AlphaPruning as its authors' code for image classifiers has it: a sparsity for each linear, not for each block.

    w_l = 1 - ε + 2ε (α_l - min α) / (max α - min α)                         in [1-ε, 1+ε], l a linear of any block
    s_l = min(1, c w_l)

c makes the mean of s weighted by size equal to the target S. α_l is Hill's estimator over the upper half of the
eigenvalues of WᵀW (`middle_exponent` in `blocks/dense_metrics.py`), α_l low: a heavy tail, a denser linear. With ε = 0
or equal exponents the allocation is uniform.

Source: Lu et al., "AlphaPruning", NeurIPS 2024; github.com/haiquanlu/AlphaPruning, `image_classifiers`: metric
`alpha_mid`, ε = 0.2, also the default here. Differences from their code: a sparsity above 1 is set to 1 and the others
are scaled up (theirs keeps it and misses the target); spectra are float64 and without numerical zeros; query, key and
value are three matrices in transformers, one in timm.
"""

from itertools import chain

from atp_tune.allocations.alphapruning import bounds
from atp_tune.allocations.budget import Budget, LinearSparsities, proportional, rows_of, spread

__all__ = ["bounds", "initial_points", "sparsities"]


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """The authors' default."""
    return [{"epsilon": 0.2}]


def sparsities(budget: Budget, epsilon: float = 0.2) -> LinearSparsities | tuple[float, ...]:
    """One sparsity per linear, or per block if all exponents are equal; ValueError for an ε outside [0, 1]."""
    budget.check({"epsilon": (0.0, 1.0)}, epsilon=epsilon)
    measured = budget.require_dense_metrics("alphapruning-linear").tail_exponents("middle")
    exponents = [*chain.from_iterable(measured)]
    if min(exponents) == max(exponents):
        return (budget.target,) * len(budget.sizes)
    weights = [1 - epsilon + 2 * epsilon * level for level in spread(exponents)]
    sizes = [shape.size for shape in chain.from_iterable(budget.linears)]
    return rows_of(proportional(weights, sizes, budget.target), budget.linears)
