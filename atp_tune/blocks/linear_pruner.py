"""The pruner of a single linear, where it is another than that of its block."""

from dataclasses import replace

from torch import Tensor

from atp_tune.pruners import Pruner, make_pruner
from atp_tune.pruners.refinement import Refined
from atp_tune.pruners.wanda import Wanda, WandaOfRows
from atp_tune.quantizers.quantizing import Quantizing


def of_rows(pruner: Pruner, zeros: Tensor) -> Pruner:
    """Wanda, by itself or with what follows it, with so many zeros [out] in the rows of one linear."""
    if isinstance(pruner, Quantizing):
        assert pruner.pruner is not None
        return replace(pruner, pruner=of_rows(pruner.pruner, zeros))
    if isinstance(pruner, Refined):
        return pruner.after(lambda own: of_rows(own, zeros))
    assert isinstance(pruner, Wanda)
    return WandaOfRows(zeros)


def unmeasured(pruner: Pruner) -> Pruner:
    """The pruner for a linear without inputs: magnitude, with the same group; RTN, where weights are rounded."""
    if isinstance(pruner, Quantizing):
        return pruner.unmeasured(None if pruner.pruner is None else unmeasured(pruner.pruner))
    group = getattr(pruner, "group", None)
    return make_pruner("magnitude", None if group is None else {"group": group})
