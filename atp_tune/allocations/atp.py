"""ATP: sparsities in arithmetic progression; early blocks, whose errors grow in later blocks, stay denser.

    s_i = S + β (i - c)        i = 0 … L-1

S target, β common difference per block, L number of blocks, c mean index weighted by block size, so that the weighted
mean of s is S; (L-1)/2 for blocks of equal size. All s_i are in [0, 1] if and only if

    -min(S / (L-1-c), (1-S) / c)  <=  β  <=  min(S / c, (1-S) / (L-1-c))

which is |β| <= 2 min(S, 1-S) / (L-1) for blocks of equal size.

Source: Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
ICML 2025, section 3.3. The paper searches 0 < β on a grid of 0.002.
"""

from atp_tune.allocations.budget import Budget

contains = ("uniform",)


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """The admissible interval of `beta`; (0, 0) for a single block."""
    below, above = budget.centre, len(budget.sizes) - 1 - budget.centre
    if below <= 0 or above <= 0:
        return {"beta": (0.0, 0.0)}
    zeros, kept = budget.target, budget.highest - budget.target
    return {"beta": (-min(zeros / above, kept / below), min(zeros / below, kept / above))}


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """Half the upper bound, the middle of the increasing progressions."""
    return [{"beta": bounds(budget)["beta"][1] / 2}]


def sparsities(budget: Budget, beta: float) -> tuple[float, ...]:
    """One sparsity per block; ValueError if one is outside [0, 1]."""
    budget.check(bounds(budget), beta=beta)
    line = (budget.target + beta * (i - budget.centre) for i in range(len(budget.sizes)))
    return tuple(min(1.0, max(0.0, s)) for s in line)
