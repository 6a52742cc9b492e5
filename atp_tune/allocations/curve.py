"""Curve: the progression of ATP with a curvature, denser ends, and other sparsities in attention than in the MLP.

    s_il = S + β i + γ u_i² + φ e_i + δ a_l + ν v_l - mean        i = 0 … L-1, l a linear of block i

S target; β (`beta`) common difference per block, as in `atp`; γ (`gamma`) curvature: how much sparser both ends are
than the middle, u_i = 2i/(L-1) - 1 from -1 to 1; φ (`ends`) how much sparser the first block is, e_0 = 1, and half of
that for the last, e_(L-1) = 1/2; δ (`split`) how much sparser attention is than the MLP, a_l = 1 in attention;
ν (`value`) how much sparser the value projection is, v_l = 1 for it. `mean` is the mean of the terms weighted by size,
which keeps the target. If all parameters are 0 the allocation is uniform; if all but β are 0 it is exactly ATP.

With w = min(S, 1-S), β has the interval of ATP, |γ| and |δ| are at most w/2, and φ and ν are in [-w, 0]. If the sum of
the terms leaves [0, 1], all values are shifted by one number and clipped, such that the mean is S.

Reason: the ATP paper names the progression itself as its limit (Huang et al., ICML 2025, limitations). On SmolLM2-135M
at 60 % a denser first block and denser value projections gain more than β does; numbers in `docs/results.md`.
"""

from itertools import chain

from atp_tune.allocations import atp
from atp_tune.allocations.budget import Budget, Shape, Sparsities, level

contains = ("uniform", "atp")


def bounds(budget: Budget) -> dict[str, tuple[float, float]]:
    """The interval of each parameter; (0, 0) for a term that does not apply to the model."""
    wall = min(budget.target, 1 - budget.target)
    shapes = list(chain.from_iterable(budget.linears))
    bends = wall / 2 if len(budget.sizes) > 2 else 0.0
    splits = wall / 2 if len({shape.attention for shape in shapes}) == 2 else 0.0
    values = wall if any(shape.value for shape in shapes) else 0.0
    return {
        **atp.bounds(budget),
        "gamma": (-bends, bends),
        "ends": (-wall if len(budget.sizes) > 2 else 0.0, 0.0),
        "split": (-splits, splits),
        "value": (-values, 0.0),
    }


def initial_points(budget: Budget) -> list[dict[str, float]]:
    """The initial point of ATP; then half its `beta`, with half the bound of `ends` and the bound of `value`."""
    found = bounds(budget)
    middle = {**dict.fromkeys(found, 0.0), **atp.initial_points(budget)[0]}
    bent = {"beta": middle["beta"] / 2, "ends": found["ends"][0] / 2, "value": found["value"][0]}
    return [middle, {**middle, **bent}]


def sparsities(budget: Budget, beta: float, gamma: float, ends: float, split: float, value: float) -> Sparsities:
    """One sparsity per linear, or per block if `split` and `value` are 0; ValueError outside the bounds."""
    budget.check(bounds(budget), beta=beta, gamma=gamma, ends=ends, split=split, value=value)
    blocks = _blocks(budget, beta, gamma, ends)
    if split == value == 0:
        return level(blocks, budget.sizes, budget.target)

    def within(shape: Shape) -> float:
        return split * shape.attention + value * shape.value

    shapes = list(chain.from_iterable(budget.linears))
    mean = sum(within(shape) * shape.size for shape in shapes) / sum(budget.sizes)
    wanted = [s + within(shape) - mean for s, row in zip(blocks, budget.linears, strict=True) for shape in row]
    flat = iter(level(wanted, [shape.size for shape in shapes], budget.target))
    return tuple(tuple(next(flat) for _ in row) for row in budget.linears)


def _blocks(budget: Budget, beta: float, gamma: float, ends: float) -> list[float]:
    last = len(budget.sizes) - 1
    bend = [gamma * (2 * i / max(1, last) - 1) ** 2 for i in range(last + 1)]
    bend[0] += ends
    bend[-1] += ends / 2
    mean = budget.mean(tuple(bend))
    return [budget.target + beta * (i - budget.centre) + (b - mean) for i, b in enumerate(bend)]
