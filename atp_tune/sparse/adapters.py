"""What is trained in the linears of a sparse checkpoint while every zero stays: scales, or masked LoRA (`lora`).

    scales   y = eᵃ ⊙ W (eᵇ ⊙ x)          W' = diag(eᵃ) W diag(eᵇ)

W is the frozen weight of a linear [out, in] with its zeros; a [out] and b [in] are trained in float32. A bias is not
trained.

The exponentials are never 0, so that W' has W's zeros and signs. The forward multiplies inputs and outputs, and needs
no gradient of W's size; W' is rounded to W's format at the merge alone. Norm gains are not trained: a gain is a scale
of the columns of all linears behind the norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.spec.recover import Training


class Adapters(ABC):
    """Trained numbers in all linears of a checkpoint's blocks, except experts of a mixture, which are no modules."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._layers: dict[str, Any] = {}  # by the name of their weight in the model

    @property
    def names(self) -> set[str]:
        """Names in a checkpoint of the tensors that are trained."""
        weights = {name: layer.get_base_layer().weight for name, layer in self._layers.items()}
        return {part for name, w in weights.items() for part in self._checkpoint.as_saved(name, w.to("meta"))}

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, in float32, by name."""

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name on disk, weight before and weight as trained, linear by linear."""
        for name, layer in self._layers.items():
            tuned = self._checkpoint.as_saved(name, layer.tuned().cpu())
            for part, was in self._checkpoint.as_saved(name, layer.get_base_layer().weight.cpu()).items():
                yield part, was, tuned[part]


class ScaledLinear(nn.Module):
    """A linear with scales of its rows and columns, whose logarithms `rows` [out] and `columns` [in] are trained."""

    def __init__(self, base: nn.Module, linear: Linear) -> None:
        super().__init__()
        self.base: Any = base
        self._transposed, place = linear.transposed, self.weight.device
        self.rows = nn.Parameter(torch.zeros(linear.out_features, device=place))
        self.columns = nn.Parameter(torch.zeros(linear.in_features, device=place))

    def get_base_layer(self) -> Any:
        """The linear itself, as in peft's layers."""
        return self.base

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for models that read its format or device."""
        found: Tensor = self.base.weight
        return found

    def tuned(self) -> Tensor:
        """diag(eᵃ) W diag(eᵇ) in W's own shape and format."""
        scales = self.rows.exp()[:, None] * self.columns.exp()
        return (self.weight.float() * (scales.T if self._transposed else scales)).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., out] of inputs [..., in]; of a class with a forward of its own by that, with W'."""
        if type(self.base).forward not in (nn.Linear.forward, Conv1D.forward):
            return functional_call(self.base, {"weight": self.tuned()}, (x,))  # type: ignore[no-any-return]
        rows, bias = self.rows.exp(), self.base.bias
        own = {} if bias is None else {"bias": (bias / rows).to(bias.dtype)}
        y: Tensor = functional_call(self.base, own, ((x * self.columns.exp()).to(x.dtype),))
        return (y * rows).to(y.dtype)


class Scales(Adapters):
    """Scales; the checkpoint's model is changed: its linears become `ScaledLinear`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        for i, linear in linears_of(checkpoint):
            base = checkpoint.blocks[i].get_submodule(linear.name)
            layer = ScaledLinear(base, linear)
            checkpoint.blocks[i].set_submodule(linear.name, layer)
            self._layers[checkpoint.key(i, linear)] = layer

    def parameters(self) -> dict[str, nn.Parameter]:
        """Both vectors of every linear."""
        sides = ("rows", "columns")
        return {f"{name}.{side}": getattr(layer, side) for name, layer in self._layers.items() for side in sides}


def linears_of(checkpoint: Checkpoint) -> list[tuple[int, Linear]]:
    """The linears that are modules, each with the index of its block."""
    return [(i, x) for i, linears in enumerate(checkpoint.linears) for x in linears if x.expert is None]


def make_adapters(checkpoint: Checkpoint, settings: Training) -> Adapters:
    """What the settings train."""
    if settings.rank is None or settings.alpha is None:
        return Scales(checkpoint)
    from atp_tune.sparse.lora import Lora  # needs the extra

    return Lora(checkpoint, settings.rank, settings.alpha, settings.seed)


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Gradient checkpointing: each block keeps only its inputs, and is recomputed in the backward pass."""
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)
