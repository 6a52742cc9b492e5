"""Channels of a block, as structured pruning removes them, and how many go at a sparsity.

A channel is what one linear (the reader) reads and others (the writers) write: rows of the writers and columns of the
reader go together. In an MLP it is one inner channel; in attention the group of query heads of one key/value head.

    s T = h a + k m        T weights of all linears of the block, s its sparsity
                           h heads that go, of a weights each; k MLP channels that go, of m weights each

Heads go first, h = ⌊heads · s⌋ if they may go at all; MLP channels make up the rest. The number of MLP channels that
stay is a multiple of `round_to`, or all of them. Over the blocks the largest remainders keep the weighted mean of s.

Source: groups that must be removed together are those of LLM-Pruner (Ma et al., NeurIPS 2023, section 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from atp_tune.allocations.bits import SLACK, raise_largest
from atp_tune.allocations.budget import LinearSparsities, level


@dataclass(frozen=True)
class ChannelSet:
    """Channels between linears of a block: rows of `writers` per channel, `columns` of the reader per channel.

    `weights`: of one channel, in all these linears.
    """

    count: int
    writers: tuple[tuple[str, int], ...]
    reader: str
    columns: int
    weights: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linears that lose rows or columns."""
        return (*(name for name, _ in self.writers), self.reader)


@dataclass(frozen=True)
class BlockChannels:
    """The channels of one block; `heads` is None where heads stay. `linears`: all of the block, with their sizes."""

    mlp: ChannelSet
    heads: ChannelSet | None
    linears: tuple[tuple[str, int], ...]
    round_to: int

    @property
    def sets(self) -> tuple[ChannelSet, ...]:
        """Heads, if they may go, and MLP channels, in the order in which a block runs them."""
        return (self.mlp,) if self.heads is None else (self.heads, self.mlp)

    @cached_property
    def size(self) -> int:
        """Number of weights in all linears."""
        return sum(size for _, size in self.linears)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The numbers of MLP channels that may stay, from all of them down."""
        count, step = self.mlp.count, self.round_to
        return (count, *range((count - 1) // step * step, 0, -step))

    @cached_property
    def highest(self) -> float:
        """The highest sparsity up to which every sparsity can be met, but for rounding."""
        most = (self.mlp.count - self.kept[-1]) * self.mlp.weights
        if self.heads is None:
            return most / self.size
        attention = self.heads.count * self.heads.weights
        return max(0.0, (most - self.heads.weights) / (self.size - attention))

    def shares(self, heads: int, mlp: int) -> tuple[float, ...]:
        """The share of each linear that goes, with these numbers of heads and MLP channels."""
        shares = dict.fromkeys(self.mlp.linears, mlp / self.mlp.count)
        if self.heads is not None:
            shares |= dict.fromkeys(self.heads.linears, heads / self.heads.count)
        return tuple(shares.get(name, 0.0) for name, _ in self.linears)


def check_whole(rows: Sequence[Sequence[float]], blocks: Sequence[BlockChannels]) -> None:
    """ValueError for shares of linears that are not whole channels, of all linears of a set alike, or are missing."""
    for index, (row, block) in enumerate(zip(rows, blocks, strict=False)):
        if len(row) != len(block.linears):
            raise ValueError(f"levels: block {index}: needs the shares of its {len(block.linears)} linears")
        given = {name: share for (name, _), share in zip(block.linears, row, strict=True)}
        whole = dict.fromkeys(given, 0.0)
        for each in block.sets:
            count = min(round(each.count * given[each.reader]), each.count - 1)
            whole |= dict.fromkeys(each.linears, count / each.count)
        for name, share in given.items():
            if abs(share - whole[name]) > SLACK:
                raise ValueError(f"levels: block {index}: {share:g} of {name}, by whole channels {whole[name]:g}")


def rounded(sparsities: Sequence[float], blocks: Sequence[BlockChannels], target: float) -> LinearSparsities:
    """The shares of all linears of all blocks, for one sparsity per block; the mean weighted by size is kept.

    Sparsities above the highest that channels allow are lowered to it, and all are shifted to keep the target. Each
    number of channels is rounded down; then each, the largest remainder first and the last of equal ones first, goes up
    one step if that brings the number of weights that go closer to what was asked.
    """
    wanted = level(sparsities, [block.size for block in blocks], target, 0.0, min(block.highest for block in blocks))
    heads = [
        min(int(block.heads.count * s + SLACK), block.heads.count - 1) if block.heads else 0
        for block, s in zip(blocks, wanted, strict=True)
    ]
    steps, rests, jumps = list[int](), list[float](), list[int]()
    for block, s, number in zip(blocks, wanted, heads, strict=True):
        left = s * block.size - (number * block.heads.weights if block.heads else 0)
        exact = min(max(left / block.mlp.weights, 0.0), block.mlp.count - block.kept[-1])
        step = max(i for i, kept in enumerate(block.kept) if block.mlp.count - kept <= exact + SLACK)
        last = step + 1 == len(block.kept)
        jumps.append(0 if last else (block.kept[step] - block.kept[step + 1]) * block.mlp.weights)
        rests.append(max(0.0, left - (block.mlp.count - block.kept[step]) * block.mlp.weights))
        steps.append(step)
    raise_largest(
        steps, sum(rests), [rest / jump if jump else 0.0 for rest, jump in zip(rests, jumps, strict=True)], jumps
    )
    return tuple(
        block.shares(number, block.mlp.count - block.kept[step])
        for block, number, step in zip(blocks, heads, steps, strict=True)
    )
