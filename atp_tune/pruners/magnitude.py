"""Magnitude pruning: zeroes the smallest |W_ij| of a linear; needs no inputs."""

from typing import ClassVar

from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.pruners.selection import lowest_in_matrix, zeroed
from atp_tune.utils.frozen import SettingsTable


class Magnitude(SettingsTable):
    """Zeroes the ⌊out·in·s⌋ smallest weights of the matrix (Han et al. 2015), or the ⌊M·s⌋ smallest of each group."""

    group: int | None = None

    measures: ClassVar[type[Statistics] | None] = None

    def prepare(self, statistics: Statistics) -> None:
        """Has no statistics to prepare."""

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]."""
        return zeroed(weight, lowest_in_matrix(weight.float().abs(), sparsity, self.group))
