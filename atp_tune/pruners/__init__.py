"""Pruners: which weights of one linear go, given a sparsity and statistics of its inputs.

A pruner is one class, registered in `PRUNERS`; its settings, if it has any, are its parent class, registered in
`SETTINGS`. It takes and returns tensors, and knows no model, study or trial. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from atp_tune.frozen import SettingsTable
from atp_tune.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Statistics(Protocol):
    """Gathers the inputs X [tokens, in] of a linear; the constructor takes the number of inputs and the device."""

    def __init__(self, inputs: int, device: "torch.device") -> None: ...

    def add(self, x: "Tensor") -> None:
        """Takes in inputs [..., in] of any float dtype."""

    def tensors(self) -> "dict[str, Tensor]":
        """What is to be kept of it, where it is kept."""

    @classmethod
    def restored(cls, tensors: "dict[str, Tensor]") -> Self:
        """What was kept, to be asked and no more added to."""

    @staticmethod
    def bytes_for(inputs: int) -> int:
        """Bytes of what is kept of a linear with so many inputs, at most."""


class Pruner(Protocol):
    """What every pruner offers; its fields are its settings.

    All have the field `group`, None or M: then ⌊M·s⌋ weights of every M consecutive inputs of a row go.
    """

    measures: ClassVar[type[Statistics] | None]

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics alone, so that it is kept with them."""

    def prune(self, weight: "Tensor", sparsity: float, statistics: Statistics | None) -> "Tensor":
        """Pruned copy of weight [out, in] at a sparsity in [0, 1], in the weight's dtype."""


PRUNERS = Registry[type[Pruner]](
    "pruner",
    {
        "magnitude": "atp_tune.pruners.magnitude:Magnitude",
        "wanda": "atp_tune.pruners.wanda:Wanda",
        "sparsegpt": "atp_tune.pruners.sparsegpt:SparseGPT",
        "dsnot": "atp_tune.pruners.dsnot:DSnoT",
        "alps": "atp_tune.pruners.alps:ALPS",
    },
)
SETTINGS = Registry[type[SettingsTable]](
    "pruner with settings",
    {
        "wanda": "atp_tune.pruners.settings:WandaSettings",
        "sparsegpt": "atp_tune.pruners.settings:SparseGPTSettings",
        "dsnot": "atp_tune.pruners.settings:DSnoTSettings",
        "alps": "atp_tune.pruners.settings:ALPSSettings",
    },
)


def make_pruner(name: str, settings: dict[str, Any] | None = None) -> Pruner:
    """The pruner of that name with its settings; KeyError for a name that is not registered."""
    return PRUNERS[name](**(settings or {}))
