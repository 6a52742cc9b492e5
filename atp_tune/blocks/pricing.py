"""Prices of linears: what one further pruned weight of each costs, by the gradient of the loss at the pruned model.

    place_ij    place of a weight's score in its row, from 0 for the lowest; scores as in Wanda or by magnitude
    k_l         ⌊in_l s_l⌋; the weights of linear l with place < k_l are zero
    G           d loss / d W of the pruned model, also where W is zero
    p_l         - mean of G_ij W_ij over the band |place_ij - k_l| < 0.06 in_l            W dense; nats per weight

A weight in the band is the next to go, or the last that went. To zero it changes the loss by about -G_ij W_ij.

Blocks are used one at a time, so that streamed models have prices too: the first pass keeps the hidden states that
enter each block, the second goes back from the last block to the first, computes each block again, and frees the
gradients of its weights. A price costs four forward passes, and memory for the hidden states that enter all blocks.

G_ij W_ij is the sensitivity of SNIP (Lee et al., ICLR 2019), which takes it at the dense model and of single weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch
from atp_tune.blocks.prune_pass import advance, embed
from atp_tune.blocks.replay import Replay
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.linears import Linear
from atp_tune.inputs import Batch, InputKind

BAND = 0.06  # half width of the band, as a share of the inputs
ACTIVATIONS = 8  # bytes that a block keeps for its gradient, in bytes that it needs without one

LossGradient = Callable[[Replay, Batch, Tensor], Tensor]  # of items and their final hidden states, by these states
Places = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and matrix [out, in] of its weights


class Pricing:
    """Measures the prices of all linears of a dense checkpoint, pruned to given sparsities.

    `gradient`: gradient of each item's loss by its final hidden states [items, positions, width]; `places`: places
    [out, in] of a linear's scores in their rows; `batch`, `heads`: batch sizes in the blocks and in the head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: InputKind[Any],
        gradient: LossGradient,
        places: Places,
        batch: AutoBatch,
        heads: AutoBatch,
    ) -> None:
        self._checkpoint = checkpoint
        self._replay = Replay(checkpoint, inputs)  # its own: what it records takes part in gradients
        self._gradient = gradient
        self._places = places
        self._batch = batch
        self._heads = heads

    def prices(self, sparsities: Sequence[Sequence[float]], items: Batch) -> tuple[tuple[float, ...], ...]:
        """Price of each linear of each block in nats per weight, for the mean loss of the items."""
        with torch.inference_mode(False), torch.no_grad():
            entering = self._forward(sparsities, items)
            gradient = self._of_head(items, entering.pop())
            rows: list[Tensor] = []
            while entering:
                index = len(entering) - 1
                row, gradient = self._backward(index, sparsities[index], entering.pop(), gradient)
                rows.append(row)
            return tuple(tuple(row.tolist()) for row in reversed(rows))

    def _forward(self, sparsities: Sequence[Sequence[float]], items: Batch) -> list[Tensor]:
        """Hidden states [items, positions, width] that enter each block of the pruned model, then the final ones."""
        states = [embed(self._replay, self._batch, items)]
        for index, row in enumerate(sparsities):
            entering, weights = states[-1].clone(), self._pruned(index, row)
            states.append(advance(self._replay, self._batch, index, weights, entering))
        return states

    def _of_head(self, items: Batch, hidden: Tensor) -> Tensor:
        """Gradient of the mean loss by the final hidden states."""
        parts = self._heads.over(len(hidden), lambda rows: self._gradient(self._replay, items[rows], hidden[rows]))
        return torch.cat(parts) / len(hidden)

    def _backward(
        self, index: int, sparsities: Sequence[float], entering: Tensor, leaving: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prices of a block's linears, and the gradient by the states that enter it; `leaving`: by those that leave."""
        linears, weights = self._checkpoint.linears[index], self._pruned(index, sparsities)
        keys = list(dict.fromkeys(linear.key for linear in linears))
        leaves = {key: weights[key].requires_grad_() for key in keys}
        total = {key: torch.zeros_like(weights[key], dtype=torch.float32) for key in keys}

        def step(rows: slice) -> Tensor:
            hidden = entering[rows].detach().requires_grad_()
            with torch.enable_grad():
                after = self._replay.run(index, {**weights, **leaves}, hidden)
            found = torch.autograd.grad(after, [hidden, *leaves.values()], leaving[rows], allow_unused=True)
            for key, gradient in zip(keys, found[1:], strict=True):
                if gradient is not None:  # an expert without tokens
                    total[key] += gradient
            return found[0]

        before = torch.cat(self._batch.over(len(entering), step))
        dense = self._checkpoint.weights(index)
        rows = [
            self._price(index, linear, s, linear.matrix(dense[linear.key]), linear.matrix(total[linear.key]))
            for linear, s in zip(linears, sparsities, strict=True)
        ]
        return torch.stack(rows), before

    def _price(self, index: int, linear: Linear, sparsity: float, weight: Tensor, gradient: Tensor) -> Tensor:
        columns = weight.shape[1]
        zeros, reach = int(columns * sparsity), max(1, int(BAND * columns))
        distance = self._places(index, linear, weight).int() - zeros
        costs = torch.where(distance.abs() < reach, gradient * weight.float(), 0)
        inside = min(zeros + reach, columns) - max(zeros - reach + 1, 0)  # places of a row in the band
        return -costs.sum() / max(1, inside * weight.shape[0])  # none is inside where all weights of few are zero

    def _pruned(self, index: int, sparsities: Sequence[float]) -> dict[str, Tensor]:
        """The tensors of a block, its linears with zeros, none of them of the inference mode."""
        linears, weights = self._checkpoint.linears[index], self._checkpoint.weights(index)
        keys = {linear.key for linear in linears}
        found = {
            name: torch.empty_like(tensor) if name in keys else tensor.clone() if tensor.is_inference() else tensor
            for name, tensor in weights.items()
        }
        for linear, sparsity in zip(linears, sparsities, strict=True):
            matrix = linear.matrix(weights[linear.key])
            kept = self._places(index, linear, matrix) >= int(matrix.shape[1] * sparsity)
            linear.matrix(found[linear.key]).copy_(torch.where(kept, matrix, 0))
        return found
