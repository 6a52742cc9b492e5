"""Quantizers round the weights of one linear to few values; what comes out are the values, as floats.

A quantizer is a class registered in `QUANTIZERS`, made from `group_size`, `symmetric`, `damping` and `act_order`. It
takes and returns tensors, and knows no model, study or trial. Importing this package loads no torch.
"""

from atp_tune.pruners import Quantizer
from atp_tune.utils.registry import Registry

QUANTIZERS = Registry[type[Quantizer]](
    "quantizer", {"rtn": "atp_tune.quantizers.rounding:RTN", "gptq": "atp_tune.quantizers.rounding:GPTQ"}
)


def make_quantizer(name: str, group_size: int, symmetric: bool, damping: float, act_order: bool = False) -> Quantizer:
    """Makes a quantizer by name; KeyError if the name is not registered."""
    return QUANTIZERS[name](group_size, symmetric, damping, act_order)  # type: ignore[call-arg]
