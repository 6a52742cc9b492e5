"""A quantizer as the pass over the blocks uses it, with the pruner before it, if there is one."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.refinement import parts_of, with_hessian
from atp_tune.quantizers import Quantizer
from atp_tune.quantizers.grid import Grid
from atp_tune.quantizers.rtn import RTN


@dataclass(frozen=True)
class Quantizing:
    """A `Pruner` that rounds weights to so many `bits`, after its own `pruner` has zeroed some: those stay zero."""

    quantizer: Quantizer
    pruner: Pruner | None = None
    bits: int = 0
    group: int | None = None

    @property
    def measures(self) -> type[Statistics] | None:
        """The kind of statistics that both need."""
        if self.pruner is None or self.quantizer.measures is None:
            return self.quantizer.measures if self.pruner is None else self.pruner.measures
        return with_hessian(self.pruner.measures)

    @property
    def prepares(self) -> list[Any]:
        """What prepares statistics, so that they are the same for all bits."""
        return [self.quantizer, getattr(self.pruner, "prepares", self.pruner)]

    def at(self, bits: int) -> "Quantizing":
        """The same with so many bits."""
        return replace(self, bits=bits)

    def unmeasured(self, pruner: Pruner | None) -> "Quantizing":
        """For a linear without inputs: RTN on the same groups, after this pruner."""
        assert isinstance(self.quantizer, RTN)
        return replace(self, quantizer=RTN(self.quantizer.group_size, self.quantizer.symmetric), pruner=pruner)

    def prepare(self, statistics: Statistics) -> None:
        """Prepares the statistics of both."""
        own, hessian = self._parts(statistics)
        if self.pruner is not None and own is not None:
            self.pruner.prepare(own)
        if hessian is not None:
            self.quantizer.prepare(hessian)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A rounded copy of weight [out, in], pruned to a sparsity in [0, 1] before if there is a pruner."""
        return self.rounded(self.sparse(weight, sparsity, statistics), statistics)

    def sparse(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """The pruned copy that is rounded next; the weight itself without a pruner."""
        return weight if self.pruner is None else self.pruner.prune(weight, sparsity, self._parts(statistics)[0])

    def rounded(self, sparse: Tensor, statistics: Statistics | None) -> Tensor:
        """A rounded copy of a weight that is pruned already, if there is a pruner; its zeros stay."""
        zeros = None if self.pruner is None else sparse == 0
        return self.quantizer.quantize(sparse, self.bits, self._parts(statistics)[1], zeros)

    def grid(self, sparse: Tensor) -> Grid:
        """The grid on which `rounded` puts it."""
        return self.quantizer.grid(sparse, self.bits)

    def _parts(self, statistics: Statistics | None) -> tuple[Statistics | None, Statistics | None]:
        """The statistics of the pruner, and of the quantizer."""
        if self.pruner is None or statistics is None:
            return None, statistics
        if self.quantizer.measures is None:
            return statistics, None
        own, hessian = parts_of(statistics)
        return (statistics if self.measures is self.pruner.measures else own), hessian
