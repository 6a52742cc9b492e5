"""Patterns: where zeros may stand, and which sparsities are possible.

unstructured    anywhere
N:M             N zeros in every M consecutive inputs of a row: one sparsity, N/M
mixed:M         each block has its own N (Table 13 of ATP, ICML 2025): multiples of 1/M
channels        whole MLP channels and heads, see `allocations.channels`
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
