"""Prices of bits: what it costs to round each linear to each number of bits, by the gradient of the dense model.

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

import torch
from torch import Tensor

from atp_tune.blocks.gradients import BlockGradients, Sample, check_finite
from atp_tune.inputs import Batch

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
