"""DSnoT: swap pruned weights for kept ones until each output's mean error is gone; no weight is changed.

W weight [out, in], X inputs [tokens, in], μ and σ² their means and variances [in]. An input adds to an output, summed
over T = 2048 tokens,

    e_ij = T · W_ij μ_j        ε_i = Σ e_ij over the pruned weights of row i

and ε_i is what the row lacks. The initial mask takes ⌊in·s⌋ weights of each row, by Wanda's score |W_ij| ‖X_j‖₂ or by
magnitude. Then at most `cycles` times, in each row where |ε_i| > `threshold`:

    grow    the pruned weight with e_ij of the sign of ε_i and the largest |e_ij| / (σ²_j)^`power`
    prune   the kept weight with e_ij of the other sign and the lowest score of Wanda
    ε_i ← ε_i + e_i(pruned) - e_i(grown)

A weight is moved once at most. In groups of M inputs the weight to prune is the lowest of the initial score in the
group of the one that grows, of whatever sign, and a row ends where ε_i would change its sign.

Source: Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, section 3, and
the authors' code for groups and the defaults. Here differs: a row without candidates ends, where theirs goes on with
weights that were swapped, or were never pruned, and loses count; an input with μ_j = 0 moves nothing (theirs divides by
its variance); the variance is of all tokens, not the mean over windows of the variance within one; T is fixed, theirs
is the length of a window, 2048; ties go by position. Theirs leaves the MLP at the initial mask by default
(`skip_layer`); a pruner here does not know where its linear is, and refines every one.
"""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from atp_tune.pruners import Statistics
from atp_tune.pruners.selection import lowest_in_rows, zeroed
from atp_tune.pruners.settings import DSnoTSettings
from atp_tune.pruners.statistics import InputMoments

TOKENS = 2048


class Swaps(NamedTuple):
    """The K swaps that a row would make while its error has one sign, in their order; those of the other sign don't
    touch their weights (in groups they might, but there the sign never changes).
    """

    grow: Tensor  # [out, K] columns
    prune: Tensor  # [out, K] columns
    change: Tensor  # [out, K] of ε
    possible: Tensor  # [out, K] whether there is such a swap


class DSnoT(DSnoTSettings):
    """Zeroes as many weights in each row as its initial mask does."""

    group: int | None = None

    measures: ClassVar[type[Statistics] | None] = InputMoments

    def prepare(self, statistics: Statistics) -> None:
        """Nothing."""

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """Pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are its `InputMoments`."""
        assert isinstance(statistics, InputMoments)
        W = weight.float()
        scores = W.abs() * statistics.norms()
        initial = scores if self.initial == "wanda" else W.abs()
        gone = lowest_in_rows(initial, sparsity, self.group)
        effects = W * (TOKENS * statistics.means())
        worth = effects.abs() / statistics.variances() ** self.power
        order = scores if self.group is None else initial
        sides = [self._swaps(sign * effects, worth, order, gone) for sign in (-1, 1)]
        self._follow((effects * gone).sum(1), sides, gone)
        return zeroed(weight, gone)

    def _swaps(self, effects: Tensor, worth: Tensor, scores: Tensor, gone: Tensor) -> Swaps:
        """Swaps for an error > 0; with the signs of the effects turned around, those for an error < 0."""
        count = min(self.cycles, gone.shape[1])
        grow, grows = _queue(-worth, gone & (effects > 0), count)
        if self.group is None:
            prune, prunes = _queue(scores, ~gone & (effects < 0), count)
        else:
            prune, prunes = _partners(scores, gone, grow, self.group)
        return Swaps(grow, prune, effects.gather(1, prune) - effects.gather(1, grow), grows & prunes)

    def _follow(self, error: Tensor, sides: list[Swaps], gone: Tensor) -> None:
        """Makes the swaps that the error [out] asks for, in the mask `gone`."""
        rows, steps = torch.arange(len(gone), device=gone.device), sides[0].grow.shape[1]
        grow, prune, change, possible = (torch.stack(part) for part in zip(*sides, strict=True))
        change[0] = -change[0]
        used, first = torch.zeros(2, len(gone), dtype=torch.long, device=gone.device), error.sign()
        made, alive = torch.zeros_like(possible), torch.ones_like(first, dtype=torch.bool)
        for _ in range(steps):
            alive = alive & (error.abs() > self.threshold)
            side = (error > 0).long()
            here = (side, rows, used[side, rows])
            after = error + change[here]
            if self.group is not None:
                alive = alive & ((after.sign() == first) | ~possible[here])
            made[here] = alive & possible[here]
            error = torch.where(made[here], after, error)
            used[side, rows] += 1
        for k in range(2):
            row, step = made[k].nonzero(as_tuple=True)
            gone[row, grow[k, row, step]] = False
            gone[row, prune[k, row, step]] = True


def _queue(scores: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Columns [out, count] of each row's candidates, lowest score first, and whether there are so many."""
    order = scores.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)[:, :count]
    return order, torch.arange(count, device=scores.device) < candidates.sum(1, keepdim=True)


def _partners(scores: Tensor, gone: Tensor, grow: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """For each weight that grows [out, K] the kept one of its group to prune: the lowest that no earlier one took."""
    rows, columns = scores.shape
    padding = (0, -columns % group)
    padded = torch.nn.functional.pad(scores.masked_fill(gone, torch.inf), padding, value=torch.inf)
    order = padded.reshape(rows, -1, group).argsort(dim=2, stable=True)
    kept = torch.nn.functional.pad(~gone, padding).reshape(rows, -1, group).sum(2)
    home = grow // group
    earlier = (home[:, :, None] == home[:, None, :]).tril(-1).sum(2)  # [out, K] that took one of the same group
    place = order[torch.arange(rows, device=scores.device)[:, None], home, earlier.clamp(max=group - 1)]
    return (home * group + place).clamp(max=columns - 1), earlier < kept.gather(1, home)
