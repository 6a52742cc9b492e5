"""Refinement: makes the layer-wise error of a pruner's result smaller, by new kept weights.

    min_B  tr (B - W) H (B - W)ᵀ    such that B_ij = 0 wherever the mask is

The mask is the pruner's. W weight [out, in], H = XᵀX (up to a factor) with `DAMPING` ·
mean(diag H) added to its diagonal. Conjugate gradients take a few steps from the pruner's own result, for all rows at
once, with the preconditioner diag H: in the scaled coordinates W̃_ij = W_ij d_j and H̃_jk = H_jk / (d_j d_k) with
d_j = √H_jj they need none.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithm 2, which starts at the end of ADMM, and its table 1, which starts at the mask of magnitudes.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from atp_tune.pruners import Measures, Pruner, Quantizer, Statistics
from atp_tune.pruners.selection import zeroed
from atp_tune.pruners.statistics import Hessian, Several

DAMPING = 0.01  # added to the diagonal of the Hessian, as a share of its mean


@dataclass(frozen=True)
class Treatment:
    """A pruner and the steps that follow it, in order, on the weights of a linear.

    `pruner`: zeros some, None: no weights; `steps`: of conjugate gradients on the weights that it keeps; `quantizer`:
    rounds them, and zeros stay.
    """

    pruner: Pruner | None
    steps: int = 0
    quantizer: Quantizer | None = None

    def __repr__(self) -> str:
        """Names all that its result depends on, for the cache."""
        rounded = f" {self.quantizer!r}" if self.quantizer else ""
        return f"{self.pruner!r} refine={self.steps} {DAMPING}{rounded}"

    @property
    def group(self) -> int | None:
        """The number of inputs of a pattern's group."""
        return getattr(self.pruner, "group", None)

    @property
    def measures(self) -> Measures:
        """The kind of statistics that all need."""
        rounds_by = getattr(self.quantizer, "measures", None)
        if self.pruner is None:
            return rounds_by
        own = self.pruner.measures
        return with_hessian(own) if self.steps or rounds_by else own

    @property
    def prepares(self) -> Any:
        """The pruner that prepares statistics, the same for all steps and bits."""
        return self.pruner if self.quantizer is None else [self.quantizer, self.pruner]

    def prepare(self, statistics: Statistics) -> None:
        """Prepares the statistics of the pruner and of the quantizer."""
        for step, part in zip((self.pruner, self.quantizer), _parts(statistics), strict=True):
            if step is not None and part is not None:
                step.prepare(part)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1], not rounded; without a pruner the weight."""
        if self.pruner is None:
            return weight
        own, hessian = _parts(statistics)
        pruned = self.pruner.prune(weight, sparsity, own)
        if not self.steps:
            return pruned
        mask = pruned == 0
        if mask.all() or not mask.any():
            return pruned
        assert hessian is not None
        scaled = hessian.scaled(DAMPING)
        W = weight.float() * scaled.scales
        B = refine(pruned.float() * scaled.scales, mask, W, scaled.matrix, self.steps)
        return zeroed((B / scaled.scales).to(weight.dtype), mask)

    def rounded(self, pruned: Tensor, bits: int | str, statistics: Statistics | None) -> Tensor:
        """A copy of what `prune` made with at most 2^bits values in each group, or of a type of ggml."""
        assert self.quantizer is not None
        if self.pruner is None:
            return self.quantizer.quantize(pruned, bits, statistics)
        return self.quantizer.quantize(pruned, bits, _parts(statistics)[1], pruned == 0)


def _parts(statistics: Statistics | None) -> tuple[Statistics | None, Hessian | None]:
    """A pruner's own statistics, and the Hessian, if there is one."""
    if isinstance(statistics, Several):
        return statistics.parts.get("own"), statistics.parts["hessian"]
    return statistics, statistics if isinstance(statistics, Hessian) else None


@cache
def with_hessian(kind: Measures) -> type[Statistics]:
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
