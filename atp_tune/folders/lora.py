"""Masked LoRA, which trains the kept weights of linears.

    y = (W + M ⊙ s B A) x        M = [W ≠ 0], s = α / r

W is the frozen weight of a linear [out, in] with its zeros; A [r, in] and B [out, r] are trained in float32. A bias is
not trained.

The masked product needs a matrix of W's size: LoRA's usual B (A x) cannot apply the mask, and a mask applied only at
the merge would change the trained model. So each forward, like the merge, computes the sum in float32 and rounds it
once to W's format: both give the same weights bit for bit. Source: Hu et al., LoRA, ICLR 2022.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.folders.training import Adapters, trained_linears

ADAPTER = "default"  # what peft calls an adapter


class MaskedLinear(LoraLinear):
    """peft's LoRA layer with the mask in its forward pass, and where peft merges it."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """M ⊙ s B A of an adapter, in W's own shape."""
        weight: Any = self.get_base_layer().weight
        mask: Tensor = weight.detach().sign().abs()  # several times as fast as a comparison
        return mask * super().get_delta_weight(adapter)

    def tuned(self) -> Tensor:
        """W + M ⊙ s B A in W's own shape and format."""
        weight: Any = self.get_base_layer().weight
        with torch.autocast(weight.device.type, enabled=False):
            changed = [self.get_delta_weight(name) for name in self.active_adapters if name in self.lora_A]
            tuned: Tensor = sum(changed, weight.float()).to(weight.dtype)
        return tuned

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        y: Tensor = functional_call(self.get_base_layer(), {"weight": self.tuned()}, (x, *args), kwargs)
        return y


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of the adapters of a model, without the layers that they adapt."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            own = {id(p) for p in layer.get_base_layer().parameters()}
            yield from (p for p in layer.parameters() if id(p) not in own)


def mask_adapters(model: nn.Module) -> None:
    """Puts the mask into all adapters of a model whose linears have zeros; UserError for others than plain LoRA."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, MaskedLinear):
            weight = getattr(layer.get_base_layer(), "weight", None)
            if weight is None or isinstance(layer.get_base_layer(), nn.Embedding) or not (weight == 0).any():
                continue
            reason = _unlike(layer)
            if reason:
                raise UserError(f"keep_zeros: {name} {reason}, which fills zeros; give LoRA without it, or no adapter")
            layer.__class__ = MaskedLinear


def _unlike(layer: BaseTunerLayer) -> str:
    """Names the parts of an adapter that a masked one has not; "" for a plain LoRA of a linear."""
    if type(layer) is not LoraLinear:
        return f"is peft's {type(layer).__module__}.{type(layer).__name__}"
    if layer.lora_variant or any(layer.lora_bias.values()):
        return "has a variant or a bias of LoRA"
    return "has dropout" if any(isinstance(part, nn.Dropout) for part in layer.lora_dropout.values()) else ""


class Lora(Adapters):
    """LoRA; the checkpoint's model is changed: its linears become `MaskedLinear`."""

    def __init__(self, checkpoint: Checkpoint, rank: int, alpha: int, seed: int) -> None:
        """`seed` initialises A; B is zero, so training starts from the pruned model."""
        super().__init__(checkpoint)
        linears = trained_linears(checkpoint)
        paths = [f"{i}.{linear.name}" for i, linear in linears]
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=paths)
        config._register_custom_module({nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # into the blocks alone: for some whole models peft rewrites target_modules
            inject_adapter_in_model(config, checkpoint.blocks, ADAPTER)
        for path, (i, linear) in zip(paths, linears, strict=True):
            layer: Any = checkpoint.blocks.get_submodule(path)
            layer.fan_in_fan_out = linear.transposed
            name = checkpoint.key(i, linear)
            self._layers[name] = layer
            for side in ("lora_A", "lora_B"):
                self.parameters[f"{name}.{side}"] = getattr(layer, side)[ADAPTER].float().weight.requires_grad_()
