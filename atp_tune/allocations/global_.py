"""Global: one threshold for the scores of the whole model gives the sparsity of each linear.

    s_k = share of linear k's scores among the ⌊S N⌋ lowest of the model     N weights over all linears

The scores are |W_ij| for `magnitude`, and |W_ij| ‖X_j‖ with inputs of the dense model for the other pruners. Among
equal scores the first in the order of the model count as lower. There are no parameters. The share of zeros is
⌊S N⌋ / N, which misses the target by less than one weight.

Source: the usual baseline of global pruning, as in Lee et al., "SNIP: Single-shot Network Pruning based on Connection
Sensitivity", ICLR 2019, section 4, with other scores. Only the sparsities of linears are global: the pruner chooses the
weights. So `magnitude` prunes exactly the lowest weights of the model, and Wanda prunes equally many in each row of a
linear.
"""

from atp_tune.allocations.budget import Budget, LinearSparsities, no_bounds, only_point

bounds, initial_points = no_bounds, only_point
measures_inputs = True


def sparsities(budget: Budget) -> LinearSparsities:
    """One sparsity per linear of each block."""
    return budget.require_dense_metrics("global").global_sparsities(budget.target, budget.score)
