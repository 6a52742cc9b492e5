"""Prunes whole channels of a block: rows of the linears that write them, columns of the linear that reads them.

For each set of channels, as many as the plan says go: those with the lowest scores, measured on the inputs of the
reader while the block runs dense, behind blocks that are pruned already. The reader's other columns are then fitted to
its outputs before (`pruners.channels`). Biases stay; nothing reads what they add to a channel that is gone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from atp_tune.allocations.channels import BlockChannels, ChannelSet
from atp_tune.checkpoints.linears import Linear
from atp_tune.errors import UserError
from atp_tune.pruners import Statistics
from atp_tune.pruners.channels import (
    HessianAndMoments,
    channel_scores,
    lowest_channels,
    magnitude_scores,
    refitted,
)
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.pruners.statistics import InputMoments


def too_sparse(target: float, blocks: Sequence[BlockChannels], settings: ChannelSettings) -> UserError:
    """The error for a sparsity that channels of these blocks cannot make: names the setting that bounds it."""
    highest, single = (min(b.highest for b in found) for found in (blocks, [replace(b, round_to=1) for b in blocks]))
    step, width = settings.round_to, min(block.mlp.count for block in blocks)
    if step >= width or target <= single:
        return UserError(
            f"prune.channels.round_to: of {width} channels of an MLP a multiple of {step} must stay, so that the "
            f"sparsity is {highest:.4g} at most, not {target:g}; lower it"
        )
    more = "" if settings.heads else ", or set prune.channels.heads = true"
    return UserError(
        f"sparsity: {target:g} is more than the {highest:.4g} that channels of this model can make; lower it{more}"
    )


@dataclass(frozen=True)
class ChannelPruner:
    """What goes in each block, and how it is chosen; `by_magnitude`: by the weights alone."""

    blocks: tuple[BlockChannels, ...]
    settings: ChannelSettings
    by_magnitude: bool = False

    @property
    def measures(self) -> type[Statistics] | None:
        """The kind of statistics of a reader's inputs that it needs."""
        if self.settings.refit:
            return HessianAndMoments
        return None if self.by_magnitude else InputMoments

    def readers(self, index: int, linears: list[Linear]) -> list[Linear]:
        """The linears of block `index` that read channels."""
        names = {each.reader for each in self.blocks[index].sets}
        return [linear for linear in linears if linear.name in names]

    def prune(
        self,
        index: int,
        linears: list[Linear],
        weights: dict[str, Tensor],
        shares: tuple[float, ...],
        statistics: Mapping[str, Statistics],
    ) -> "PrunedChannels":
        """Block `index` with the share of channels that each linear is to lose; the dense weights are not changed."""
        share = {linear.name: s for linear, s in zip(linears, shares, strict=True)}
        found = PrunedChannels(dict(weights), {linear.name: 0 for linear in linears})
        by_name = {linear.name: linear for linear in linears}
        for each in self.blocks[index].sets:
            if count := round(each.count * share[each.reader]):
                gone = lowest_channels(self._scores(each, by_name, weights, statistics.get(each.reader)), count)
                self._remove(each, gone, by_name, found, statistics.get(each.reader))
        return found

    def _scores(
        self, each: ChannelSet, linears: dict[str, Linear], weights: dict[str, Tensor], measured: Statistics | None
    ) -> Tensor:
        matrices = {name: linears[name].matrix(weights[linears[name].key]) for name in each.linears}
        if self.by_magnitude:
            parts = [(matrices[name], rows) for name, rows in each.writers]
            return magnitude_scores([*parts, (matrices[each.reader].T, each.columns)])
        moments = measured.moments if isinstance(measured, HessianAndMoments) else measured
        assert isinstance(moments, InputMoments)
        energies = moments.variances() if self.settings.score == "fluctuation" else moments.norms().square()
        return channel_scores(matrices[each.reader], energies, each.columns)

    def _remove(
        self,
        each: ChannelSet,
        gone: Tensor,
        linears: dict[str, Linear],
        found: "PrunedChannels",
        measured: Statistics | None,
    ) -> None:
        count = int(gone.sum())
        found.channels[each.reader] = gone
        for name, rows in each.writers:
            matrix = found.copied(linears[name])
            matrix[gone.repeat_interleave(rows)] = 0
            found.gone[name] = count * rows * linears[name].in_features
        reader, columns = linears[each.reader], gone.repeat_interleave(each.columns)
        matrix = found.copied(reader)
        if isinstance(measured, HessianAndMoments):
            matrix.copy_(refitted(matrix, columns, measured.hessian.matrix(), self.settings.damping))
        else:
            matrix[:, columns] = 0
        found.gone[each.reader] = count * each.columns * reader.out_features


@dataclass
class PrunedChannels:
    """The tensors of a block, and the number of weights of each linear that went with its channels."""

    weights: dict[str, Tensor]
    gone: dict[str, int]
    channels: dict[str, Tensor] = field(default_factory=dict)  # masks of those that are gone, by their reader
    experts_without_tokens: list[str] = field(default_factory=list)

    def copied(self, linear: Linear) -> Tensor:
        """A copy [out, in] of a linear's weight that may be written to, in the place of the dense one."""
        own = self.weights[linear.key].clone(memory_format=torch.contiguous_format)
        self.weights[linear.key] = own
        return linear.matrix(own)

    def zeros(self) -> dict[str, int]:
        """The numbers, which do not count weights that were zero in the dense model."""
        return self.gone
