"""Gradients of the loss by the weights of each block, one block at a time, so that streamed models have them too.

The first pass keeps the hidden states that enter each block, the second goes back from the last block to the first,
computes each block again, and frees the gradients of its weights. Both cost four forward passes, and memory for the
hidden states that enter all blocks. Of a model in memory blocks also keep what their gradients need, as many as a share
of the free memory has room for; these are not computed again, so that both passes cost three.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import embed
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.checkpoints.linears import Linear
from atp_tune.inputs import Batch, InputKind

ACTIVATIONS = 8  # bytes that a block keeps for its gradient, in bytes that it needs without one
SHARE = 0.3  # maximum share of the free memory for what blocks keep from the first pass to the second

# by the final hidden states of items; last those of the dense model, as in `Sample`
LossGradient = Callable[[Replay, Batch, Tensor, Tensor | None], Tensor]
Change = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and dense weight [out, in]: its weight as changed
Take = Callable[[int, Mapping[str, Tensor]], None]  # block, and gradients, float32, by key of a linear's tensor


@dataclass(frozen=True)
class Sample:
    """Items by whose mean loss, the NLL, a gradient is taken.

    `dense`: their final hidden states [items, positions, width] in the dense model; with them the loss is the mean of
    NLL and KL from it.
    """

    items: Batch
    dense: Tensor | None = None

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
        inputs: InputKind[Any],
        gradient: LossGradient,
        batch: AutoBatch,
        heads: AutoBatch,
    ) -> None:
        self.checkpoint = checkpoint
        self.replay = Replay(checkpoint, inputs)  # its own: what it records takes part in gradients
        self._gradient = gradient
        self._batch = batch
        self._heads = heads

    def visit(self, sample: Sample, change: Change, take: Take, each: bool = False) -> None:
        """Gives `take` the gradients of the mean loss, the last block first.

        `each`: of each item's own loss, item by item in order. What no token reaches has gradient 0.
        """
        keeps = self.checkpoint.offload == "none" and not each
        kept = KeptRuns(int(SHARE * free_memory(self.checkpoint.device)) if keeps else 0)
        with torch.inference_mode(False), torch.no_grad():
            entering = self._forward(sample.items, change, kept)
            gradient = self._of_head(sample, entering.pop()) / (1 if each else len(sample.items))
            while entering:
                index = len(entering) - 1
                gradient = self._backward(index, entering.pop(), gradient, change, take, each, kept)

    def _forward(self, items: Batch, change: Change, kept: KeptRuns) -> list[Tensor]:
        """Hidden states [items, positions, width] that enter each block of the changed model, then the final ones."""
        states = [embed(self.replay, self._batch, items)]
        for index in range(len(self.checkpoint.linears)):
            step = partial(self._through, index, self._changed(index, change), states[-1], kept)
            states.append(torch.cat(self._batch.over(len(states[-1]), step)))
        return states

    def _through(self, index: int, weights: dict[str, Tensor], entering: Tensor, kept: KeptRuns, rows: slice) -> Tensor:
        """The states of some items after a block; their run is kept if there is room."""
        if not kept.has_room:
            return self.replay.run(index, weights, entering[rows])
        run = self._run(index, weights, entering, rows)
        kept.add(index, rows.start, run)
        return run.leaving.detach()

    def _run(self, index: int, weights: dict[str, Tensor], entering: Tensor, rows: slice) -> Run:
        """Runs some of the items through a block, with the graph that their gradient needs."""
        leaves = {linear.key: weights[linear.key].requires_grad_() for linear in self.checkpoint.linears[index]}
        hidden = entering[rows].detach().requires_grad_()
        with torch.enable_grad():
            return Run(hidden, leaves, self.replay.run(index, weights, hidden))

    def _of_head(self, sample: Sample, hidden: Tensor) -> Tensor:
        """Gradient of the sum of the items' losses by the final hidden states."""

        def step(rows: slice) -> Tensor:
            return self._gradient(self.replay, sample.items[rows], hidden[rows], sample.states(rows))

        return torch.cat(self._heads.over(len(hidden), step))

    def _backward(
        self, index: int, entering: Tensor, leaving: Tensor, change: Change, take: Take, each: bool, kept: KeptRuns
    ) -> Tensor:
        """The gradient by the states that enter a block; `leaving`: by those that leave it."""
        total: dict[str, Tensor] = {}

        @cache
        def weights() -> dict[str, Tensor]:
            return self._changed(index, change)

        def step(rows: slice) -> Tensor:
            above = leaving[rows]
            run = kept.pop(index, rows.start, len(above)) or self._run(index, weights(), entering, rows)
            found = torch.autograd.grad(run.leaving, [run.entering, *run.weights.values()], above, allow_unused=True)
            for (key, weight), gradient in zip(run.weights.items(), found[1:], strict=True):
                if not rows.start or each:
                    total[key] = torch.zeros_like(weight, dtype=torch.float32)
                if gradient is not None:  # an expert without tokens
                    total[key] += gradient
            if each:
                take(index, total)
            return found[0]

        if each:
            return torch.cat([step(slice(item, item + 1)) for item in range(len(entering))])
        before = torch.cat(self._batch.over(len(entering), step))
        take(index, total)
        return before

    def _changed(self, index: int, change: Change) -> dict[str, Tensor]:
        """The tensors of a block, its linears changed, none of them of the inference mode."""
        linears, weights = self.checkpoint.linears[index], self.checkpoint.weights(index)
        keys = {linear.key for linear in linears}
        found = {
            name: torch.empty_like(tensor) if name in keys else tensor.clone() if tensor.is_inference() else tensor
            for name, tensor in weights.items()
        }
        for linear in linears:
            linear.matrix(found[linear.key]).copy_(change(index, linear, linear.matrix(weights[linear.key])))
        return found
