"""Prices of linears: what one further pruned weight of each costs, by the gradient of the loss at the pruned model.

    place_ij    place of a weight's score in its row, from 0 for the lowest; scores as in Wanda or by magnitude
    k_l         ⌊in_l s_l⌋; the weights of linear l with place < k_l are zero
    G           d loss / d W of the pruned model, also where W is zero
    p_l         - mean of G_ij W_ij over the band |place_ij - k_l| < 0.06 in_l            W dense; nats per weight

A weight in the band is the next to go, or the last that went. To zero it changes the loss by about -G_ij W_ij.

`blocks.gradients` has the gradients, of one block at a time.

G_ij W_ij is the sensitivity of SNIP (Lee et al., ICLR 2019), which takes it at the dense model and of single weights.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from atp_tune.blocks.gradients import BlockGradients
from atp_tune.checkpoints.linears import Linear
from atp_tune.inputs import Batch

BAND = 0.06  # half width of the band, as a share of the inputs

Places = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and matrix [out, in] of its weights


class Pricing:
    """Measures the prices of all linears of a dense checkpoint, pruned to given sparsities.

    `places`: places [out, in] of a linear's scores in their rows.
    """

    def __init__(self, gradients: BlockGradients, places: Places) -> None:
        self._gradients = gradients
        self._places = places

    def prices(self, sparsities: Sequence[Sequence[float]], items: Batch) -> tuple[tuple[float, ...], ...]:
        """Price of each linear of each block in nats per weight, for the mean loss of the items."""
        checkpoint, rows = self._gradients.checkpoint, dict[int, Tensor]()
        shares = [
            {linear.name: s for linear, s in zip(linears, row, strict=True)}
            for linears, row in zip(checkpoint.linears, sparsities, strict=True)
        ]

        def pruned(index: int, linear: Linear, weight: Tensor) -> Tensor:
            kept = self._places(index, linear, weight) >= int(weight.shape[1] * shares[index][linear.name])
            return torch.where(kept, weight, 0)

        def price(index: int, total: Mapping[str, Tensor]) -> None:
            dense = checkpoint.weights(index)
            rows[index] = torch.stack([
                self._price(index, linear, s, linear.matrix(dense[linear.key]), linear.matrix(total[linear.key]))
                for linear, s in zip(checkpoint.linears[index], sparsities[index], strict=True)
            ])  # fmt: skip

        self._gradients.visit(items, pruned, price)
        return tuple(tuple(rows[index].tolist()) for index in range(len(rows)))

    def _price(self, index: int, linear: Linear, sparsity: float, weight: Tensor, gradient: Tensor) -> Tensor:
        columns = weight.shape[1]
        zeros, reach = int(columns * sparsity), max(1, int(BAND * columns))
        distance = self._places(index, linear, weight).int() - zeros
        costs = torch.where(distance.abs() < reach, gradient * weight.float(), 0)
        inside = min(zeros + reach, columns) - max(zeros - reach + 1, 0)  # places of a row in the band
        return -costs.sum() / max(1, inside * weight.shape[0])  # none is inside where all weights of few are zero
