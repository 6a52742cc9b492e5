"""Refinement: makes the layer-wise error of a pruner's result smaller, by swaps in its mask and new kept weights.

    min_B  tr (B - W) H (B - W)ᵀ    such that B_ij = 0 wherever the mask is

The mask is the pruner's, after the rounds of `swaps`. W weight [out, in], H = XᵀX (up to a factor) with `DAMPING` ·
mean(diag H) added to its diagonal. Conjugate gradients take a few steps from the pruner's own result, for all rows at
once, with the preconditioner diag H: in the scaled coordinates W̃_ij = W_ij d_j and H̃_jk = H_jk / (d_j d_k) with
d_j = √H_jj they need none.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithm 2, which starts at the end of ADMM, and its table 1, which starts at the mask of magnitudes.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from atp_tune.errors import UserError
from atp_tune.pruners import Pruner, Quantizer, Statistics
from atp_tune.pruners.selection import zeroed
from atp_tune.pruners.statistics import Hessian, Several

# --- SparseSwaps: exchanges pruned and kept weights of a row while that makes its layer-wise error smaller.
#
#     L = (B - W) H (B - W)ᵀ = e H eᵀ        e = W where the mask is, else 0; for each row; weights do not change
#     restoring p:  -2 W_p c_p + W_p²        pruning u:  2 W_u c_u + W_u²        c = e H
#     both:  -2 W_p W_u H_pu more
#
# in coordinates in which diag H is 1. Each round takes the `CANDIDATES` pruned weights of a row that are best
# restored and as many kept ones that are best pruned, and pairs those that are each other's best; in a wide row,
# several times, among those that are left. With N:M each group has one pair. All pairs that lower L are exchanged at
# once. They bear on each other too: where L of a row did not fall, the row stays as it was, and exchanges half as
# many pairs from then on, the best ones, until there are none.
#
# Source: Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", 2025, arXiv:2512.10922, which
# exchanges one pair at a time, the best of all.

CANDIDATES = 8  # of each kind in a round, at least: 32 end within 1 % of the same error, and take twice the time
WIDTH = 384  # columns for which pairs are looked for once in a round; measured on rows of 576 and 1,536
NUMBERS = 1 << 22  # in a tensor of the rows that are worked on at once: one a weight, or with N:M M

Pairs = tuple[Tensor, Tensor, Tensor]


def swapped(mask: Tensor, W: Tensor, H: Tensor, rounds: int, group: int | None = None) -> Tensor:
    """A mask [out, in] with as many entries in each row, or group, after at most so many rounds.

    W [out, in] and H [in, in] are float32 and scaled such that diag H is 1 (0 for a dead input without damping).
    """
    size = max(1, NUMBERS // (W.shape[1] * (group or 1)))
    parts = (slice(first, first + size) for first in range(0, len(W), size))
    return torch.cat([_swapped(mask[part], W[part], H, rounds, group) for part in parts])


def _swapped(mask: Tensor, W: Tensor, H: Tensor, rounds: int, group: int | None) -> Tensor:
    pairs = _pairs_in_rows if group is None else partial(_pairs_in_groups, within=_within_groups(H, group))
    change, error = _error(mask, W, H)
    allowed = torch.full((len(W), 1), W.shape[1], device=W.device)
    for _ in range(rounds):
        pruned, kept, gains = pairs(mask, W, H, change)
        order = gains.argsort(1)
        chosen = (gains.gather(1, order) < 0) & (torch.arange(gains.shape[1], device=W.device) < allowed)
        allowed = torch.where(chosen.any(1, keepdim=True), allowed, 0)
        if not chosen.any():
            break
        rows, places = chosen.nonzero(as_tuple=True)
        places = order[rows, places]
        other = mask.clone()
        other[rows, pruned[rows, places]] = False
        other[rows, kept[rows, places]] = True
        new_change, new_error = _error(other, W, H)
        better = new_error < error
        mask, change = torch.where(better, other, mask), torch.where(better, new_change, change)
        error = torch.where(better, new_error, error)
        allowed = torch.where(better, allowed, chosen.sum(1, keepdim=True) // 2)
    return mask


def _error(mask: Tensor, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Returns c [out, in] and L [out, 1]."""
    gone = torch.where(mask, W, 0)
    change = gone @ H
    return change, (gone * change).sum(1, keepdim=True)


def _alone(mask: Tensor, W: Tensor, H: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """The changes of L by restoring each pruned weight, and by pruning each kept one; infinite for others.

    A weight that is 0 is not restored: it would be a zero of the result all the same.
    """
    square, cross = W * W * H.diagonal(), 2 * W * change
    return torch.where(mask & (W != 0), square - cross, torch.inf), torch.where(mask, torch.inf, square + cross)


def _pairs_in_rows(mask: Tensor, W: Tensor, H: Tensor, change: Tensor) -> Pairs:
    """Columns of a pruned and of a kept weight, and what exchanging them adds to L, each [out, pairs]."""
    times = max(1, W.shape[1] // WIDTH)
    count = min(max(CANDIDATES, 2 * times), W.shape[1])
    (restored, p), (pruned, u) = (values.topk(count, largest=False) for values in _alone(mask, W, H, change))
    both = torch.take(H, (p * len(H))[:, :, None] + u[:, None])
    both *= (-2 * W.gather(1, p))[:, :, None] * W.gather(1, u)[:, None]
    both += restored[:, :, None] + pruned[:, None]
    partner, gains = torch.zeros_like(p), torch.full_like(restored, torch.inf)
    places = torch.arange(count, device=W.device)
    for _ in range(times):
        lowest, best = both.min(2)
        mutual = (both.min(1).indices.gather(1, best) == places) & (lowest < 0)
        partner, gains = torch.where(mutual, best, partner), torch.where(mutual, lowest, gains)
        taken = torch.zeros_like(mutual, dtype=torch.int32).scatter_add_(1, best, mutual.int()) > 0
        both.masked_fill_(mutual[:, :, None] | taken[:, None], torch.inf)
    return p, u.gather(1, partner), gains


def _within_groups(H: Tensor, group: int) -> Tensor:
    """The part of H within each group of so many columns [groups, group, group]; the last group may be smaller."""
    columns = torch.arange(len(H) + -len(H) % group, device=H.device).clamp(max=len(H) - 1).view(-1, group)
    return H[columns[:, :, None], columns[:, None]]


def _pairs_in_groups(mask: Tensor, W: Tensor, H: Tensor, change: Tensor, within: Tensor) -> Pairs:
    """Pairs of a pruned and a kept weight, one in each group."""
    group = within.shape[2]
    rows, short = len(W), -W.shape[1] % group
    first = torch.arange(0, W.shape[1], group, device=W.device)
    values = functional.pad(W, (0, short)).view(rows, -1, group)
    filled = (functional.pad(one, (0, short), value=torch.inf) for one in _alone(mask, W, H, change))
    restored, pruned = (one.view(rows, -1, group) for one in filled)
    both = restored[..., None] + pruned[..., None, :] - 2 * values[..., None] * values[..., None, :] * within
    gains, best = both.flatten(2).min(2)
    return first + best // group, first + best % group, gains


DAMPING = 0.01  # added to the diagonal of the Hessian, as a share of its mean


@dataclass(frozen=True)
class Treatment:
    """A pruner and the steps that follow it, in order, on the weights of a linear.

    `pruner`: zeros some, None: no weights; `rounds`: of swaps in its mask, without any it is that of the pruner to the
    last bit; `steps`: of conjugate gradients on the weights that it keeps, without any they are the dense ones;
    `quantizer`: rounds them, and zeros stay.
    """

    pruner: Pruner | None
    steps: int = 0
    rounds: int = 0
    quantizer: Quantizer | None = None

    def __repr__(self) -> str:
        """Names all that its result depends on, for the cache."""
        rounded = f" {self.quantizer!r}" if self.quantizer else ""
        return f"{self.pruner!r} swaps={self.rounds} refine={self.steps} {DAMPING}{rounded}"

    @property
    def group(self) -> int | None:
        """The number of inputs of a pattern's group."""
        return getattr(self.pruner, "group", None)

    @property
    def measures(self) -> type[Statistics] | None:
        """The kind of statistics that all need."""
        rounds_by = None if self.quantizer is None else self.quantizer.measures
        if self.pruner is None:
            return rounds_by
        own = self.pruner.measures
        return with_hessian(own) if self.steps or self.rounds or rounds_by else own

    @property
    def prepares(self) -> Any:
        """The pruner that prepares statistics, the same for all rounds, steps and bits."""
        return self.pruner if self.quantizer is None else [self.quantizer, self.pruner]

    def prepare(self, statistics: Statistics) -> None:
        """Prepares the statistics of the pruner and of the quantizer."""
        own, hessian = _parts(statistics)
        if self.pruner is not None and own is not None:
            self.pruner.prepare(own)
        if self.quantizer is not None and hessian is not None:
            self.quantizer.prepare(hessian)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1], not rounded; the weight itself without a pruner.

        UserError if there are swaps to make and the pruner changes weights that it keeps.
        """
        if self.pruner is None:
            return weight
        own, hessian = _parts(statistics)
        pruned = self.pruner.prune(weight, sparsity, own)
        if not self.steps and not self.rounds:
            return pruned
        mask = pruned == 0
        if mask.all() or not mask.any():
            return pruned
        assert hessian is not None
        scaled = hessian.scaled(DAMPING)
        W = weight.float() * scaled.scales
        if self.rounds:
            if not torch.equal(pruned, zeroed(weight, mask)) and weight.isfinite().all():
                raise UserError("prune.swaps: the pruner changes weights that it keeps; take wanda, or no swaps")
            live = W.masked_fill(hessian.dead(), 0)  # damping alone would make a weight on a dead input count
            mask = swapped(mask, live, scaled.matrix, self.rounds, self.group)
            pruned = zeroed(weight, mask)
        if not self.steps:
            return pruned
        B = refine(pruned.float() * scaled.scales, mask, W, scaled.matrix, self.steps)
        return zeroed((B / scaled.scales).to(weight.dtype), mask)

    def rounded(self, pruned: Tensor, bits: int, statistics: Statistics | None) -> Tensor:
        """A copy of what `prune` made with at most 2^bits values in each group."""
        assert self.quantizer is not None
        zeros = None if self.pruner is None else pruned == 0
        return self.quantizer.quantize(pruned, bits, _parts(statistics)[1], zeros)


def _parts(statistics: Statistics | None) -> tuple[Statistics | None, Hessian | None]:
    """A pruner's own statistics, and the Hessian, if there is one."""
    if isinstance(statistics, Several):
        return statistics.parts.get("own"), statistics.parts["hessian"]
    return statistics, statistics if isinstance(statistics, Hessian) else None


@cache
def with_hessian(kind: type[Statistics] | None) -> type[Statistics]:
    """The kind of statistics with a `Hessian` beside it; one that is or has a `Hessian` is enough."""
    if kind is Hessian or (kind is not None and issubclass(kind, Several)):
        return kind
    name = "Hessian alone" if kind is None else f"{kind.__name__} with Hessian"
    module = Hessian.__module__ if kind is None else kind.__module__  # whose code determines the tensors
    kinds = {**({} if kind is None else {"own": kind}), "hessian": Hessian}
    return type(name, (Several,), {"kinds": kinds, "__module__": module})


def refine(B: Tensor, mask: Tensor, W: Tensor, H: Tensor, steps: int) -> Tensor:
    """Solves (B - W) H = 0 with B [out, in] zero in the mask by conjugate gradients, with step sizes per row."""
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
