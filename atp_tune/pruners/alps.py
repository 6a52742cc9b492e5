"""ALPS: minimises the layer-wise error, by ADMM for the mask, then by conjugate gradients for the kept weights.

W weight [out, in], H = XᵀX (up to a factor) with `damping` · mean(diag H) added to its diagonal. In the scaled
coordinates W̃_ij = W_ij d_j and H̃_jk = H_jk / (d_j d_k) with d_j = √H_jj the problem

    min ½ tr (B - W̃) H̃ (B - W̃)ᵀ + ∞ · [D has too few zeros]    such that B = D

is split (V the dual, ρ the penalty):

    B ← (W̃H̃ - V + ρD) (H̃ + ρI)⁻¹        D ← P(B + V/ρ)        V ← V + ρ(B - D)

where P zeroes the ⌊out·in·s⌋ smallest entries of the matrix, or the ⌊M·s⌋ smallest of each group of M inputs of a
row. Every 3 iterations ρ is multiplied by 1.3, 1.2 or 1.1 if more than 10 %, more than 0.5 % or fewer of the kept
entries changed. Until one of the first two cases occurs, ρ is too large: it is divided by 5, and D and V start
again if the mask changed. ADMM ends when the mask does not change, or after 30 iterations when less than 0.03 %
changes. Then `steps` of conjugate gradients refine P(B) on its mask, for all rows at once; the scaling is the
preconditioner diag H.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
NeurIPS 2024, algorithms 1 and 2, and the authors' code for ρ and the scaling. Differences: the number of zeros is
rounded down (theirs: to the nearest); the inverse comes from a Cholesky factorisation in float32 for each ρ
(theirs: from a spectrum in float64, computed once, which takes as long as a dozen of them); conjugate gradients
always run all steps (theirs have a tolerance, which is rarely met since the residual includes pruned entries);
theirs returns the start if the last iteration starts again.
"""

from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.pruners import Measures, Statistics, Unprepared
from atp_tune.pruners.refinement import refine
from atp_tune.pruners.selection import lowest_in_matrix, zeroed
from atp_tune.pruners.settings import ALPSSettings
from atp_tune.pruners.statistics import Hessian, Scaled

CHECK, SETTLED = 3, 30  # iterations between checks of the mask, and before a small change counts as none
LARGEST = 1e6  # upper bound of ρ


class ALPS(ALPSSettings, Unprepared):
    """Zeroes weights and updates the others; computes in float32, returns the dtype of the weight."""

    group: int | None = None

    measures: ClassVar[Measures] = Hessian

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are the `Hessian` of its inputs."""
        assert isinstance(statistics, Hessian)
        scaled = statistics.scaled(self.damping)
        W = weight.float() * scaled.scales
        mask = self._smallest(W, sparsity)
        if mask.all() or not mask.any():
            return zeroed(weight, mask)
        B = self._admm(W, scaled, sparsity, mask)
        mask = self._smallest(B, sparsity)
        B = refine(zeroed(B, mask), mask, W, scaled.matrix, self.steps)
        return (B / scaled.scales).to(weight.dtype)

    def _smallest(self, B: Tensor, sparsity: float) -> Tensor:
        return lowest_in_matrix(B.abs(), sparsity, self.group)

    def _admm(self, W: Tensor, scaled: Scaled, sparsity: float, first: Tensor) -> Tensor:
        """The last iterate B [out, in]; `first`: the mask of the smallest entries of W."""
        target, rho, inverse = W @ scaled.matrix, self.rho, scaled.inverse(self.rho)
        last, kept, begun = first, int((~first).sum()), False
        B, D, V = W, zeroed(W, first), torch.zeros_like(W)
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
            # The factor for ρ, from the share of kept entries that changed.
            share = changed / kept
            factor = 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1 if begun else 0.2
            begun = begun or factor > 1
            if changed and not begun:
                D, V = zeroed(W, first), torch.zeros_like(W)
            rho = min(rho * factor, LARGEST)
            inverse = scaled.inverse(rho)
        return B
