"""Prices of linears: what one further pruned weight of each costs, by the gradient of the loss at the pruned model.

    Ŵ_l(k)   what the pruner makes of the dense weight W of linear l at level k of its sparsity
    G        d loss / d Ŵ_l(k) of the pruned model, also where a weight is zero
    p_l      ⟨G, Ŵ_l(k⁺) - Ŵ_l(k⁻)⟩ / (number of weights that k⁺ zeroes and k⁻ does not)         nats per weight

k⁻ and k⁺ are the levels 0.06 below and above that of the linear's sparsity. Where a pruner changes no weight that it
keeps, such as Wanda, the price is the mean of - G_ij W_ij over the weights that go next and those that went last: to
zero one changes the loss by about that.

`blocks.gradients` has the gradients, of one block at a time.

G_ij W_ij is the sensitivity of SNIP (Lee et al., ICLR 2019), which takes it at the dense model and of single weights.

Levels of sparsity: level k of n zeroes the share k / n of a linear's weights. Masks by place have a level for each
weight of a row. What a pruner makes that changes kept weights too is made anew for each level, so that it has few, and
they are kept.

Where each row has a number of zeros of its own (see `allocations.row_prices`):

    k_r = n (s + d_r), rounded    zeros of row r of a linear with n inputs and the sparsity s
    p_r   mean of - G_ij W_ij over the weights of the row whose place in the order of scores is less than 0.06 n from
          k_r: what one further pruned weight costs, in nats
    p     the same over all rows of the linear: its price

Prices of bits, what it costs to round each linear to each number of bits, by the gradient of the dense model.

    E_l(b)    Ŵ_l(b) - W_l, the error of linear l rounded to nearest with b bits
    G_w       d loss / d W_l of item w, a window or an image
    C_l(b)    mean over w of (Σ_ij G_w,ij E_l,ij(b))²

That is the second-order term of the loss, but for one factor that all linears share: EᵀHE with the empirical Fisher
matrix in the place of the Hessian H, in full and not only its diagonal, so that errors of one row that cancel each
other cost little. The first-order term is left out: in a trained model its mean is near 0.

Source: the Fisher matrix for the Hessian as in Hassibi and Stork, "Second order derivatives for network pruning:
Optimal Brain Surgeon", NIPS 1992; a sum of such costs over layers as in Dong et al., "HAWQ-V2", NeurIPS 2020, which
has the Hessian's trace times the squared error.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from atp_tune.allocations.prices import KEPT, LARGEST
from atp_tune.allocations.row_prices import DISTANCE
from atp_tune.allocations.rows import RowOffsets
from atp_tune.blocks.gradients import BlockGradients, Sample, check_finite
from atp_tune.blocks.prune_pass import BlockStatistics, unmeasured
from atp_tune.checkpoints.blocks import Linear
from atp_tune.inputs import Batch
from atp_tune.pruners import Pruner
from atp_tune.pruners.selection import zeroed

BAND = 0.06  # a price is measured between the sparsities so far below and above that of the linear
GRID = 32  # levels of a pruner's own weights

Places = Callable[[int, Linear, Tensor], Tensor]  # by block, linear, and matrix [out, in] of its weights


class Levels(Protocol):
    """The levels of the linears of a dense checkpoint."""

    def number(self, columns: int) -> int:
        """The level of sparsity 1, for a linear of so many inputs."""

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The level of a sparsity, between the two that a price is measured between: below, at, above."""

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """The weight [out, in] of a linear of block `index`, from the dense one, at a level."""


class ByPlaces:
    """Masks of the lowest scores of each row; `places`: places [out, in] of a linear's scores in their rows."""

    def __init__(self, places: Places) -> None:
        self._places = places

    def number(self, columns: int) -> int:
        """One for each weight of a row."""
        return columns

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """Weights whose place is less than `BAND` of the inputs away from the number of zeros are between them."""
        zeros, reach = int(columns * sparsity), max(1, int(BAND * columns))
        return max(zeros - reach + 1, 0), zeros, min(zeros + reach, columns)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """The weights of a lower place are zero."""
        return zeroed(weight, self._places(index, linear, weight) < level)


class ByPruner:
    """What a pruner makes of the dense weights; `statistics`: of a block's inputs in the dense model, prepared.

    In a pattern a level is one more zero in each group. The weights of levels are kept in host memory, up to `room`
    bytes; those that were asked for last stay.
    """

    def __init__(self, pruner: Pruner, statistics: Callable[[int], BlockStatistics], room: int) -> None:
        self._pruner = pruner
        self._statistics = statistics
        self._group: int | None = getattr(pruner, "group", None)
        self._free = room
        self._kept: dict[tuple[int, str, int], Tensor] = {}  # the one that was asked for last is the last

    def number(self, columns: int) -> int:
        """As many as a group has weights, or `GRID`."""
        return self._group or GRID

    def around(self, columns: int, sparsity: float) -> tuple[int, int, int]:
        """The nearest level, and those `BAND` away from it."""
        number = self.number(columns)
        level, reach = round(number * sparsity), max(1, round(BAND * number))
        return max(level - reach, 0), level, min(level + reach, number)

    def pruned(self, index: int, linear: Linear, weight: Tensor, level: int) -> Tensor:
        """By the pruner; an expert without tokens by magnitude."""
        key = index, linear.name, level
        found = self._kept.pop(key, None)
        if found is None:
            known = self._statistics(index).get(linear.name) if self._pruner.measures else None
            lacks = self._pruner.measures is not None and known is None
            pruner = unmeasured(self._pruner) if lacks else self._pruner
            found = pruner.prune(weight, level / self.number(weight.shape[1]), known).contiguous()
            self._free -= found.nbytes
        self._kept[key] = found.cpu()
        while self._free < 0:
            self._free += self._kept.pop(next(iter(self._kept))).nbytes
        return found.to(weight.device)


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


Rounded = Callable[[Tensor, int], Tensor]  # a weight [out, in] at so many bits
Costs = tuple[tuple[tuple[float, ...], ...], ...]  # by block, linear, and width


class BitPricing:
    """Measures what each linear of a dense checkpoint costs at each of `widths`.

    The weights of one block are kept at all widths.
    """

    def __init__(self, gradients: BlockGradients, rounded: Rounded, widths: Sequence[int]) -> None:
        self._gradients = gradients
        self._rounded = rounded
        self._widths = widths

    def costs(self, items: Batch, done: Callable[[int], None] = lambda blocks: None) -> Costs:
        """The cost of each linear of each block at each width; comparable with each other alone.

        `done` gets the number of blocks that are measured.
        """
        checkpoint = self._gradients.checkpoint
        errors: dict[int, list[Tensor]] = {}  # of the linears of one block, each [widths, weights]
        none = torch.zeros(len(self._widths), dtype=torch.float64)
        total = [[none] * len(linears) for linears in checkpoint.linears]

        def errors_of(index: int) -> list[Tensor]:
            if index not in errors:
                errors.clear()
                weights = checkpoint.weights(index)
                errors[index] = [self._errors(x.matrix(weights[x.key])) for x in checkpoint.linears[index]]
                done(len(total) - index)
            return errors[index]

        def add(index: int, gradients: Mapping[str, Tensor]) -> None:
            for k, (linear, error) in enumerate(zip(checkpoint.linears[index], errors_of(index), strict=True)):
                slopes = error @ linear.matrix(gradients[linear.key]).flatten()
                total[index][k] = total[index][k] + slopes.cpu().double() ** 2 / len(items)

        self._gradients.visit(Sample(items), lambda index, linear, weight: weight, add, each=True)
        check_finite((float(row.sum()) for block in total for row in block), "prices of bits")
        return tuple(tuple(tuple(row.tolist()) for row in block) for block in total)

    def _errors(self, weight: Tensor) -> Tensor:
        """Errors [widths, out · in] of a weight, float32."""
        return torch.stack([(self._rounded(weight, bits) - weight).float().flatten() for bits in self._widths])
