"""Wanda: weights matter as much as the inputs they meet.

    score_ij = |W_ij| · ‖X_j‖₂

W weight [out, in], X inputs [tokens, in]. Which scores are compared with each other is a setting:

`row`: the ⌊in·s⌋ lowest scores of each row (output) go.
`row-variant`: with the scores of a row in ascending order, a weight's share is the sum of the scores up to its own,
over the row's sum. The ⌊out·in·s⌋ smallest shares of the matrix go, so rows with few large scores lose more weights.
The authors bisect a threshold α on that share until the matrix is within 0.001 of one sparsity, the model's; here each
linear meets its own, exactly, which is where that bisection leads. A row without any score goes first, as theirs does.

In groups of M inputs both are the same, the ⌊M·s⌋ lowest of each group: shares rise with the scores of a row.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1; the
variant is `use_variant` of their code.
"""

from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.pruners.selection import lowest_in_matrix, lowest_in_rows, ranks, zeroed
from atp_tune.pruners.settings import WandaSettings
from atp_tune.pruners.statistics import InputNorms


class Wanda(WandaSettings):
    """Zeroes the lowest scores of each row; weights that stay are not changed."""

    group: int | None = None

    measures: ClassVar[type[Statistics] | None] = InputNorms

    def prepare(self, statistics: Statistics) -> None:
        """Nothing."""

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `InputNorms`."""
        if isinstance(statistics, Ranks) and self.compare == "row" and self.group is None:
            return zeroed(weight, statistics.lowest(sparsity))
        assert statistics is not None
        scores = self.scores(weight, statistics)
        if self.compare == "row" or self.group is not None:
            mask = lowest_in_rows(scores, sparsity, self.group)
        else:
            mask = lowest_in_matrix(_shares(scores), sparsity)
        return zeroed(weight, mask)

    @staticmethod
    def scores(weight: Tensor, statistics: Statistics) -> Tensor:
        """The scores [out, in] of weight [out, in], in float32; statistics are its `InputNorms`."""
        assert isinstance(statistics, InputNorms)
        return weight.abs().float().mul_(statistics.norms())


class Ranks(InputNorms):
    """The norms, and by them each weight's place in its row, which is all that comparing rows asks for."""

    places: Tensor

    @classmethod
    def of(cls, weight: Tensor, statistics: Statistics) -> "Ranks":
        """Of weight [out, in], by its scores."""
        found = cls.restored(statistics.tensors())
        found.places = ranks(Wanda.scores(weight, statistics))
        return found

    def lowest(self, sparsity: float) -> Tensor:
        """Mask [out, in] of the ⌊in·s⌋ lowest scores of each row."""
        return self.places < int(self.places.shape[1] * sparsity)


def _shares(scores: Tensor) -> Tensor:
    """For each score [out, in] the sum of its row up to it, in ascending order, as a share of the row's sum."""
    ordered, order = scores.sort(dim=1, stable=True)
    sums = ordered.cumsum(1)
    shares = torch.where(sums > 0, sums / sums[:, -1:], 0)
    return torch.empty_like(scores).scatter_(1, order, shares)
