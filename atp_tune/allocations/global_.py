"""Global: one threshold for the whole model; a linear loses as many weights as it has scores below it.

    s_k = share of linear k's scores among the ⌊S N⌋ lowest of the model     N weights over all linears

The scores are |W_ij| for `magnitude` and |W_ij| ‖X_j‖, with inputs of the dense model, for the other pruners; of equal
scores the first in the model's order go. There is no parameter. The share of zeros is ⌊S N⌋ / N, so that it may miss
the target by less than one weight.

Source: the usual baseline of global pruning, as in Lee et al., "SNIP: Single-shot Network Pruning based on Connection
Sensitivity", ICLR 2019, section 4, with these scores in the place of theirs. Only the shares are global here: which
weights go is the pruner's to say, so that with `magnitude` exactly the model's lowest go, while Wanda still takes as
many from each row of a linear.
"""

from atp_tune.allocations.budget import Budget, LinearSparsities


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """Global has no parameters."""
    return {}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """Its only point."""
    return [{}]


def sparsities(budget: Budget) -> LinearSparsities:
    """One sparsity per linear of each block."""
    return budget.require_evidence("global").global_sparsities(budget.target, budget.score)
