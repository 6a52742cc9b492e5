"""Quantizers round the weights of one linear to few values; what comes out are the values, as floats.

A quantizer is a class registered in `QUANTIZERS`, made from `group_size`, `symmetric`, `damping` and `act_order`. It
takes and returns tensors, and knows no model, study or trial. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Protocol

from atp_tune.pruners import Statistics
from atp_tune.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from atp_tune.quantizers.rounding import Grid


class Quantizer(Protocol):
    """The interface of a quantizer."""

    @property
    def measures(self) -> type[Statistics] | None:
        """The kind of statistics of a linear's inputs that it needs."""

    def prepare(self, statistics: Statistics) -> None:
        """Computes what depends on the statistics only, before they are saved."""

    def quantize(
        self, weight: "Tensor", bits: int, statistics: Statistics | None, zeros: "Tensor | None" = None
    ) -> "Tensor":
        """A copy of weight [out, in] with at most 2^bits values in each group, in the dtype of the weight.

        `zeros`: mask [out, in] of weights that are 0 and stay 0.
        """

    def grid(self, weight: "Tensor", bits: int) -> "Grid":
        """The scale and zero point [out, groups] of each group, as `quantize` takes them for this weight."""


QUANTIZERS = Registry[type[Quantizer]](
    "quantizer", {"rtn": "atp_tune.quantizers.rounding:RTN", "gptq": "atp_tune.quantizers.rounding:GPTQ"}
)


def make_quantizer(name: str, group_size: int, symmetric: bool, damping: float, act_order: bool = False) -> Quantizer:
    """Makes a quantizer by name; KeyError if the name is not registered."""
    return QUANTIZERS[name](group_size, symmetric, damping, act_order)  # type: ignore[call-arg]
