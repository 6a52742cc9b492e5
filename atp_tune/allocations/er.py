"""Erdős–Rényi: linears with few weights for their width stay denser, as in a random sparse graph.

    density_k = min(1, c (rows_k + columns_k) / (rows_k columns_k))          over all linears k of the model
    s_k = 1 - density_k

c is such that the share of zeros over all weights is the target S: linears whose density would exceed 1 stay dense, and
the others give that much more. Nothing is measured, and there is no parameter.

Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity Inspired by
Network Science", Nature Communications 2018, equation 1; Evci et al., "Rigging the Lottery", ICML 2020, section 3,
whose ERK (`erk`) adds the dimensions of convolution kernels. A linear has none, so that both names mean this module.
As in their code linears above the bound are set dense and c is found anew; other than there all of them at once, not
the largest first, which ends at the same densities.
"""

from itertools import chain

from atp_tune.allocations.budget import Budget, LinearSparsities, proportional


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """Erdős–Rényi has no parameters."""
    return {}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """Its only point."""
    return [{}]


def sparsities(budget: Budget) -> LinearSparsities:
    """One sparsity per linear of each block."""
    shapes = list(chain.from_iterable(budget.linears))
    weights = [(shape.rows + shape.columns) / shape.size for shape in shapes]
    densities = iter(proportional(weights, [shape.size for shape in shapes], 1 - budget.target))
    return tuple(tuple(1 - next(densities) for _ in block) for block in budget.linears)
