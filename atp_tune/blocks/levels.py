"""Levels of sparsity: what a pruner makes of a linear at each of them, for the gradients of prices.

Level k of n zeroes the share k / n of a linear's weights. Masks by place have a level for each weight of a row. What a
pruner makes that changes kept weights too is made anew for each level, so that it has few, and they are kept.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from atp_tune.blocks.linear_pruner import unmeasured
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.checkpoints.linears import Linear
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import zeroed

BAND = 0.06  # a price is measured between the sparsities so far below and above that of the linear
GRID = 32  # levels of a pruner's own weights

Places = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and matrix [out, in] of its weights


class Levels(Protocol):
    """The levels of the linears of a dense checkpoint."""

    def number(self, columns: int) -> int:
        """The level of sparsity 1, for a linear of so many inputs."""

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The level of a sparsity, between the two that a price is measured between: below, at, above."""

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """The weight [out, in] of a linear of block `index`, from the dense one, at a level."""


class ByPlaces:
    """Masks of the lowest scores of each row; `places`: places [out, in] of a linear's scores in their rows."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def number(self, columns: int) -> int:
        """One for each weight of a row."""
        return columns

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """Weights whose place is less than `BAND` of the inputs away from the number of zeros are between them."""
        zeros, reach = int(columns * sparsity), max(1, int(BAND * columns))
        return max(zeros - reach + 1, 0), zeros, min(zeros + reach, columns)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """The weights of a lower place are zero."""
        return zeroed(weight, self._places(index, linear, weight) < level)


class ByPruner:
    """What a pruner makes of the dense weights; `statistics`: of a block's inputs in the dense model, prepared.

    In a pattern a level is one more zero in each group. The weights of levels are kept in host memory, up to `room`
    bytes; those that were asked for last stay.
    """

    def __init__(self, pruner: Pruner, statistics: Callable[[int], BlockStatistics], room: int) -> None:
        self._pruner = pruner
        self._statistics = statistics
        self._group: int | None = getattr(pruner, "group", None)
        self._free = room
        self._kept: dict[tuple[int, str, int], Tensor] = {}  # the one that was asked for last is the last

    def number(self, columns: int) -> int:
        """As many as a group has weights, or `GRID`."""
        return self._group or GRID

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The nearest level, and those `BAND` away from it."""
        number = self.number(columns)
        level, reach = round(number * sparsity), max(1, round(BAND * number))
        return max(level - reach, 0), level, min(level + reach, number)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """By the pruner; an expert without tokens by magnitude."""
        key = index, linear.name, level
        found = self._kept.pop(key, None)
        if found is None:
            known = self._statistics(index).get(linear.name) if self._pruner.measures else None
            lacks = self._pruner.measures is not None and known is None
            pruner = unmeasured(self._pruner) if lacks else self._pruner
            found = pruner.prune(weight, level / self.number(weight.shape[1]), known).contiguous()
            self._free -= found.nbytes
        self._kept[key] = found.cpu()
        while self._free < 0:
            self._free += self._kept.pop(next(iter(self._kept))).nbytes
        return found.to(weight.device)
