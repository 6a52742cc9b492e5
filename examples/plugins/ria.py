"""RIA: scores weights by their share of their row and column, times the norm of their inputs to a power.

    score_ij = (|W_ij| / Σ_k |W_ik| + |W_ij| / Σ_k |W_kj|) ‖X_j‖₂^a

W weight [out, in], X inputs [tokens, in], a the setting `power`. Zeroes the ⌊in·s⌋ lowest scores of each row, as Wanda
does, or the ⌊M·s⌋ lowest of each group of M inputs. A share of a row or column of zeros is 0.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
equation 5, without its permutation of columns.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from atp_tune import SettingsTable, pruner
from atp_tune.pruners.selection import lowest_in_rows, zeroed
from atp_tune.pruners.statistics import InputNorms


@pruner("ria")
class RIA(SettingsTable):
    """Zeroes the weights with the lowest relative importance in each row; kept weights are not changed."""

    power: float = Field(0.5, ge=0, description="exponent of the norm of an input")
    group: int | None = None  # the pattern of the study

    measures: ClassVar = InputNorms

    def prune(self, weight: Tensor, sparsity: float, statistics: InputNorms) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]."""
        size = weight.abs().float()
        shares = [(size / size.sum(axis, keepdim=True)).nan_to_num(0.0) for axis in (1, 0)]
        scores = (shares[0] + shares[1]) * statistics.norms() ** self.power
        return zeroed(weight, lowest_in_rows(scores, sparsity, self.group))
