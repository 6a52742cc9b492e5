"""Wanda: weights matter as much as the inputs they meet.

    score_ij = |W_ij| · ‖X_j‖₂

W weight [out, in], X inputs [tokens, in]. The ⌊in·s⌋ lowest scores of each row (output) go.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atp_tune.pruners.selection import lowest
from atp_tune.pruners.statistics import InputNorms, Statistics


@dataclass(frozen=True)
class Wanda:
    """Zeroes the lowest scores of each row; weights that stay are not changed."""

    measures: ClassVar[type[Statistics] | None] = InputNorms

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `InputNorms`."""
        assert isinstance(statistics, InputNorms)
        scores = weight.float().abs() * statistics.norms()
        return weight.masked_fill(lowest(scores, int(weight.shape[1] * sparsity)), 0)
