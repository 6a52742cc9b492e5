"""Gradients of the loss by the weights of each block, one block at a time, so that streamed models have them too.

The first pass keeps the hidden states that enter each block, the second goes back from the last block to the first,
computes each block again, and frees the gradients of its weights. Both cost four forward passes, since one backward
costs two, and memory for the hidden states that enter all blocks. Of a model in memory blocks also keep what their
gradients need, as many as a share of the free memory has room for; these are not computed again, which saves one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.prune_pass import embed
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.errors import TrialError
from atp_tune.inputs import Batch, InputKind

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

    def states(self, rows: slice) -> Tensor | None:
        """The dense model's states of some of the items."""
        return None if self.dense is None else self.dense[rows]


@dataclass(frozen=True)
class Run:
    """A batch that has gone through a block: leaves of a graph, states and weights by key, and the states after it."""

    entering: Tensor
    weights: dict[str, Tensor]
    leaving: Tensor


class KeptRuns:
    """Runs that wait for their gradients: the first batches of the first blocks, as many as `room` bytes hold."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._last = 0
        self._of_blocks: dict[int, dict[tuple[int, int], Run]] = {}

    @property
    def has_room(self) -> bool:
        """Whether there is room for one more, if it is as large as the last."""
        return self._room > self._last

    def add(self, index: int, start: int, run: Run) -> None:
        """Keeps the run of a batch through a block, whose first item is `start`; if it is too large, it is the last."""
        self._last = graph_bytes(run.leaving)
        if self._last <= self._room:
            self._of_blocks.setdefault(index, {})[start, len(run.entering)] = run
        self._room -= self._last

    def pop(self, index: int, start: int, items: int) -> Run | None:
        """The run of a batch; None if it is not kept. When batches have become smaller all are dropped."""
        runs = self._of_blocks.get(index, {})
        found = runs.pop((start, items), None)
        if found is None and runs:
            self._of_blocks.clear()
        return found


def graph_bytes(result: Tensor) -> int:
    """Bytes of the tensors that the graph of a result keeps for its gradients."""
    found, met, left = dict[int, int](), set[Any](), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        storages = [tensor.untyped_storage() for tensor in _saved_by(node)]
        found |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        left += [after for after, _ in node.next_functions]
    return sum(found.values())


def _saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that a node of a graph keeps: `_saved_NAME` of PyTorch's own, `saved_tensors` of a model's."""
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            value = getattr(node, name)
            yield from (x for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, Tensor))


class BlockGradients:
    """Gradients by the linears' weights of a dense checkpoint whose linears are changed.

    `gradient`: gradient of each item's loss by its final hidden states [items, positions, width]; `batch`, `heads`:
    batch sizes in the blocks and in the head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: InputKind,
        gradient: LossGradient,
        batch: AutoBatch,
        heads: AutoBatch,
    ) -> None:
        self.checkpoint = checkpoint
        self.replay = Replay(checkpoint, inputs)  # its own: what it records takes part in gradients
        self._gradient = gradient
        self.batch = batch
        self._heads = heads

    def visit(self, sample: Sample, change: Change, take: Take, each: bool = False) -> None:
        """Gives `take` the gradients of the mean loss, the last block first.

        `each`: of each item's own loss, item by item in order. What no token reaches has gradient 0.
        """
        visit = _Visit(self, change, KeptRuns(0 if each else room(self.checkpoint)))
        with torch.inference_mode(False), torch.no_grad():
            entering = visit.forward(sample.items)
            gradient = _wide(self._of_head(sample, entering.pop())) / (1 if each else len(sample.items))
            backward = visit.backward_each if each else visit.backward
            while entering:
                gradient = backward(len(entering) - 1, entering.pop(), gradient, take)

    def _of_head(self, sample: Sample, hidden: Tensor) -> Tensor:
        """Gradient of the sum of the items' losses by the final hidden states."""

        def step(rows: slice) -> Tensor:
            return self._gradient(self.replay, sample.items[rows], hidden[rows], sample.states(rows), sample.share)

        return torch.cat(self._heads.over(len(hidden), step))


def room(checkpoint: Checkpoint) -> int:
    """Bytes for what blocks keep from the first pass to the second."""
    return int(SHARE * free_memory(checkpoint.device)) if checkpoint.offload == "none" else 0


def passes(checkpoint: Checkpoint, positions: int) -> float:
    """Estimate of the forward passes that gradients cost, by items of so many positions in all."""
    kept = len(checkpoint.blocks) * positions * block_bytes(checkpoint)
    return PASSES - min(1.0, room(checkpoint) / kept)


class _Visit:
    """One way through the blocks of a changed model, and back; `kept`: for runs of the first that the second needs."""

    def __init__(self, of: BlockGradients, change: Change, kept: KeptRuns) -> None:
        self._checkpoint, self._replay, self._batch = of.checkpoint, of.replay, of.batch
        self._change = change
        self._kept = kept

    def forward(self, items: Batch) -> list[Tensor]:
        """Hidden states [items, positions, width] that enter each block of the changed model, then the final ones."""
        states = [embed(self._replay, self._batch, items)]
        for index in range(len(self._checkpoint.linears)):
            step = partial(self._through, index, self._changed(index), states[-1])
            states.append(torch.cat(self._batch.over(len(states[-1]), step)))
        return states

    def backward(self, index: int, entering: Tensor, leaving: Tensor, take: Take) -> Tensor:
        """The gradient by the states that enter a block, from that by those that leave it; both summed over items."""
        total, weights = dict[str, Tensor](), cache(partial(self._changed, index))

        def step(rows: slice) -> Tensor:
            by_states, by_weights = self._gradients(index, weights, entering, leaving, rows)
            for key, gradient in by_weights.items():
                if rows.start:
                    total[key] += gradient
                else:
                    total[key] = gradient
            return by_states

        before = torch.cat(self._batch.over(len(entering), step))
        take(index, total)
        return before

    def backward_each(self, index: int, entering: Tensor, leaving: Tensor, take: Take) -> Tensor:
        """The same item by item, each with gradients of its own."""
        before, weights = [], cache(partial(self._changed, index))
        for item in range(len(entering)):
            by_states, by_weights = self._gradients(index, weights, entering, leaving, slice(item, item + 1))
            take(index, by_weights)
            before.append(by_states)
        return torch.cat(before)

    def _gradients(
        self, index: int, weights: Callable[[], dict[str, Tensor]], entering: Tensor, leaving: Tensor, rows: slice
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of some items by the states that enter a block, and, float32, by its linears' weights by key."""
        above = leaving[rows]
        run = self._kept.pop(index, rows.start, len(above)) or self._run(index, weights(), entering, rows)
        leaves = [run.entering, *run.weights.values()]
        found = _by(run.leaving, leaves, above)
        by_weights = (gradient.float().contiguous() for gradient in found[1:])  # of an expert without tokens 0
        return found[0], dict(zip(run.weights, by_weights, strict=True))

    def _through(self, index: int, weights: dict[str, Tensor], entering: Tensor, rows: slice) -> Tensor:
        """The states of some items after a block; their run is kept if there is room."""
        if not self._kept.has_room:
            return self._replay.run(index, weights, entering[rows])
        run = self._run(index, weights, entering, rows)
        self._kept.add(index, rows.start, run)
        return run.leaving.detach()

    def _run(self, index: int, weights: dict[str, Tensor], entering: Tensor, rows: slice) -> Run:
        """Runs some of the items through a block, with the graph that their gradient needs."""
        leaves = {linear.key: weights[linear.key].requires_grad_() for linear in self._checkpoint.linears[index]}
        hidden = entering[rows].detach().requires_grad_()
        with torch.enable_grad():
            return Run(hidden, leaves, self._replay.run(index, weights, hidden))

    def _changed(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block, its linears changed, none of them of the inference mode."""
        linears, weights = self._checkpoint.linears[index], self._checkpoint.weights(index)
        keys = {linear.key for linear in linears}
        found = {
            name: torch.empty_like(tensor) if name in keys else tensor.clone() if tensor.is_inference() else tensor
            for name, tensor in weights.items()
        }
        for linear in linears:
            linear.matrix(found[linear.key]).copy_(self._change(index, linear, linear.matrix(weights[linear.key])))
        return found


def _wide(gradient: Tensor) -> Tensor:
    """A gradient, of float16 as float32."""
    return gradient.float() if gradient.dtype == torch.float16 else gradient


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
        found = [x.float() / scale for x in gradients((above.float() * scale).to(leaving.dtype), retain_graph=True)]
        if all(bool(x.isfinite().all()) for x in found):
            break
    return found


def check_finite(prices: Iterable[float], what: str) -> None:
    """TrialError if a price that gradients gave is NaN or infinite: with one in it no step of a descent moves."""
    if not all(map(math.isfinite, prices)):
        raise TrialError(f"{what} are not finite: gradients overflow; try model.dtype = bfloat16 or float32")
