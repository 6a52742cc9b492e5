"""Bits of blocks or linears: what an allocation gives, rounded to the numbers of bits that they may have.

    b_i = b_max - s_i (b_max - b_min)        s_i the allocation's share of block i, in [0, 1]

An allocation that shares out sparsity shares out bits by the same numbers: where it leaves a block denser, the block
gets more bits. s = 0 are the most bits that a block may have, s = 1 the fewest.

A matrix of b bits takes more than b bits a weight: each group has a scale of 16 bits and, unless it is symmetric, a
zero point of b bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

SCALE = 16  # bits of a group's scale
SLACK = 1e-9  # a smaller remainder is a rounding error


@dataclass(frozen=True)
class Size:
    """The size that the linears of all blocks may take together, masks and scales included: `most` bits.

    `stored`: bits of a matrix, from its rows, columns, bits of a weight, and number of zeros.
    """

    most: float
    stored: Callable[[int, int, int, int], int]


def share_at(target: float, widths: Sequence[int]) -> float:
    """What is shared out at a target: the sparsity, or of bits, which are negative, the share s between `widths`."""
    if target >= 0:
        return target
    low, high = min(widths), max(widths)
    return (high + target) / ((high - low) or 1)


def bits_at(share: float, widths: Sequence[int]) -> float:
    """The number of bits, not rounded, at a share s in [0, 1]."""
    return max(widths) - share * (max(widths) - min(widths))


def rounded(wanted: Sequence[float], sizes: Sequence[int], widths: Sequence[int]) -> tuple[int, ...]:
    """Rounds bits, one number per block, to `widths`; the mean weighted by size is at most that of `wanted`.

    By largest remainder: each is rounded down. Then each, the largest remainder first, is raised to the next width if
    the mean stays within. Of equal remainders the larger number is raised first, so that plans of β and -β are mirror
    images; equal numbers in an order that spreads them evenly over the blocks, so that a uniform 3.5 alternates between
    4 and 3 bits.
    """
    steps = sorted(widths)
    below = [max((w for w in steps if w <= b + SLACK), default=steps[0]) for b in wanted]
    above = [next((w for w in steps if w > low), low) for low in below]
    missing = sum((b - low) * size for b, low, size in zip(wanted, below, sizes, strict=True))
    rests = [(b - low) / ((high - low) or 1) for b, low, high in zip(wanted, below, above, strict=True)]
    spread = {i: rank for rank, i in enumerate(evenly(len(below)))}
    for i in sorted(range(len(below)), key=lambda i: (-round(rests[i], 9), -round(wanted[i], 9), spread[i])):
        jump = (above[i] - below[i]) * sizes[i]
        if rests[i] > SLACK and jump <= missing + SLACK * sum(sizes):
            below[i] = above[i]
            missing -= jump
    return tuple(below)


def raise_largest(counts: list[int], missing: float, shares: Sequence[float], jumps: Sequence[int]) -> None:
    """Raises counts by one, the largest share first and the last of equal ones, if it brings `missing` closer to 0."""
    for i in sorted(range(len(counts)), key=lambda i: (round(shares[i], 9), i), reverse=True):
        if shares[i] > SLACK and abs(missing - jumps[i]) < abs(missing):
            counts[i] += 1
            missing -= jumps[i]


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], most: float) -> list[int]:
    """The choice for each linear that costs least in all, their sizes together at most `most`.

    `costs`, `sizes`: of each linear, one for each of its choices, whose sizes ascend, or are all equal. All begin with
    the smallest; steps to larger ones are taken in the order of what they save for their size, the most first. So each
    plan on the way is the cheapest of all that are not larger than it (Everett, "Generalized Lagrange multiplier
    method", Operations Research 1963). The steps of a linear are those of its lower convex hull. One that exceeds the
    size ends its linear; others go on. Of equal steps that of the first linear comes first.
    """
    plan, left = [0] * len(costs), most - sum(row[0] for row in sizes) + SLACK * sum(row[-1] for row in sizes)
    steps = [
        (-saved / (row[above] - row[below]), linear, below, above)
        for linear, (own, row) in enumerate(zip(costs, sizes, strict=True))
        for below, above, saved in _falls(own, row)
    ]
    for _, linear, below, above in sorted(steps):
        needed = sizes[linear][above] - sizes[linear][below]
        if plan[linear] == below and needed <= left:
            plan[linear], left = above, left - needed
    return plan


def _falls(costs: Sequence[float], sizes: Sequence[float]) -> list[tuple[int, int, float]]:
    """The steps down the lower convex hull of costs over sizes: places of both ends, and what the step saves."""
    steps, here = list[tuple[int, int, float]](), 0
    while sizes[here] < sizes[-1]:  # all choices of a matrix of zeros may have one size
        slopes = {to: (costs[here] - costs[to]) / (sizes[to] - sizes[here]) for to in range(here + 1, len(costs))}
        best = max(slopes, key=lambda to: (slopes[to], to))
        if slopes[best] <= 0:
            break
        steps.append((here, best, costs[here] - costs[best]))
        here = best
    return steps


def evenly(count: int) -> list[int]:
    """The numbers below `count`, so ordered that the first few, however many, are spread evenly (van der Corput)."""
    digits = max(1, (count - 1).bit_length())
    reversed_ = (int(f"{i:0{digits}b}"[::-1], 2) for i in range(2**digits))
    return [i for i in reversed_ if i < count]


def stored_bits(rows: int, columns: int, bits: int, group_size: int, zero_point: int, zeros: int = 0) -> int:
    """Bits of a quantized matrix with the scales and zero points of its groups; a group size of -1 is a whole row.

    `zero_point`: bits of one. With `zeros` as values or as a mask of one bit a weight and the values of the others,
    whichever is less.
    """
    groups = 1 if group_size == -1 else ceil(columns / group_size)
    size = rows * columns
    return min(size * bits, size + (size - zeros) * bits) + rows * groups * (SCALE + zero_point)
