"""Finds the channels of a block by running it: which rows of which linears feed which columns of another, and no more.

A block runs on a small batch again and again, with noise added to some outputs of some linears. What changes of the
other linears' inputs, bit for bit, is what depends on them:

    reader      of a linear: the first linear whose input changes with its outputs
    channels    the most parts, equal in size, such that the first rows of each writer change the reader's first part
                alone; verified with random halves of all channels
    nothing     else may depend on the writers: with the reader's output held fast, the block's output stays as it is

No names are needed, so all families are served alike. Channels of one column that each writer has one row of are those
of an MLP; others are heads: in grouped attention a part of q, k, v and o that belongs to one key/value head.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from atp_tune.allocations.channels import BlockChannels, ChannelSet
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.devices import Tensors
from atp_tune.errors import UserError
from atp_tune.pruners import Measures, Statistics
from atp_tune.pruners.selection import HessianAndMoments, channel_scores, lowest, refitted
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.pruners.statistics import InputMoments

Changes = dict[str, Callable[[Tensor], Tensor]]  # of the outputs of linears, by their names

ITEMS, POSITIONS = 2, 6  # of the batch
HALVES = 2  # random halves of the channels, each with its complement
UNSUITED = 'prune.pattern: "channels" cannot prune {kind}: {reason}'


@torch.inference_mode()
def find_channels(replay: Replay, settings: ChannelSettings) -> tuple[BlockChannels, ...]:
    """The channels of each block; UserError in one line if a block has none that can go."""
    _, batch, _ = replay.inputs.examples(replay.checkpoint, ITEMS, POSITIONS)
    hidden, blocks = replay.embed(batch).clone(), list[BlockChannels]()
    for index in range(len(replay.checkpoint.blocks)):
        probe = _Probe(replay, index, replay.checkpoint.weights(index), hidden)
        before = blocks[-1] if blocks else None
        blocks.append(before if before and probe.has(before) else probe.channels(settings))
        hidden = probe.plain.after
    return tuple(blocks)


@dataclass
class _Run:
    """Inputs of each linear in the order of their calls, and the block's output."""

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    after: Tensor = field(init=False)


class _Probe:
    """One block, run with noise in some outputs of its linears."""

    def __init__(self, replay: Replay, index: int, weights: Tensors, hidden: Tensor) -> None:
        self._replay, self._index, self._weights, self._hidden = replay, index, weights, hidden
        self._block = replay.checkpoint.blocks[index]
        self._linears = {linear.name: linear for linear in replay.checkpoint.linears[index]}
        self._sizes = tuple((name, linear.size) for name, linear in self._linears.items())
        if expert := next((x for x in self._linears.values() if x.expert is not None), None):
            self._refuse(f"{expert.module} holds experts, whose channels are not removed yet")
        self._random = torch.Generator().manual_seed(index)
        self.plain = self._run({})  # the dense block

    def has(self, other: BlockChannels) -> bool:
        """Whether the block has the same linears and channels as another."""
        return other.linears == self._sizes and all(map(self._is_verified, other.sets))

    def channels(self, settings: ChannelSettings) -> BlockChannels:
        """The block's channels; UserError if it has no MLP channels, or no heads where heads are asked for."""
        by_reader = dict[str, list[str]]()  # the writers of each reader
        for name in self.plain.outputs:
            changed = self._changed(self._run({name: self._noise(name, slice(None))}))
            if reader := next((other for other in changed if other != name), None):
                by_reader.setdefault(reader, []).append(name)
        sets = [channel_set for pair in by_reader.items() if (channel_set := self._set(*pair))]
        seen = set[str]()
        for name in (name for one in sets for name in one.linears):
            if name in seen:
                self._refuse(f"{name} both reads and writes channels")
            seen.add(name)
        mlps = [one for one in sets if one.columns == 1 and all(rows == 1 for _, rows in one.writers)]
        heads = [one for one in sets if one not in mlps and one.columns > 1]
        if len(mlps) != 1:
            self._refuse(f"it has {len(mlps) or 'no'} MLPs whose inner channels can go one by one, and needs one")
        if settings.heads and len(heads) != 1:
            self._refuse("its attention has no heads that can go one by one; set prune.channels.heads = false")
        return BlockChannels(mlps[0], heads[0] if settings.heads else None, self._sizes, settings.round_to)

    def _refuse(self, reason: str) -> NoReturn:
        raise UserError(UNSUITED.format(kind=f"block {self._index} ({type(self._block).__name__})", reason=reason))

    def _set(self, reader: str, writers: list[str]) -> ChannelSet | None:
        """The channels between writers and reader; None if they have fewer than two."""
        inputs = self._linears[reader].in_features
        rows = {name: self.plain.outputs[name].shape[-1] for name in writers}
        if any(size != self._linears[name].out_features for name, size in rows.items()):
            return None
        first = self._columns(reader, dict.fromkeys(writers, slice(0, 1)))
        if not len(first):
            return None
        highest = int(first.max())
        whole = gcd(inputs, *rows.values())
        parts = (n for n in range(whole, 1, -1) if whole % n == 0 and inputs // n > highest)
        count = next((n for n in parts if self._is_split(reader, rows, n, [0])), None)
        if count is None:
            return None
        columns = inputs // count
        each = tuple((name, size // count) for name, size in rows.items())
        weights = sum(size * self._linears[name].in_features for name, size in each)
        weights += columns * self._linears[reader].out_features
        channel_set = ChannelSet(count, each, reader, columns, weights)
        return channel_set if self._is_verified(channel_set) else None

    def _is_verified(self, channel_set: ChannelSet) -> bool:
        """Whether random halves of the channels change their own columns alone, and nothing else on the way."""
        rows = {name: size * channel_set.count for name, size in channel_set.writers}
        for _ in range(HALVES):
            order = torch.randperm(channel_set.count, generator=self._random)
            for half in (order[: channel_set.count // 2], order[channel_set.count // 2 :]):
                if not self._is_split(channel_set.reader, rows, channel_set.count, half.tolist()):
                    return False
        # Nothing but the reader depends on the writers.
        reader, fixed = channel_set.reader, self.plain.outputs[channel_set.reader]
        changes = {name: self._noise(name, slice(None)) for name in rows}
        run = self._run({**changes, reader: lambda output: fixed.clone()})
        leaks = any(name != reader and name not in rows for name in self._changed(run))
        return not leaks and torch.equal(run.after, self.plain.after)

    def _is_split(self, reader: str, rows: dict[str, int], count: int, channels: Sequence[int]) -> bool:
        """Whether these channels of the writers change the columns of the same channels of the reader alone."""
        inside = torch.zeros(count, dtype=torch.bool)
        inside[list(channels)] = True
        indices = {name: inside.repeat_interleave(size // count).nonzero()[:, 0] for name, size in rows.items()}
        columns = self._columns(reader, indices)
        return len(columns) > 0 and bool(inside[columns * count // self._linears[reader].in_features].all())

    def _columns(self, reader: str, indices: dict[str, Any]) -> Tensor:
        """The columns of a reader's input that change with noise at places of some outputs."""
        run = self._run({name: self._noise(name, at) for name, at in indices.items()})
        differs = run.inputs[reader] != self.plain.inputs[reader]
        return differs.reshape(-1, differs.shape[-1]).any(0).nonzero()[:, 0].cpu()

    def _changed(self, run: _Run) -> list[str]:
        """The linears with other inputs than in the plain run, in the order of their calls."""
        return [name for name, x in run.inputs.items() if not torch.equal(x, self.plain.inputs[name])]

    def _noise(self, name: str, at: Any) -> Callable[[Tensor], Tensor]:
        output = self.plain.outputs[name]
        noise = torch.randn(output.shape, generator=self._random).to(output) * (output.float().std().to(output) + 1)

        def added(given: Tensor) -> Tensor:
            changed = given.clone()
            changed[..., at] += noise[..., at]
            return changed

        return added

    def _run(self, changes: Changes) -> _Run:
        """Runs the block, with some linears' outputs changed."""
        run = _Run()

        def hook(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            run.inputs[name] = args[0].clone()
            run.outputs[name] = output.clone()  # some models add to it in place
            return changes[name](output) if name in changes else output

        with ExitStack() as stack:
            for name in self._linears:
                stack.enter_context(self._block.get_submodule(name).register_forward_hook(partial(hook, name)))
            run.after = self._replay.run(self._index, self._weights, self._hidden)
        return run


# --- Prunes whole channels of a block: rows of the linears that write them, columns of the linear that reads them.
#
# For each set of channels, as many as the plan says go: those with the lowest scores, measured on the inputs of the
# reader while the block runs dense, behind blocks that are pruned already. The reader's other columns are then fitted
# to its outputs before. Biases stay; nothing reads what they add to a channel that is gone.


def too_sparse(target: float, blocks: Sequence[BlockChannels], settings: ChannelSettings) -> UserError:
    """The error for a sparsity that channels of these blocks cannot make: names the setting that bounds it."""
    highest, single = (min(b.highest for b in each) for each in (blocks, [replace(b, round_to=1) for b in blocks]))
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
    """Chooses the channels of each block that go; `by_magnitude`: by the weights alone."""

    blocks: tuple[BlockChannels, ...]
    settings: ChannelSettings
    by_magnitude: bool

    @property
    def measures(self) -> Measures:
        """The kind of statistics of a reader's inputs that it needs."""
        if self.settings.refit:
            return HessianAndMoments
        return None if self.by_magnitude else InputMoments

    def prune(
        self,
        index: int,
        linears: list[Linear],
        weights: Tensors,
        shares: tuple[float, ...],
        statistics: Mapping[str, Statistics],
    ) -> "PrunedChannels":
        """Block `index` with the share of channels that each linear is to lose; the dense weights are not changed."""
        by_name = {linear.name: linear for linear in linears}
        share = dict(zip(by_name, shares, strict=True))
        pruned = PrunedChannels(dict(weights), dict.fromkeys(by_name, 0))
        for each in self.blocks[index].sets:
            if count := round(each.count * share[each.reader]):
                measured = statistics.get(each.reader)
                mask = lowest(self._scores(each, by_name, weights, measured)[None], count)[0]
                number = int(mask.sum())
                pruned.channels[each.reader] = mask
                for name, rows in each.writers:
                    pruned.copied(by_name[name])[mask.repeat_interleave(rows)] = 0
                    pruned.gone[name] = number * rows * by_name[name].in_features
                reader, columns = by_name[each.reader], mask.repeat_interleave(each.columns)
                matrix = pruned.copied(reader)
                if isinstance(measured, HessianAndMoments):
                    matrix.copy_(refitted(matrix, columns, measured.parts["hessian"].matrix(), self.settings.damping))
                else:
                    matrix[:, columns] = 0
                pruned.gone[each.reader] = number * each.columns * reader.out_features
        return pruned

    def _scores(
        self, each: ChannelSet, linears: dict[str, Linear], weights: Tensors, measured: Statistics | None
    ) -> Tensor:
        matrices = {name: linears[name].matrix(weights[linears[name].key]) for name in each.linears}
        if self.by_magnitude:
            # Squared norm [channels] of all weights of a channel: rows of writers, columns of the reader.
            parts = [*((matrices[name], rows) for name, rows in each.writers), (matrices[each.reader].T, each.columns)]
            return torch.stack([part.float().square().sum(1).view(-1, rows).sum(1) for part, rows in parts]).sum(0)
        moments = measured.parts["moments"] if isinstance(measured, HessianAndMoments) else measured
        assert isinstance(moments, InputMoments)
        energies = moments.variances() if self.settings.score == "fluctuation" else moments.norms().square()
        return channel_scores(matrices[each.reader], energies, each.columns)


@dataclass
class PrunedChannels:
    """The tensors of a block, and the number of weights of each linear that went with its channels."""

    weights: Tensors
    gone: dict[str, int]
    channels: Tensors = field(default_factory=dict)  # masks of those that are gone, by their reader
    experts_without_tokens: list[str] = field(default_factory=list)
    bits: dict[str, int | str] = field(default_factory=dict)
    grids: dict[str, Any] = field(default_factory=dict)

    def copied(self, linear: Linear) -> Tensor:
        """A copy [out, in] of a linear's weight that may be written to, in the place of the dense one."""
        own = self.weights[linear.key].clone(memory_format=torch.contiguous_format)
        self.weights[linear.key] = own
        return linear.matrix(own)

    def zeros(self) -> dict[str, int]:
        """The numbers, which do not count weights that were zero in the dense model."""
        return self.gone
