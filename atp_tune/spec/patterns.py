"""Patterns: where zeros may stand, and which sparsities that leaves.

unstructured    anywhere
N:M             N zeros in every M consecutive inputs of a row: one sparsity, N/M
mixed:M         every block has its own N of M (Table 13 of ATP, ICML 2025): multiples of 1/M
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SLACK = 1e-9  # a smaller remainder is but the rounding of a product M·s


@dataclass(frozen=True)
class Pattern:
    """Group of M consecutive inputs, None where there are no groups; N zeros in each, None where any number may be."""

    group: int | None = None
    zeros: int | None = None

    @property
    def sparsity(self) -> float | None:
        """The only sparsity, if there is but one."""
        return self.zeros / self.group if self.zeros and self.group else None

    def round(self, sparsities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """The nearest sparsities that the pattern can make, with their weighted mean as near as can be to the given.

        Largest remainders: all go down to a multiple of 1/M, and then, the largest remainder first and of equals the
        last, each goes up by 1/M that brings the sum of zeros nearer to what it was.
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
    """The pattern of that name; ValueError for anything else."""
    if text == "unstructured":
        return Pattern()
    match = re.fullmatch(r"(mixed|[1-9]\d{0,3}):([1-9]\d{0,3})", text)
    if match:
        zeros, group = None if match[1] == "mixed" else int(match[1]), int(match[2])
        if group > (zeros or 1):
            return Pattern(group, zeros)
    raise ValueError(f'must be unstructured, N:M with N < M as in 2:4, or mixed:M as in mixed:8, got "{text}"')
