"""Row prices: sparsities by prices, of single rows (outputs) within their linear too.

    s_l = S + κ (s*_l - S),    k_lr = n_l (s_l + κ d_lr)                           l a linear, r one of its rows

S target, n inputs, k the number of zeros of a row; κ (`kappa`), the descent and s* as in `allocations.prices`, but that
its loss is the mean of NLL and KL from the dense model, that of distillation (Hinton et al., 2015). d is the offset of
a row, 0 in the mean of its linear. It descends with s*, by the same gradients G:

    p_lr  the mean of - G_ij W_ij over the weights of the row that go next and went last (`blocks/gradients.py`)
    v_lr ← 0.7 v_lr + 0.3 p_lr
    u_lr = (v_lr - v̄_l) / sqrt(mean (v - v̄_l)²), clipped to ±3                   means over the rows of the linear
    d_lr ← d_lr - η u_lr

Where a pruner does not take the lowest scores of each row (SparseGPT, ALPS, magnitude, patterns), the plan is that of
`allocations.prices`.

Reason: Wanda's rule is the same number of zeros in each row, since scores of two rows do not compare: each is about its
own output. What an output is worth to the model, the gradient of the loss tells. Small steps at ever new masks matter:
of one large step most rows are wrong at its end (docs/log.md). Offsets are so many numbers that by the NLL alone they
learn the calibration text as training does; with KL they keep what the dense model predicts of other texts too.
"""

from atp_tune.allocations import gradient
from atp_tune.allocations.budget import Budget, LinearSparsities
from atp_tune.allocations.rows import RowOffsets

contains = gradient.contains
measures_inputs = gradient.measures_inputs
bounds = gradient.bounds
initial_points = gradient.initial_points
DISTANCE = 0.004  # η, the distance of each step of a row


def sparsities(budget: Budget, kappa: float = 1.0) -> LinearSparsities | tuple[float, ...]:
    """One sparsity per linear, or per block if κ = 0; ValueError outside the bounds."""
    budget.check(bounds(budget), kappa=kappa)
    if kappa == 0:
        return (budget.target,) * len(budget.sizes)
    found = budget.require_dense_metrics("gradient-rows").row_priced_sparsities(budget.target, budget.pruner)
    return gradient.at_distance(budget, found.linears, kappa)


def row_offsets(budget: Budget, kappa: float = 1.0) -> RowOffsets | None:
    """The offsets of rows; None where rows do not differ within their linear."""
    if kappa == 0:
        return None
    found = budget.require_dense_metrics("gradient-rows").row_priced_sparsities(budget.target, budget.pruner)
    return None if found.offsets is None else found.offsets.scaled(kappa)
