"""Refinement: makes the layer-wise error of a pruner's result smaller, by swaps in its mask and new kept weights.

    min_B  tr (B - W) H (B - W)ᵀ    such that B_ij = 0 wherever the mask is

The mask is the pruner's, after the rounds of `swaps`. W weight [out, in], H = XᵀX (up to a factor) with `DAMPING` ·
mean(diag H) added to its diagonal. Conjugate gradients take a few steps from the pruner's own result, for all rows at
once, with the preconditioner diag H: in the scaled coordinates W̃_ij = W_ij d_j and H̃_jk = H_jk / (d_j d_k) with
d_j = √H_jj they need none.

Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", NeurIPS
2024, algorithm 2, which starts at the end of ADMM, and its table 1, which starts at the mask of magnitudes.
"""

from collections.abc import Callable
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from atp_tune.errors import UserError
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.selection import zeroed
from atp_tune.pruners.statistics import Hessian
from atp_tune.pruners.swaps import swapped

DAMPING = 0.01  # added to the diagonal of the Hessian, as a share of its mean


class Refined:
    """A `Pruner` whose mask is improved by swaps, and whose kept weights are refined."""

    def __init__(self, pruner: Pruner, steps: int, rounds: int = 0) -> None:
        """`steps`: of conjugate gradients; without any, kept weights are the dense ones. `rounds`: of swaps; without
        any, masks are those of the pruner alone, to the last bit.
        """
        self._pruner = pruner
        self._steps = steps
        self._rounds = rounds
        self.group: int | None = getattr(pruner, "group", None)
        self.measures = with_hessian(pruner.measures)

    def __repr__(self) -> str:
        """Names all that its result depends on, for the cache."""
        return f"{self._pruner!r} swaps={self._rounds} refine={self._steps} {DAMPING}"

    @property
    def prepares(self) -> Pruner:
        """The pruner that prepares statistics, so that they are the same for all rounds and steps."""
        return self._pruner

    def after(self, change: Callable[[Pruner], Pruner]) -> "Refined":
        """The same after another pruner, made from its own."""
        return Refined(change(self._pruner), self._steps, self._rounds)

    def prepare(self, statistics: Statistics) -> None:
        """Prepares the pruner's own statistics."""
        own, _ = parts_of(statistics)
        if own is not None:
            self._pruner.prepare(own)

    def prune(self, weight: Tensor, sparsity: float, statistics: Statistics | None) -> Tensor:
        """A pruned copy of weight [out, in] at a sparsity in [0, 1]; statistics are of the kind `measures`.

        UserError if there are swaps to make and the pruner changes weights that it keeps.
        """
        assert statistics is not None
        own, hessian = parts_of(statistics)
        pruned = self._pruner.prune(weight, sparsity, own)
        mask = pruned == 0
        if mask.all() or not mask.any():
            return pruned
        scaled = hessian.scaled(DAMPING)
        W = weight.float() * scaled.scales
        if self._rounds:
            if not torch.equal(pruned, zeroed(weight, mask)) and weight.isfinite().all():
                raise UserError("prune.swaps: the pruner changes weights that it keeps; take wanda, or no swaps")
            live = W.masked_fill(hessian.dead(), 0)  # damping alone would make a weight on a dead input count
            mask = swapped(mask, live, scaled.matrix, self._rounds, self.group)
            pruned = zeroed(weight, mask)
        if not self._steps:
            return pruned
        B = refine(pruned.float() * scaled.scales, mask, W, scaled.matrix, self._steps)
        return zeroed((B / scaled.scales).to(weight.dtype), mask)


class WithHessian:
    """A pruner's own kind of statistics, if it has one, with the `Hessian` of the same inputs beside it."""

    kind: ClassVar[type[Statistics] | None]

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.own = None if self.kind is None else self.kind(inputs, device)
        self.hessian = Hessian(inputs, device)

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., in] of any float dtype."""
        if self.own is not None:
            self.own.add(x)
        self.hessian.add(x)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of both, by name."""
        own = {} if self.own is None else self.own.tensors()
        both = {"own": own, "hessian": self.hessian.tensors()}
        return {f"{part}.{name}": tensor for part, tensors in both.items() for name, tensor in tensors.items()}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor]) -> Self:
        """Restores statistics from `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"own": {}, "hessian": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        found = cls.__new__(cls)
        found.own = None if cls.kind is None else cls.kind.restored(parts["own"])
        found.hessian = Hessian.restored(parts["hessian"])
        return found

    @classmethod
    def bytes_for(cls, inputs: int) -> int:
        """Upper bound on the bytes of `tensors`."""
        return (0 if cls.kind is None else cls.kind.bytes_for(inputs)) + Hessian.bytes_for(inputs)


@cache
def with_hessian(kind: type[Statistics] | None) -> type[Statistics]:
    """The kind of statistics with a `Hessian` beside it; one that is or has a `Hessian` is enough."""
    if kind is Hessian or (kind is not None and issubclass(kind, WithHessian)):
        return kind
    name = "Hessian alone" if kind is None else f"{kind.__name__} with Hessian"
    module = Hessian.__module__ if kind is None else kind.__module__  # whose code determines the tensors
    return type(name, (WithHessian,), {"kind": kind, "__module__": module})


def parts_of(statistics: Statistics) -> tuple[Statistics | None, Hessian]:
    """A pruner's own statistics, and the Hessian."""
    if isinstance(statistics, WithHessian):
        return statistics.own, statistics.hessian
    assert isinstance(statistics, Hessian)
    return statistics, statistics


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
