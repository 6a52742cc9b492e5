"""DSnoT: swaps pruned and kept weights until the mean error of each output is small; kept weights are not changed.

W weight [out, in], X inputs [tokens, in], μ and σ² their means and variances [in]. The contribution of an input to an
output, summed over T = 2048 tokens, and the error of a row are

    e_ij = T · W_ij μ_j        ε_i = Σ e_ij over the pruned weights of row i

The initial mask zeroes ⌊in·s⌋ weights of each row, by Wanda's score |W_ij| ‖X_j‖₂ or by magnitude. Then, at most
`cycles` times, in each row with |ε_i| > `threshold`:

    grow    the pruned weight with e_ij of the sign of ε_i and the largest |e_ij| / (σ²_j)^`power`
    prune   the kept weight with e_ij of the other sign and the lowest Wanda score
    ε_i ← ε_i + e_i(pruned) - e_i(grown)

Each weight moves at most once. In groups of M inputs the kept weight to prune is that with the lowest initial
score, of either sign, in the group of the weight that grows, and a row stops before ε_i changes sign.

Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, section 3,
and the authors' code for groups and defaults. Differences: a row without candidates stops (theirs goes on with
weights that were swapped or never pruned); an input with μ_j = 0 is never swapped (theirs divides by its variance);
the variance is over all tokens, not a mean over windows; T is fixed (theirs is the window length, 2048); ties are
broken by position. By default (`skip_layer`) theirs keeps the initial mask in the MLP; here all linears are
refined, since a pruner does not know the place of its linear.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from atp_tune.pruners import Measures, Statistics, Unprepared
from atp_tune.pruners.selection import lowest_in_rows, zeroed
from atp_tune.pruners.settings import DSnoTSettings
from atp_tune.pruners.statistics import InputMoments

TOKENS = 2048


class Swaps(NamedTuple):
    """The next K swaps of each row while its error has one sign. Swaps for the other sign use other weights (except in
    groups, where the sign never changes).
    """

    grow: Tensor  # [out, K] columns
    prune: Tensor  # [out, K] columns
    change: Tensor  # [out, K] change of ε
    possible: Tensor  # [out, K] whether the swap exists


class DSnoT(DSnoTSettings, Unprepared):
    """Refines an initial mask; the number of zeros per row (or group) stays the same."""

    group: int | None = None

    measures: ClassVar[Measures] = InputMoments

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are `InputMoments` of its inputs."""
        assert isinstance(statistics, InputMoments)
        W = weight.float()
        scores = W.abs() * statistics.norms()
        initial = scores if self.initial == "wanda" else W.abs()
        gone = lowest_in_rows(initial, sparsity, self.group)
        effects = W * (TOKENS * statistics.means())
        worth = effects.abs() / statistics.variances() ** self.power
        order = scores if self.group is None else initial
        sides = [self._swaps(sign * effects, worth, order, gone) for sign in (-1, 1)]
        # Applies the swaps that reduce the error [out] to the mask `gone`.
        error = (effects * gone).sum(1)
        rows = torch.arange(len(gone), device=gone.device)
        grow, prune, change, possible = (torch.stack(part) for part in zip(*sides, strict=True))
        change[0] = -change[0]
        used, first = torch.zeros(2, len(gone), dtype=torch.long, device=gone.device), error.sign()
        swaps, alive = torch.zeros_like(possible), torch.ones_like(first, dtype=torch.bool)
        for _ in range(grow.shape[2]):
            alive = alive & (error.abs() > self.threshold)
            side = (error > 0).long()
            here = (side, rows, used[side, rows])
            after = error + change[here]
            if self.group is not None:
                alive = alive & ((after.sign() == first) | ~possible[here])
            swaps[here] = alive & possible[here]
            error = torch.where(swaps[here], after, error)
            used[side, rows] += 1
        side, row, step = swaps.nonzero(as_tuple=True)
        gone[row, grow[side, row, step]] = False
        gone[row, prune[side, row, step]] = True
        return zeroed(weight, gone)

    def _swaps(self, effects: Tensor, worth: Tensor, scores: Tensor, gone: Tensor) -> Swaps:
        """The swaps for an error > 0; with negated effects, those for an error < 0."""
        count = min(self.cycles, gone.shape[1])
        grow, grows = _queue(-worth, gone & (effects > 0), count)
        if self.group is None:
            prune, prunes = _queue(scores, ~gone & (effects < 0), count)
        else:
            # For each weight that grows [out, K], the kept weight of its group to prune: the lowest score not yet
            # taken.
            rows, columns = scores.shape
            padding = (0, -columns % self.group)
            padded = torch.nn.functional.pad(scores.masked_fill(gone, torch.inf), padding, value=torch.inf)
            order = padded.reshape(rows, -1, self.group).argsort(dim=2, stable=True)
            kept = torch.nn.functional.pad(~gone, padding).reshape(rows, -1, self.group).sum(2)
            home = grow // self.group
            earlier = (
                (home[:, :, None] == home[:, None, :]).tril(-1).sum(2)
            )  # [out, K] earlier weights in the same group
            offset = order[torch.arange(rows, device=scores.device)[:, None], home, earlier.clamp(max=self.group - 1)]
            prune, prunes = (home * self.group + offset).clamp(max=columns - 1), earlier < kept.gather(1, home)
        return Swaps(grow, prune, effects.gather(1, prune) - effects.gather(1, grow), grows & prunes)


def _queue(scores: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns [out, count] of the candidates in each row, lowest score first, and whether each entry exists."""
    order = scores.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)[:, :count]
    return order, torch.arange(count, device=scores.device) < candidates.sum(1, keepdim=True)
