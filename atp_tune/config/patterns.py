"""Patterns: where zeros may stand, and which sparsities are possible; and the plan of an allocation, rounded to one.

unstructured    anywhere
N:M             N zeros in every M consecutive inputs of a row: one sparsity, N/M
mixed:M         each block has its own N (Table 13 of ATP, ICML 2025): multiples of 1/M
channels        whole MLP channels and heads, see `allocations.channels`
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atp_tune.allocations import ALLOCATIONS, Budget, bits, channels
from atp_tune.allocations.rows import RowOffsets, text_of
from atp_tune.errors import UserError
from atp_tune.plan import Level, Plan

CHANNELS = "channels"
SLACK = 1e-9  # a smaller remainder is a rounding error of M·s


@dataclass(frozen=True)
class Pattern:
    """M inputs in a group (None: no groups) and N zeros in each group (None: any number), or whole channels."""

    group: int | None = None
    zeros: int | None = None
    channels: bool = False

    @property
    def sparsity(self) -> float | None:
        """The sparsity N/M, or None where the pattern allows several."""
        return self.zeros / self.group if self.zeros and self.group else None

    def round(self, sparsities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """Rounds sparsities, one per part, to values that the pattern allows; keeps the mean weighted by size.

        By largest remainder: each is rounded down to a multiple of 1/M. Then each, the largest remainder first and the
        last of equal ones first, is raised by 1/M if that brings the total number of zeros closer to the original.
        """
        if self.group is None:
            return tuple(sparsities)
        if self.sparsity is not None:
            return (self.sparsity,) * len(sparsities)
        exact = [s * self.group for s in sparsities]
        counts = [int(n) for n in exact]
        rests = [n - count for n, count in zip(exact, counts, strict=True)]
        missing = sum(rest * size for rest, size in zip(rests, sizes, strict=True))
        for i in sorted(range(len(rests)), key=lambda i: (round(rests[i], 9), i), reverse=True):
            if rests[i] > SLACK and abs(missing - sizes[i]) < abs(missing):
                counts[i] += 1
                missing -= sizes[i]
        return tuple(count / self.group for count in counts)


def parse(text: str) -> Pattern:
    """Parses the name of a pattern; ValueError if it is invalid."""
    if text == "unstructured":
        return Pattern()
    if text == CHANNELS:
        return Pattern(channels=True)
    match = re.fullmatch(r"(mixed|[1-9]\d{0,3}):([1-9]\d{0,3})", text)
    if match:
        zeros, group = None if match[1] == "mixed" else int(match[1]), int(match[2])
        if group > (zeros or 1):
            return Pattern(group, zeros)
    known = "unstructured, N:M with N < M as in 2:4, or mixed:M as in mixed:8"
    raise ValueError(f'must be {known}, got "{text}"; "channels" removes whole channels')


def make_plan(
    method: str, allocation: str, budget: Budget, parameters: dict[str, float], pattern: Pattern | None = None
) -> Plan:
    """The plan of one allocation at given parameters, rounded to the pattern; ValueError if inadmissible."""
    budget, pattern, module = replace(budget, pruner=method), pattern or Pattern(), ALLOCATIONS[allocation]
    shared = module.sparsities(budget, **parameters)
    by_linear = isinstance(shared[0], tuple)

    # All numbers, one for each block or linear, are rounded together.
    flat = [s for row in shared for s in (row if isinstance(row, tuple) else (row,))]
    sizes = [size for row in budget.linear_sizes for size in row] if by_linear else budget.sizes
    rows: Sequence[Sequence[float]] = ()
    if pattern.channels:
        if by_linear:
            raise UserError(
                f"allocation: {allocation} gives the linears of a block different sparsities, and channels go from all "
                "of them at once; take uniform, atp, curve, owl or alphapruning"
            )
        rows = channels.rounded(flat, budget.channels, budget.target)
    elif budget.widths:
        flat = [*bits.rounded([bits.bits_of(s, budget.widths) for s in flat], sizes, budget.widths)]
    else:
        flat = [*pattern.round(flat, sizes)]

    def level(amount: float, offsets: bytes | None = None, linears: tuple[Level, ...] = ()) -> Level:
        if budget.widths:
            return Level(bits=amount, linears=linears)
        return Level(amount, budget.bits, None if offsets is None else text_of(offsets), linears)

    # A level for each block, with those of its linears if they differ, or if whole channels go.
    levels = map(level, flat)
    if by_linear:
        numbers = iter(flat)
        rows = [[next(numbers) for _ in row] for row in budget.linear_sizes]
    if rows:
        find_offsets = getattr(module, "row_offsets", None)  # no plug-in has it: they are checked
        found: RowOffsets | None = find_offsets and find_offsets(budget, **parameters)
        offsets = found.blocks if found else [[None] * len(row) for row in rows]
        of_linears = [tuple(map(level, *each)) for each in zip(rows, offsets, strict=True)]
        levels = map(level, budget.block_means(rows), [None] * len(rows), of_linears)
    return Plan(method=method, allocation=allocation, parameters=parameters, levels=tuple(levels))
