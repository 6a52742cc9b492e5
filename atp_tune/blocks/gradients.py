"""Gradients of the loss by the weights of each block, one block at a time, so that streamed models have them too.

The first pass keeps the hidden states that enter each block, the second goes back from the last block to the first,
computes each block again, and frees the gradients of its weights. Both cost four forward passes, since one backward
costs two, and memory for the hidden states that enter all blocks. Of a model in memory blocks also keep what their
gradients need, as many as a share of the free memory has room for; these are not computed again, which saves one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from atp_tune.allocations.budget import Costs
from atp_tune.allocations.gradient import DISTANCE, KEPT, LARGEST, Prices
from atp_tune.allocations.rows import RowOffsets
from atp_tune.blocks.prune_pass import BlockStatistics, embed, unmeasured
from atp_tune.blocks.replay import AutoBatch, Replay, block_bytes
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import Tensors, free_memory
from atp_tune.errors import TrialError
from atp_tune.inputs import Batch, InputKind
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import zeroed

ACTIVATIONS = 8  # bytes that a block keeps for its gradient, in bytes that it needs without one
SHARE = 0.3  # maximum share of the free memory for what blocks keep from the first pass to the second
OVERFLOWS = range(0, 20, 4)  # by how many powers of two gradients in float16 are made smaller, until none overflows
PASSES = 4  # forward passes that gradients cost where blocks keep nothing

# by the final hidden states of items; then those of the dense model and the share of the NLL, as in `Sample`
LossGradient = Callable[[Replay, Batch, Tensor, Tensor | None, float], Tensor]
Change = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and dense weight [out, in]: its weight as changed
Take = Callable[[int, Mapping[str, Tensor]], None]  # block, and gradients, float32, by key of a linear's tensor


@dataclass(frozen=True)
class Sample:
    """Items by whose mean loss, the NLL, a gradient is taken.

    `dense`: their final hidden states [items, positions, width] in the dense model; with them the loss is this share of
    the NLL, and for the rest KL from the dense model.
    """

    items: Batch
    dense: Tensor | None = None
    share: float = 0.5


@dataclass(frozen=True)
class Run:
    """A batch that has gone through a block: leaves of a graph, states and weights by key, and the states after it."""

    entering: Tensor
    weights: Tensors
    leaving: Tensor


@dataclass(eq=False)
class KeptRuns:
    """Runs that wait for their gradients: the first batches of the first blocks, as many as `room` bytes hold."""

    room: int
    last: int = 0  # bytes of the last: one more is expected to be as large
    _of_blocks: dict[int, dict[tuple[int, int], Run]] = field(default_factory=dict)

    def add(self, index: int, start: int, run: Run) -> None:
        """Keeps the run of a batch through a block, whose first item is `start`; if it is too large, it is the last."""
        self.last = graph_bytes(run.leaving)
        if self.last <= self.room:
            self._of_blocks.setdefault(index, {})[start, len(run.entering)] = run
        self.room -= self.last

    def pop(self, index: int, start: int, items: int) -> Run | None:
        """The run of a batch; None if it is not kept. When batches have become smaller all are dropped."""
        runs = self._of_blocks.get(index, {})
        run = runs.pop((start, items), None)
        if run is None and runs:
            self._of_blocks.clear()
        return run


def graph_bytes(result: Tensor) -> int:
    """Bytes of the tensors that the graph of a result keeps for its gradients."""
    sizes, met, left = dict[int, int](), set[Any](), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":  # of PyTorch's own nodes, and of a model's
                value = getattr(node, name)
                for x in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(x, Tensor):
                        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        left += [after for after, _ in node.next_functions]
    return sum(sizes.values())


@dataclass(eq=False)
class BlockGradients:
    """Gradients by the linears' weights of a dense checkpoint whose linears are changed.

    `gradient`: gradient of each item's loss by its final hidden states [items, positions, width]; `batch`, `heads`:
    batch sizes in the blocks and in the head.
    """

    checkpoint: Checkpoint
    inputs: InputKind
    gradient: LossGradient
    batch: AutoBatch
    heads: AutoBatch

    def __post_init__(self) -> None:
        self.replay = Replay(self.checkpoint, self.inputs)  # its own: what it records takes part in gradients

    def visit(self, sample: Sample, change: Change, take: Take, each: bool = False) -> None:
        """Gives `take` the gradients of the mean loss, the last block first.

        `each`: of each item's own loss, item by item in order. What no token reaches has gradient 0.
        """
        self._change, self._kept = change, KeptRuns(0 if each else room(self.checkpoint))
        try:
            with torch.inference_mode(False), torch.no_grad():
                entering = self.forward(sample.items)
                hidden = entering.pop()

                def step(rows: slice) -> Tensor:
                    dense = None if sample.dense is None else sample.dense[rows]
                    return self.gradient(self.replay, sample.items[rows], hidden[rows], dense, sample.share)

                gradient = torch.cat(self.heads.over(len(hidden), step))  # of the sum of the items' losses
                gradient = gradient.float() if gradient.dtype == torch.float16 else gradient
                gradient = gradient / (1 if each else len(sample.items))
                while entering:
                    gradient = self.backward(len(entering) - 1, entering.pop(), gradient, take, each)
        finally:
            # What waits for its gradient is not kept after an error, nor is what `change` holds.
            del self._kept, self._change

    def forward(self, items: Batch) -> list[Tensor]:
        """Hidden states [items, positions, width] that enter each block of the changed model, then the final ones."""
        states = [embed(self.replay, self.batch, items)]
        for index in range(len(self.checkpoint.linears)):
            step = partial(self._through, index, self._changed(index), states[-1])
            states.append(torch.cat(self.batch.over(len(states[-1]), step)))
        return states

    def backward(self, index: int, entering: Tensor, leaving: Tensor, take: Take, each: bool) -> Tensor:
        """The gradient by the states that enter a block, from that by those that leave it.

        `each`: item by item, each with gradients of its own; else both are summed over items. Those by the linears'
        weights, by key, are float32.
        """
        total, weights = Tensors(), cache(partial(self._changed, index))

        def step(rows: slice) -> Tensor:
            above = leaving[rows]
            run = self._kept.pop(index, rows.start, len(above)) or self._run(index, weights(), entering, rows)
            by_states, *by_weights = _by(run.leaving, [run.entering, *run.weights.values()], above)
            for key, own in zip(run.weights, by_weights, strict=True):
                gradient = own.float().contiguous()  # of an expert without tokens 0
                if rows.start and not each:
                    total[key] += gradient
                else:
                    total[key] = gradient
            if each:
                take(index, total)
            return by_states

        if each:
            return torch.cat([step(slice(item, item + 1)) for item in range(len(entering))])
        before = torch.cat(self.batch.over(len(entering), step))
        take(index, total)
        return before

    def _through(self, index: int, weights: Tensors, entering: Tensor, rows: slice) -> Tensor:
        """The states of some items after a block; their run is kept if there is room."""
        if self._kept.last >= self._kept.room:
            return self.replay.run(index, weights, entering[rows])
        run = self._run(index, weights, entering, rows)
        self._kept.add(index, rows.start, run)
        return run.leaving.detach()

    def _run(self, index: int, weights: Tensors, entering: Tensor, rows: slice) -> Run:
        """Runs some of the items through a block, with the graph that their gradient needs."""
        leaves = {linear.key: weights[linear.key].requires_grad_() for linear in self.checkpoint.linears[index]}
        hidden = entering[rows].detach().requires_grad_()
        with torch.enable_grad():
            return Run(hidden, leaves, self.replay.run(index, weights, hidden))

    def _changed(self, index: int) -> Tensors:
        """The tensors of a block, its linears changed, none of them of the inference mode."""
        linears, weights = self.checkpoint.linears[index], self.checkpoint.weights(index)
        keys = {linear.key for linear in linears}
        tensors = {
            name: torch.empty_like(tensor) if name in keys else tensor.clone() if tensor.is_inference() else tensor
            for name, tensor in weights.items()
        }
        for linear in linears:
            linear.matrix(tensors[linear.key]).copy_(self._change(index, linear, linear.matrix(weights[linear.key])))
        return tensors


def room(checkpoint: Checkpoint) -> int:
    """Bytes for what blocks keep from the first pass to the second."""
    return int(SHARE * free_memory(checkpoint.device)) if checkpoint.offload == "none" else 0


def passes(checkpoint: Checkpoint, positions: int) -> float:
    """Estimate of the forward passes that gradients cost, by items of so many positions in all."""
    size = len(checkpoint.blocks) * positions * block_bytes(checkpoint)
    return PASSES - min(1.0, room(checkpoint) / size)


def _by(leaving: Tensor, leaves: Sequence[Tensor], above: Tensor) -> Sequence[Tensor]:
    """The gradients of ⟨leaving, above⟩ by the leaves, in their formats, of float16 in float32.

    The range of float16 is too small for gradients of a loss. They are scaled by a power of two, so that the largest
    of `above` is near 1, and less where something overflows: Micikevicius et al., Mixed Precision Training, ICLR 2018.
    """
    gradients = partial(torch.autograd.grad, leaving, leaves, allow_unused=True, materialize_grads=True)
    if leaving.dtype != torch.float16:
        return gradients(above)
    exponent = int(torch.frexp(above.abs().max().float()).exponent)
    for less in OVERFLOWS:
        scale = 2.0 ** -(exponent + less)
        values = [x.float() / scale for x in gradients((above.float() * scale).to(leaving.dtype), retain_graph=True)]
        if all(bool(x.isfinite().all()) for x in values):
            break
    return values


def check_finite(prices: Iterable[float], what: str) -> None:
    """TrialError if a price that gradients gave is NaN or infinite: with one in it no step of a descent moves."""
    if not all(map(math.isfinite, prices)):
        raise TrialError(f"{what} are not finite: gradients overflow; try model.dtype = bfloat16 or float32")


# --- Prices of linears: what one further pruned weight of each costs, by the gradient of the loss at the pruned model.
#
#     Ŵ_l(k)   what the pruner makes of the dense weight W of linear l at level k of its sparsity
#     G        d loss / d Ŵ_l(k) of the pruned model, also where a weight is zero
#     p_l      ⟨G, Ŵ_l(k⁺) - Ŵ_l(k⁻)⟩ / (number of weights that k⁺ zeroes and k⁻ does not)         nats per weight
#
# k⁻ and k⁺ are the levels 0.06 below and above that of the linear's sparsity. Where a pruner changes no weight that it
# keeps, such as Wanda, the price is the mean of - G_ij W_ij over the weights that go next and those that went last: to
# zero one changes the loss by about that.
#
# `blocks.gradients` has the gradients, of one block at a time.
#
# G_ij W_ij is the sensitivity of SNIP (Lee et al., ICLR 2019), which takes it at the dense model and of single weights.
#
# Levels of sparsity: level k of n zeroes the share k / n of a linear's weights. Masks by place have a level for each
# weight of a row. What a pruner makes that changes kept weights too is made anew for each level, so that it has few,
# and they are kept.
#
# Where each row has a number of zeros of its own (see `allocations.gradient`):
#
#     k_r = n (s + d_r), rounded    zeros of row r of a linear with n inputs and the sparsity s
#     p_r   mean of - G_ij W_ij over the weights of the row whose place in the order of scores is less than 0.06 n from
#           k_r: what one further pruned weight costs, in nats
#     p     the same over all rows of the linear: its price
#
# Prices of bits, what it costs to round each linear to each number of bits, by the gradient of the dense model.
#
#     E_l(b)    Ŵ_l(b) - W_l, the error of linear l rounded to nearest with b bits
#     G_w       d loss / d W_l of item w, a window or an image
#     C_l(b)    mean over w of (Σ_ij G_w,ij E_l,ij(b))²
#
# That is the second-order term of the loss, but for one factor that all linears share: EᵀHE with the empirical Fisher
# matrix in the place of the Hessian H, in full and not only its diagonal, so that errors of one row that cancel each
# other cost little. The first-order term is left out: in a trained model its mean is near 0.
#
# Source: the Fisher matrix for the Hessian as in Hassibi and Stork, "Second order derivatives for network pruning:
# Optimal Brain Surgeon", NIPS 1992; a sum of such costs over layers as in Dong et al., "HAWQ-V2", NeurIPS 2020, which
# has the Hessian's trace times the squared error.

BAND = 0.06  # a price is measured between the sparsities so far below and above that of the linear
GRID = 32  # levels of a pruner's own weights

Places = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and matrix [out, in] of its weights


@dataclass(frozen=True)
class ByPlaces:
    """Masks of the lowest scores of each row; `places`: places [out, in] of a linear's scores in their rows."""

    places: Places

    def number(self, columns: int) -> int:
        """The level of sparsity 1, for a linear of so many inputs: one for each weight of a row."""
        return columns

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The level of a sparsity, between the two that a price is measured between: below, at, above.

        Weights whose place is less than `BAND` of the inputs away from the number of zeros are between them.
        """
        zeros, reach = int(columns * sparsity), max(1, int(BAND * columns))
        return max(zeros - reach + 1, 0), zeros, min(zeros + reach, columns)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """The weight [out, in] of a linear, from the dense one, at a level: those of a lower place are zero."""
        return zeroed(weight, self.places(index, linear, weight) < level)


@dataclass(eq=False)
class ByPruner:
    """Levels that a pruner makes of the dense weights; `statistics`: of a block's inputs in the dense model, prepared.

    In a pattern a level is one more zero in each group. The weights of levels are kept in host memory, up to `room`
    bytes; those that were asked for last stay.
    """

    pruner: Pruner
    statistics: Callable[[int], BlockStatistics]
    room: int
    _kept: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)  # what was asked for last is the last

    def number(self, columns: int) -> int:
        """The level of sparsity 1: as many as a group has weights, or `GRID`."""
        return int(getattr(self.pruner, "group", None) or GRID)

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The nearest level, and those `BAND` away from it."""
        number = self.number(columns)
        level, reach = round(number * sparsity), max(1, round(BAND * number))
        return max(level - reach, 0), level, min(level + reach, number)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """Prunes by the pruner, an expert without tokens by magnitude."""
        key = index, linear.name, level
        sparse = self._kept.pop(key, None)
        if sparse is None:
            statistics = self.statistics(index).get(linear.name) if self.pruner.measures else None
            lacks = self.pruner.measures and statistics is None
            pruner = unmeasured(self.pruner) if lacks else self.pruner
            sparse = pruner.prune(weight, level / self.number(weight.shape[1]), statistics).contiguous()
            self.room -= sparse.nbytes
        self._kept[key] = sparse.cpu()
        while self.room < 0:
            self.room += self._kept.pop(next(iter(self._kept))).nbytes
        return sparse.to(weight.device)


Levels = ByPlaces | ByPruner  # of the linears of a dense checkpoint


Key = tuple[int, str]  # of a linear: its block and its name


@dataclass(eq=False)
class Pricing:
    """Measures the prices of all linears of a dense checkpoint, pruned to given sparsities."""

    gradients: BlockGradients
    levels: Levels
    called = "prices"  # in messages

    def prices(self, sparsities: Sequence[Sequence[float]], sample: Sample) -> Prices:
        """Price of each linear of each block in nats per weight, for the mean loss of the sample."""
        checkpoint, prices = self.gradients.checkpoint, dict[Key, Tensor]()
        shares = {
            (index, linear.name): s
            for index, (linears, row) in enumerate(zip(checkpoint.linears, sparsities, strict=True))
            for linear, s in zip(linears, row, strict=True)
        }

        def price(index: int, total: Mapping[str, Tensor]) -> None:
            dense = checkpoint.weights(index)
            for linear in checkpoint.linears[index]:
                weight, gradient = (linear.matrix(tensors[linear.key]) for tensors in (dense, total))
                key = index, linear.name
                prices[key] = self._price(index, linear, weight, gradient, shares[key])

        self.gradients.visit(
            sample, lambda index, x, dense: self._pruned(index, x, dense, shares[index, x.name]), price
        )
        found = {key: float(own) for key, own in prices.items()}
        check_finite(found.values(), self.called)
        return tuple(
            tuple(found[index, linear.name] for linear in linears) for index, linears in enumerate(checkpoint.linears)
        )

    def state(self) -> Tensors:
        """The state is empty: prices depend on sparsities and sample alone."""
        return {}

    def resume(self, state: Tensors) -> None:
        """Goes on from a state."""

    def _pruned(self, index: int, linear: Linear, weight: Tensor, sparsity: float) -> Tensor:
        """The weight of a linear as it is pruned."""
        _, level, _ = self.levels.around(weight.shape[1], sparsity)
        return self.levels.pruned(index, linear, weight, level)

    def _price(self, index: int, linear: Linear, weight: Tensor, gradient: Tensor, sparsity: float) -> Tensor:
        """The price of a linear, by its dense weight and the gradient by the pruned one."""
        columns = weight.shape[1]
        low, _, high = self.levels.around(columns, sparsity)
        before, after = (self.levels.pruned(index, linear, weight, level).float() for level in (low, high))
        zeroed = weight.numel() * (high - low) / self.levels.number(columns)
        return (gradient * (after - before)).sum() / max(1, zeroed)  # none where all weights of few are zero


class RowPricing(Pricing):
    """Measures prices of all linears, pruned by the lowest scores of their rows, and moves the rows by their own.

    `places`: places [out, in] of a linear's scores in their rows.
    """

    called = "prices of rows"

    def __init__(self, gradients: BlockGradients, places: Places) -> None:
        super().__init__(gradients, ByPlaces(places))
        self._places = places
        blocks = enumerate(gradients.checkpoint.linears)
        zeros = {(index, x.name): torch.zeros(x.out_features) for index, block in blocks for x in block}
        self._offsets, self._smooth = zeros, {**zeros}  # shares of the inputs, moving means of prices: never in place
        self._rows = dict[Key, Tensor]()  # their prices by the last sample

    def prices(self, sparsities: Sequence[Sequence[float]], sample: Sample) -> Prices:
        """Price of each linear of each block in nats per weight, for the mean loss of the sample; then rows move."""
        prices = super().prices(sparsities, sample)
        for key, rows in self._rows.items():
            smooth = self._smooth[key] = KEPT * self._smooth[key] + (1 - KEPT) * rows
            apart = smooth - smooth.mean()
            deviation = apart.square().mean().sqrt()
            if deviation:
                moved = self._offsets[key] - DISTANCE * (apart / deviation).clamp(-LARGEST, LARGEST)
                self._offsets[key] = moved - moved.mean()
        return prices

    def _pruned(self, index: int, linear: Linear, weight: Tensor, sparsity: float) -> Tensor:
        places = self._places(index, linear, weight)
        return zeroed(weight, places <= self._last((index, linear.name), places, sparsity))

    def _price(self, index: int, linear: Linear, weight: Tensor, gradient: Tensor, sparsity: float) -> Tensor:
        # The weights of a row that go next or went last: as `ByPlaces.around`, row by row.
        key, places = (index, linear.name), self._places(index, linear, weight)
        reach = max(1, int(BAND * places.shape[1]))
        first, last = (self._last(key, places, sparsity, further) for further in (1 - reach, reach))
        costs = -(gradient * zeroed(weight, (places <= first) | (places > last)).float()).sum(1)
        number = (last.int() - first).squeeze(1)  # of those places; each is that of one weight
        mean = costs.sum() / number.sum().clamp(min=1)
        self._rows[key] = torch.where(number > 0, costs / number.clamp(min=1), mean).cpu()
        return mean

    def offsets(self) -> RowOffsets:
        """The offsets that the rows have reached."""
        blocks = enumerate(self.gradients.checkpoint.linears)
        return RowOffsets.of([[self._offsets[index, x.name].numpy() for x in block] for index, block in blocks])

    def state(self) -> Tensors:
        """Offsets of all rows and moving means of their prices, each [rows], one linear after the other."""
        return {"offsets": torch.cat([*self._offsets.values()]), "smooth": torch.cat([*self._smooth.values()])}

    def resume(self, state: Tensors) -> None:
        """Goes on from a state."""
        rows = [len(row) for row in self._offsets.values()]
        self._offsets = dict(zip(self._offsets, torch.split(state["offsets"], rows), strict=True))
        self._smooth = dict(zip(self._smooth, torch.split(state["smooth"], rows), strict=True))

    def _last(self, key: Key, places: Tensor, sparsity: float, further: int = 0) -> Tensor:
        """The last place [out, 1] below the number of zeros of a row, and this much further."""
        columns = places.shape[1]
        zeros = (columns * (sparsity + self._offsets[key])).round().clamp(0, columns)
        last = (zeros + further - 1).clamp(-1, columns - 1)  # fits the small format of places, which is compared fast
        return last.to(places.device, places.dtype)[:, None]


Rounded = Callable[[int, Linear, Tensor], list[Tensor]]  # a weight [out, in] of a block at all of its widths


@dataclass(eq=False)
class BitPricing:
    """Measures what each linear of a dense checkpoint costs at each width, where `rounded` makes its weight at all.

    The weights of one block are kept at all widths.
    """

    gradients: BlockGradients
    rounded: Rounded

    def costs(self, items: Batch, done: Callable[[int], None] = lambda blocks: None) -> Costs:
        """The cost of each linear of each block at each width; comparable with each other alone.

        `done` gets the number of blocks that are measured.
        """
        checkpoint = self.gradients.checkpoint
        errors = dict[int, list[Tensor]]()  # of the linears of one block, each [widths, weights]
        total = [[torch.zeros(1, dtype=torch.float64)] * len(linears) for linears in checkpoint.linears]

        def add(index: int, gradients: Mapping[str, Tensor]) -> None:
            if index not in errors:
                errors.clear()
                weights = checkpoint.weights(index)
                errors[index] = [self._errors(index, x, x.matrix(weights[x.key])) for x in checkpoint.linears[index]]
                done(len(total) - index)
            for k, (linear, error) in enumerate(zip(checkpoint.linears[index], errors[index], strict=True)):
                slopes = error @ linear.matrix(gradients[linear.key]).flatten()
                total[index][k] = total[index][k] + slopes.cpu().double() ** 2 / len(items)

        self.gradients.visit(Sample(items), lambda index, linear, weight: weight, add, each=True)
        check_finite((float(row.sum()) for block in total for row in block), "prices of bits")
        return tuple(tuple(tuple(row.tolist()) for row in block) for block in total)

    def _errors(self, index: int, linear: Linear, weight: Tensor) -> Tensor:
        """Errors [widths, out · in] of a weight, float32."""
        return torch.stack([(rounded - weight).float().flatten() for rounded in self.rounded(index, linear, weight)])
