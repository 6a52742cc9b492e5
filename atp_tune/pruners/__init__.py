"""Pruners: which weights of one linear go, given a sparsity and statistics of its inputs.

A pruner is one file with a frozen dataclass and one row of `PRUNERS`. It takes and returns tensors, and knows no
model, study or trial.
"""

from typing import Any, ClassVar, Protocol

from torch import Tensor

from atp_tune.pruners.alps import ALPS
from atp_tune.pruners.dsnot import DSnoT
from atp_tune.pruners.magnitude import Magnitude
from atp_tune.pruners.sparsegpt import SparseGPT
from atp_tune.pruners.statistics import Statistics
from atp_tune.pruners.wanda import Wanda

__all__ = ["PRUNERS", "Pruner", "Statistics", "make_pruner"]


class Pruner(Protocol):
    """What every pruner offers; its fields are its settings.

    All have the field `group`, None or M: then ⌊M·s⌋ weights of every M consecutive inputs of a row go.
    """

    measures: ClassVar[type[Statistics] | None]

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics alone, so that it is kept with them."""

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1], in the weight's dtype."""


PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "dsnot": DSnoT,
    "alps": ALPS,
}


def make_pruner(name: str, settings: dict[str, Any] | None = None) -> Pruner:
    """The pruner of that name with its settings; KeyError for a name that is not in the table."""
    return PRUNERS[name](**(settings or {}))
