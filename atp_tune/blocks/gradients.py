"""Gradients of the loss by the weights of each block, one block at a time, so that streamed models have them too.

The first pass keeps the hidden states that enter each block, the second goes back from the last block to the first,
computes each block again, and frees the gradients of its weights. Both cost four forward passes, and memory for the
hidden states that enter all blocks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import advance, embed
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.linears import Linear
from atp_tune.inputs import Batch, InputKind

ACTIVATIONS = 8  # bytes that a block keeps for its gradient, in bytes that it needs without one

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
        with torch.inference_mode(False), torch.no_grad():
            entering = self._forward(sample.items, change)
            gradient = self._of_head(sample, entering.pop()) / (1 if each else len(sample.items))
            while entering:
                index = len(entering) - 1
                gradient = self._backward(index, entering.pop(), gradient, change, take, each)

    def _forward(self, items: Batch, change: Change) -> list[Tensor]:
        """Hidden states [items, positions, width] that enter each block of the changed model, then the final ones."""
        states = [embed(self.replay, self._batch, items)]
        for index in range(len(self.checkpoint.linears)):
            entering, weights = states[-1].clone(), self._changed(index, change)
            states.append(advance(self.replay, self._batch, index, weights, entering))
        return states

    def _of_head(self, sample: Sample, hidden: Tensor) -> Tensor:
        """Gradient of the sum of the items' losses by the final hidden states."""

        def step(rows: slice) -> Tensor:
            return self._gradient(self.replay, sample.items[rows], hidden[rows], sample.states(rows))

        return torch.cat(self._heads.over(len(hidden), step))

    def _backward(
        self, index: int, entering: Tensor, leaving: Tensor, change: Change, take: Take, each: bool
    ) -> Tensor:
        """The gradient by the states that enter a block; `leaving`: by those that leave it."""
        weights = self._changed(index, change)
        keys = list(dict.fromkeys(linear.key for linear in self.checkpoint.linears[index]))
        leaves = {key: weights[key].requires_grad_() for key in keys}
        total: dict[str, Tensor] = {}

        def step(rows: slice) -> Tensor:
            hidden = entering[rows].detach().requires_grad_()
            with torch.enable_grad():
                after = self.replay.run(index, {**weights, **leaves}, hidden)
            found = torch.autograd.grad(after, [hidden, *leaves.values()], leaving[rows], allow_unused=True)
            for key, gradient in zip(keys, found[1:], strict=True):
                if not rows.start or each:
                    total[key] = torch.zeros_like(weights[key], dtype=torch.float32)
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
