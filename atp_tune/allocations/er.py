"""Erdős–Rényi: linears with few weights relative to their width stay denser, as in a random sparse graph.

    density_k = min(1, c (rows_k + columns_k) / (rows_k columns_k))          over all linears k of the model
    s_k = 1 - density_k

c makes the share of zeros over all weights equal to the target S: linears whose density would exceed 1 stay dense, and
the others become sparser instead. There are no parameters, and nothing is measured.

Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity Inspired by
Network Science", Nature Communications 2018, equation 1; Evci et al., "Rigging the Lottery", ICML 2020, section 3,
whose ERK (`erk`) adds the dimensions of convolution kernels. A linear has none, so both names mean this module. As in
their code, linears above the bound are set dense and c is computed again; here all of them at once, there the largest
first, with the same result.
"""

from itertools import chain

from atp_tune.allocations.budget import Budget, LinearSparsities, no_bounds, only_point, proportional

bounds, initial_points = no_bounds, only_point


def sparsities(budget: Budget) -> LinearSparsities:
    """One sparsity per linear of each block."""
    shapes = list(chain.from_iterable(budget.linears))
    weights = [(shape.rows + shape.columns) / shape.size for shape in shapes]
    densities = iter(proportional(weights, [shape.size for shape in shapes], 1 - budget.target))
    return tuple(tuple(1 - next(densities) for _ in block) for block in budget.linears)
