"""Wanda: scores weights by magnitude times the norm of their inputs.

    score_ij = |W_ij| · ‖X_j‖₂

W weight [out, in], X inputs [tokens, in]. The setting `compare` selects the scores that are compared:

`row`: zeroes the ⌊in·s⌋ lowest scores of each row (output).
`row-variant`: the share of a weight is the cumulative sum of its row's scores in ascending order, up to its own score,
divided by the sum of the row. Zeroes the ⌊out·in·s⌋ smallest shares of the matrix, so rows with few large scores lose
more weights. The authors bisect a threshold α on that share until the matrix is within 0.001 of the model's sparsity;
here each linear meets its own sparsity exactly, the limit of that bisection. Rows of zeros go first, as in theirs.

`matrix`: zeroes the ⌊out·in·s⌋ lowest scores of the matrix, as `prune_granularity = "layer"` of the authors' code for
image classifiers, and as AlphaPruning's. Theirs zeroes all scores up to a threshold, ours exactly so many: of equal
scores the first.

In groups of M inputs all zero the ⌊M·s⌋ lowest scores of each group, since shares increase with scores.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1; the
variant is `use_variant` of their code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners import Measures, Statistics, Unprepared
from atp_tune.pruners.selection import lowest_in_matrix, lowest_in_rows, order_in_rows, zeroed, zeros_in_row
from atp_tune.pruners.settings import WandaSettings
from atp_tune.pruners.statistics import InputNorms
from atp_tune.utils.registry import SettingsTable

# --- Magnitude pruning: zeroes the smallest |W_ij| of a linear; needs no inputs.


class Magnitude(SettingsTable, Unprepared):
    """Zeroes the ⌊out·in·s⌋ smallest weights of the matrix (Han et al. 2015), or the ⌊M·s⌋ smallest of each group."""

    group: int | None = None

    measures: ClassVar[Measures] = None

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]."""
        return zeroed(weight, lowest_in_matrix(weight.float().abs(), sparsity, self.group))


class Wanda(WandaSettings, Unprepared):
    """Zeroes the weights with the lowest scores; kept weights are not changed."""

    group: int | None = None

    measures: ClassVar[Measures] = InputNorms

    @property
    def goes_by_row(self) -> bool:
        """Whether a mask is the lowest scores of each row, or of each group in it."""
        return self.compare == "row" or self.group is not None

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are the `InputNorms` of its inputs."""
        if isinstance(statistics, Ranks) and self.goes_by_row and self.group == statistics.group:
            return zeroed(weight, statistics.lowest(sparsity))
        scores = self.scores(weight, statistics)
        if self.goes_by_row:
            mask = lowest_in_rows(scores, sparsity, self.group)
        else:
            mask = lowest_in_matrix(scores if self.compare == "matrix" else _shares(scores), sparsity)
        return zeroed(weight, mask)

    @staticmethod
    def scores(weight: Tensor, statistics: Statistics | None) -> Tensor:
        """Scores [out, in] of weight [out, in] in float32; statistics are the `InputNorms` of its inputs."""
        assert isinstance(statistics, InputNorms)
        return weight.abs().float().mul_(statistics.norms())


@dataclass(frozen=True)
class WandaOfRows(Unprepared):
    """A `Pruner` of one linear: Wanda with `zeros` [out], the number of zeros of each row."""

    zeros: Tensor

    group: ClassVar[None] = None
    measures: ClassVar[Measures] = InputNorms

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in], whatever the sparsity; statistics are the `InputNorms` of its inputs."""
        if isinstance(statistics, Ranks) and statistics.group is None:
            places = statistics.places
        else:
            places = order_in_rows(Wanda.scores(weight, statistics))
        return zeroed(weight, places < self.zeros.to(places.device)[:, None])


class Ranks(InputNorms):
    """Norms, and the place of each weight in the order in which its row loses weights, as a whole or in groups."""

    places: Tensor
    group: int | None

    @classmethod
    def of(cls, weight: Tensor, statistics: Statistics, group: int | None = None) -> "Ranks":
        """Ranks the scores of weight [out, in]."""
        ranks = cls.restored(statistics.tensors())
        ranks.places, ranks.group = order_in_rows(Wanda.scores(weight, statistics), group), group
        return ranks

    def lowest(self, sparsity: float) -> Tensor:
        """Mask [out, in] of the ⌊in·s⌋ lowest scores of each row, or the ⌊M·s⌋ lowest of each group."""
        return self.places < zeros_in_row(self.places.shape[1], sparsity, self.group)


def _shares(scores: Tensor) -> Tensor:
    """For each score [out, in], the cumulative sum of its row in ascending order, divided by the sum of the row."""
    ordered, order = scores.sort(dim=1, stable=True)
    sums = ordered.cumsum(1)
    return torch.empty_like(scores).scatter_(1, order, torch.where(sums > 0, sums / sums[:, -1:], 0))
