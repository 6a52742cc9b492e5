"""LoRA that leaves zeros alone, on peft's layers.

    y = (W + M ⊙ s B A) x        M = [W ≠ 0], s = α / r

W the frozen weight of a linear [out, in], zeros included; A [r, in] and B [out, r] are trained, in float32. The masked
product needs a matrix of W's size: plain LoRA's B (A x) has no place for a mask, and one that came only with the merge
would change what was trained. So the sum is taken in float32 and rounded once to W's format, in each forward as in the
merge, and both are the same weights bit for bit. Source: Hu et al., LoRA, ICLR 2022.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recomputed
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.checkpoint import Checkpoint

ADAPTER = "default"


class MaskedLinear(LoraLinear):
    """peft's LoRA layer with the mask inside the forward."""

    def tuned(self) -> Tensor:
        """W + M ⊙ s B A in W's own shape and format."""
        weight: Any = self.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):
            fixed = weight.float()
            mask = fixed.sign().abs()  # several times as fast as a comparison
            tuned: Tensor = (fixed + mask * self.get_delta_weight(ADAPTER)).to(weight.dtype)
        return tuned

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        y: Tensor = functional_call(self.get_base_layer(), {"weight": self.tuned()}, (x, *args), kwargs)
        return y


class Adapters:
    """Adapters on all linears of a checkpoint's blocks; experts of a mixture, which are no modules, stay as they are.

    The checkpoint's model is changed: its linears become `MaskedLinear`.
    """

    def __init__(self, checkpoint: Checkpoint, rank: int, alpha: int, seed: int) -> None:
        """`seed` draws A; B is zero, so that the model starts as it was pruned."""
        self._checkpoint = checkpoint
        found = [(i, x) for i, linears in enumerate(checkpoint.linears) for x in linears if x.expert is None]
        places = [f"{i}.{linear.name}" for i, linear in found]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=places)
        config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # blocks alone: of some whole models peft rewrites what is asked for
            inject_adapter_in_model(config, checkpoint.blocks, ADAPTER)
        self._layers: dict[str, Any] = {}
        for place, (i, linear) in zip(places, found, strict=True):
            layer: Any = checkpoint.blocks.get_submodule(place)
            layer.fan_in_fan_out = linear.transposed
            self._layers[checkpoint.key(i, linear)] = layer

    @property
    def names(self) -> set[str]:
        """What a folder calls the tensors that have an adapter."""
        weights = {name: layer.get_base_layer().weight for name, layer in self._layers.items()}
        return {part for name, w in weights.items() for part in self._checkpoint.as_saved(name, w.to("meta"))}

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every linear, in float32, by name."""
        found = {}
        for name, layer in self._layers.items():
            for side in ("lora_A", "lora_B"):
                matrix = getattr(layer, side)[ADAPTER].float()
                found[f"{name}.{side}"] = matrix.weight.requires_grad_()
        return found

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name on disk, weight before and weight with the adapter merged, linear by linear."""
        for name, layer in self._layers.items():
            tuned = self._checkpoint.as_saved(name, layer.tuned().cpu())
            for part, was in self._checkpoint.as_saved(name, layer.get_base_layer().weight.cpu()).items():
                yield part, was, tuned[part]


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Lets each block keep its inputs alone and be computed again in the backward pass: gradient checkpointing."""
    for block in blocks:
        block.forward = partial(recomputed, block.forward, use_reentrant=False)
