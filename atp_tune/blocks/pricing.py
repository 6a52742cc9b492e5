"""Prices of linears: what one further pruned weight of each costs, by the gradient of the loss at the pruned model.

    Ŵ_l(k)   what the pruner makes of the dense weight W of linear l at level k of its sparsity (`blocks.levels`)
    G        d loss / d Ŵ_l(k) of the pruned model, also where a weight is zero
    p_l      ⟨G, Ŵ_l(k⁺) - Ŵ_l(k⁻)⟩ / (number of weights that k⁺ zeroes and k⁻ does not)         nats per weight

k⁻ and k⁺ are the levels 0.06 below and above that of the linear's sparsity. Where a pruner changes no weight that it
keeps, such as Wanda, the price is the mean of - G_ij W_ij over the weights that go next and those that went last: to
zero one changes the loss by about that.

`blocks.gradients` has the gradients, of one block at a time.

G_ij W_ij is the sensitivity of SNIP (Lee et al., ICLR 2019), which takes it at the dense model and of single weights.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from atp_tune.blocks.gradients import BlockGradients, Sample, check_finite
from atp_tune.blocks.levels import Levels
from atp_tune.checkpoints.linears import Linear


class Pricing:
    """Measures the prices of all linears of a dense checkpoint, pruned to given sparsities."""

    def __init__(self, gradients: BlockGradients, levels: Levels) -> None:
        self._gradients = gradients
        self._levels = levels

    def prices(self, sparsities: Sequence[Sequence[float]], sample: Sample) -> tuple[tuple[float, ...], ...]:
        """Price of each linear of each block in nats per weight, for the mean loss of the sample."""
        checkpoint, rows = self._gradients.checkpoint, dict[int, Tensor]()
        shares = [
            {linear.name: s for linear, s in zip(linears, row, strict=True)}
            for linears, row in zip(checkpoint.linears, sparsities, strict=True)
        ]

        def pruned(index: int, linear: Linear, weight: Tensor) -> Tensor:
            _, level, _ = self._levels.around(weight.shape[1], shares[index][linear.name])
            return self._levels.pruned(index, linear, weight, level)

        def price(index: int, total: Mapping[str, Tensor]) -> None:
            dense = checkpoint.weights(index)
            rows[index] = torch.stack([
                self._price(index, linear, s, linear.matrix(dense[linear.key]), linear.matrix(total[linear.key]))
                for linear, s in zip(checkpoint.linears[index], sparsities[index], strict=True)
            ])  # fmt: skip

        self._gradients.visit(sample, pruned, price)
        found = tuple(tuple(rows[index].tolist()) for index in range(len(rows)))
        check_finite(chain.from_iterable(found), "prices")
        return found

    def state(self) -> dict[str, Tensor]:
        """Nothing: prices depend on sparsities and sample alone."""
        return {}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state."""

    def _price(self, index: int, linear: Linear, sparsity: float, weight: Tensor, gradient: Tensor) -> Tensor:
        columns = weight.shape[1]
        low, _, high = self._levels.around(columns, sparsity)
        before, after = (self._levels.pruned(index, linear, weight, level).float() for level in (low, high))
        zeroed = weight.numel() * (high - low) / self._levels.number(columns)
        return (gradient * (after - before)).sum() / max(1, zeroed)  # none where all weights of few are zero
