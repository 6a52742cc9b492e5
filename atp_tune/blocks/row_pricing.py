"""Prices of linears and of their rows, where each row has a number of zeros of its own: see `allocations.row_prices`.

k_r = n (s + d_r), rounded                            zeros of row r of a linear with n inputs and the sparsity s
p_r   mean of - G_ij W_ij over the weights of the row whose place in the order of scores is less than 0.06 n from
k_r: what one further pruned weight costs, in nats
p     the same over all rows of the linear: its price
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from atp_tune.allocations.prices import KEPT, LARGEST
from atp_tune.allocations.row_prices import DISTANCE
from atp_tune.allocations.rows import RowOffsets
from atp_tune.blocks.gradients import BlockGradients, Sample, check_finite
from atp_tune.blocks.levels import BAND, Places
from atp_tune.checkpoints.linears import Linear
from atp_tune.pruners.selection import zeroed

Key = tuple[int, str]  # of a linear: its block and its name


class RowPricing:
    """Measures prices of all linears, pruned by the lowest scores of their rows, and moves the rows by their own.

    `places`: places [out, in] of a linear's scores in their rows.
    """

    def __init__(self, gradients: BlockGradients, places: Places) -> None:
        self._gradients = gradients
        self._places = places
        linears = gradients.checkpoint.linears
        keys = {(index, x.name): x.out_features for index, block in enumerate(linears) for x in block}
        self._offsets = {key: torch.zeros(rows) for key, rows in keys.items()}  # shares of the inputs
        self._smooth = {key: torch.zeros(rows) for key, rows in keys.items()}

    def prices(self, sparsities: Sequence[Sequence[float]], sample: Sample) -> tuple[tuple[float, ...], ...]:
        """Price of each linear of each block in nats per weight, for the mean loss of the sample; then rows move."""
        checkpoint, found = self._gradients.checkpoint, dict[Key, tuple[float, Tensor]]()
        shares = {
            (index, linear.name): s
            for index, (linears, row) in enumerate(zip(checkpoint.linears, sparsities, strict=True))
            for linear, s in zip(linears, row, strict=True)
        }

        def pruned(index: int, linear: Linear, weight: Tensor) -> Tensor:
            places = self._places(index, linear, weight)
            return zeroed(weight, self._up_to((index, linear.name), places, shares[index, linear.name]))

        def price(index: int, total: Mapping[str, Tensor]) -> None:
            dense = checkpoint.weights(index)
            for linear in checkpoint.linears[index]:
                key, weight = (index, linear.name), linear.matrix(dense[linear.key])
                near = self._near(key, self._places(index, linear, weight), shares[key])
                costs = -(linear.matrix(total[linear.key]) * zeroed(weight, ~near).float()).sum(1)
                number = near.sum(1)
                mean = costs.sum() / number.sum().clamp(min=1)
                found[key] = float(mean), torch.where(number > 0, costs / number.clamp(min=1), mean).cpu()

        self._gradients.visit(sample, pruned, price)
        check_finite((float(rows.sum()) for _, rows in found.values()), "prices of rows")
        for key, (_, rows) in found.items():
            self._move(key, rows)
        return tuple(
            tuple(found[index, linear.name][0] for linear in linears)
            for index, linears in enumerate(checkpoint.linears)
        )

    def offsets(self) -> RowOffsets:
        """The offsets that the rows have reached."""
        linears = self._gradients.checkpoint.linears
        return RowOffsets.of(
            [[self._offsets[index, x.name].numpy() for x in block] for index, block in enumerate(linears)]
        )

    def state(self) -> dict[str, Tensor]:
        """Offsets of all rows and moving means of their prices, each [rows], one linear after the other."""
        return {"offsets": torch.cat([*self._offsets.values()]), "smooth": torch.cat([*self._smooth.values()])}

    def resume(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state."""
        rows = [len(row) for row in self._offsets.values()]
        self._offsets = dict(zip(self._offsets, torch.split(state["offsets"], rows), strict=True))
        self._smooth = dict(zip(self._smooth, torch.split(state["smooth"], rows), strict=True))

    def _up_to(self, key: Key, places: Tensor, sparsity: float, further: int = 0) -> Tensor:
        """Which weights [out, in] have a place below the number of zeros of their row, and this much further."""
        columns = places.shape[1]
        zeros = (columns * (sparsity + self._offsets[key])).round().clamp(0, columns)
        last = (zeros + further - 1).clamp(-1, columns - 1)  # fits the small format of places, which is compared fast
        return places <= last.to(places.device, places.dtype)[:, None]

    def _near(self, key: Key, places: Tensor, sparsity: float) -> Tensor:
        """Which weights go next or went last, [out, in]: as `ByPlaces.around`, row by row."""
        reach = max(1, int(BAND * places.shape[1]))
        return self._up_to(key, places, sparsity, reach) & ~self._up_to(key, places, sparsity, 1 - reach)

    def _move(self, key: Key, prices: Tensor) -> None:
        """Moves the rows of a linear by their prices [out]."""
        smooth = self._smooth[key] = KEPT * self._smooth[key] + (1 - KEPT) * prices
        apart = smooth - smooth.mean()
        deviation = apart.square().mean().sqrt()
        if not deviation:
            return
        moved = self._offsets[key] - DISTANCE * (apart / deviation).clamp(-LARGEST, LARGEST)
        self._offsets[key] = moved - moved.mean()
