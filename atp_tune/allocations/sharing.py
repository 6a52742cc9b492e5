"""What several allocations have in common: evidence, and shares in proportion to weights."""

from collections.abc import Sequence

from atp_tune.allocations.budget import Budget, Evidence


def evidence(budget: Budget, allocation: str) -> Evidence:
    """What is measured on the dense model; ValueError for a budget that comes without a model."""
    if budget.evidence is None:
        raise ValueError(f"{allocation}: needs a model to measure, and the budget has none")
    return budget.evidence


def spread(values: Sequence[float]) -> tuple[float, ...]:
    """Values mapped linearly so that the lowest is 0 and the highest 1; all 0 where they are equal."""
    low, high = min(values), max(values)
    return tuple((value - low) / (high - low) if high > low else 0.0 for value in values)


def proportional(weights: Sequence[float], sizes: Sequence[int], mean: float) -> tuple[float, ...]:
    """Shares min(1, c w_i) of parts of these sizes, with the c > 0 that makes their weighted mean `mean`, in [0, 1].

    Shares that would exceed 1 are 1, and the rest is scaled up, until none does. Weights must be positive.
    """
    wanted = mean * sum(sizes)
    scale, full = 0.0, frozenset[int]()
    while len(full) < len(sizes):
        free = [i for i in range(len(sizes)) if i not in full]
        scale = (wanted - sum(sizes[i] for i in full)) / sum(weights[i] * sizes[i] for i in free)
        exceeding = {i for i in free if scale * weights[i] > 1}
        if not exceeding:
            break
        full |= exceeding
    return tuple(1.0 if i in full else min(1.0, max(0.0, scale * weight)) for i, weight in enumerate(weights))
