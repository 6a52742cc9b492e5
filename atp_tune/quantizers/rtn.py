"""RTN: rounds each weight to the nearest value of its group; needs no inputs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.quantizers.grid import Grid, parts_of


@dataclass(frozen=True)
class RTN:
    """Rounds to nearest, in groups of `group_size` inputs of a row (-1: the whole row); computes in float32."""

    group_size: int
    symmetric: bool
    damping: float = 0.01  # of GPTQ
    act_order: bool = False  # of GPTQ

    measures: ClassVar[type[Statistics] | None] = None

    def prepare(self, statistics: Statistics) -> None:
        """Does nothing."""

    def quantize(self, weight: Tensor, bits: int, statistics: Statistics | None, zeros: Tensor | None = None) -> Tensor:
        """A copy of weight [out, in] with at most 2^bits values in each group; 0 stays 0."""
        found = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for columns, size in parts_of(weight.shape[1], self.group_size):
            groups = weight[:, columns].float().reshape(len(weight), -1, size)
            found[:, columns] = Grid.of(groups, bits, self.symmetric).nearest(groups).flatten(1)
        return found.to(weight.dtype)

    def grid(self, weight: Tensor, bits: int) -> Grid:
        """The scale and zero point [out, groups] of each group of weight [out, in]; GPTQ's are the same."""
        found = [
            Grid.of(weight[:, columns].float().reshape(len(weight), -1, size), bits, self.symmetric)
            for columns, size in parts_of(weight.shape[1], self.group_size)
        ]
        scale, zero = torch.cat([one.scale for one in found], 1), torch.cat([one.zero for one in found], 1)
        return Grid(scale.squeeze(-1), zero.squeeze(-1), found[0].top)
