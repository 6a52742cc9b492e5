"""ALPS: the best mask and weights for the layer-wise error, by ADMM, then by conjugate gradients on that mask.

W weight [out, in], H = XᵀX (up to a factor) with `damping` · mean(diag H) on its diagonal; all is computed in scaled
coordinates, W̃_ij = W_ij d_j and H̃_jk = H_jk / (d_j d_k) with d_j = √H_jj. The problem

    min ½ tr (B - W̃) H̃ (B - W̃)ᵀ + ∞ · [D has fewer zeros than asked]    such that B = D

is split (V the dual, ρ the penalty):

    B ← (W̃H̃ - V + ρD) (H̃ + ρI)⁻¹        D ← P(B + V/ρ)        V ← V + ρ(B - D)

where P zeroes the ⌊out·in·s⌋ smallest entries of the matrix, or the ⌊M·s⌋ smallest of each group of M inputs of a row.
Every 3 iterations ρ grows by 1.3, 1.2 or 1.1 where more than 10 %, more than 0.5 % or any of the kept entries changed
place. Until one of the first two happens ρ is too large and shrinks to a fifth, from a new start if anything changed.
The end is a mask that does not change, or hardly (0.03 %) after 30 iterations. P(B) is refined on its mask by `steps`
of conjugate gradients, for all rows at once, preconditioned by diag H, which the scaling amounts to.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithms 1 and 2, and the authors' code for ρ and the scaling. Here differs: the number of zeros is rounded
down, theirs to the nearest; the inverse is made from the spectrum in float32, theirs in float64; the gradients run
their steps (their residual counts pruned entries too, so that their tolerance is hardly ever met); theirs gives back
its start where the last iteration of all asked for a new one.
"""

from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.pruners.selection import lowest_in_matrix, zeroed
from atp_tune.pruners.settings import ALPSSettings
from atp_tune.pruners.statistics import Hessian, Scaled

CHECK, SETTLED = 3, 30  # iterations between looks at the mask, and before hardly any change is none
LARGEST = 1e6  # ρ


class ALPS(ALPSSettings):
    """Zeroes weights and updates those that stay; float32 inside, the weight's dtype outside."""

    group: int | None = None

    measures: ClassVar[type[Statistics] | None] = Hessian

    def prepare(self, statistics: Statistics) -> None:
        """Nothing."""

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `Hessian`."""
        assert isinstance(statistics, Hessian)
        scaled = statistics.scaled(self.damping)
        W = weight.float() * scaled.scales
        mask = self._smallest(W, sparsity)
        if mask.all() or not mask.any():
            return zeroed(weight, mask)
        B = self._admm(W, scaled, sparsity)
        mask = self._smallest(B, sparsity)
        B = _refine(zeroed(B, mask), mask, W, scaled.matrix, self.steps)
        return (B / scaled.scales).to(weight.dtype)

    def _smallest(self, B: Tensor, sparsity: float) -> Tensor:
        return lowest_in_matrix(B.abs(), sparsity, self.group)

    def _admm(self, W: Tensor, scaled: Scaled, sparsity: float) -> Tensor:
        """B [out, in], the last iterate."""
        target, rho, inverse = W @ scaled.matrix, self.rho, scaled.inverse(self.rho)
        last = self._smallest(W, sparsity)
        kept, begun = int((~last).sum()), False
        B, D, V = W, zeroed(W, last), torch.zeros_like(W)
        for i in range(1, self.iterations + 1):
            B = (target - V + rho * D) @ inverse
            sums = B + V / rho
            mask = self._smallest(sums, sparsity)
            D = zeroed(sums, mask)
            V = rho * (sums - D)
            if i % CHECK:
                continue
            changed, last = int((mask != last).sum()), mask
            if (begun and not changed) or (i > SETTLED and changed < 0.0003 * kept):
                break
            factor = _growth(changed / kept, begun)
            begun = begun or factor > 1
            if changed and not begun:
                D, V = zeroed(W, self._smallest(W, sparsity)), torch.zeros_like(W)
            rho = min(rho * factor, LARGEST)
            inverse = scaled.inverse(rho)
        return B


def _growth(changed: float, begun: bool) -> float:
    """The factor of ρ, by the share of the kept entries that changed place."""
    if changed > 0.1:
        return 1.3
    if changed > 0.005:
        return 1.2
    return 1.1 if begun else 0.2


def _refine(B: Tensor, mask: Tensor, W: Tensor, H: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on (B - W) H = 0 with B [out, in] zero in the mask; each row has its own step sizes."""
    residual = ((W - B) @ H).masked_fill_(mask, 0)
    direction, squares = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = direction @ H
        step = _ratio(squares, (direction * curved).sum(1, keepdim=True))
        B = B + step * direction
        residual = (residual - step * curved).masked_fill_(mask, 0)
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction = residual + _ratio(squares, before) * direction
    return B


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0)
