"""Keeps the zeros of a model while something else trains it, such as transformers' `Trainer`.

A pruned weight gets no gradient, and is 0 again after each step of any optimizer of torch: those that move a weight
without a gradient (Muon, momentum from before) would fill it. LoRA by peft gets the mask that `finetune` trains with.
"""

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from atp_tune.errors import UserError


class KeptZeros:
    """The zeros that are kept until `release`; as a context manager until its end."""

    def __init__(self, model: nn.Module) -> None:
        """UserError if there are none, or an adapter would fill them."""
        others = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if "peft" in sys.modules:
            from atp_tune.folders.lora import adapters_of, mask_adapters

            others |= {id(p) for p in adapters_of(model)}  # an untrained B is all 0
        found = [p for p in model.parameters() if p.dim() > 1 and id(p) not in others and (p == 0).any()]
        if not found:
            raise UserError("keep_zeros: no weight of the model is 0; prune it first")
        if "peft" in sys.modules:
            mask_adapters(model)
        self._kept = [(weakref.ref(p), [p == 0]) for p in found if p.requires_grad]
        self._handles: list[Any] = [
            p.register_hook(_masked(p))  # type: ignore[no-untyped-call]
            for p in found
            if p.requires_grad
        ]
        self._handles.append(register_optimizer_step_post_hook(self._restore))
        weakref.finalize(model, self.release)

    def __enter__(self) -> "KeptZeros":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Keeps them no more; masks of adapters stay."""
        while self._handles:
            self._handles.pop().remove()
        self._kept.clear()

    @torch.no_grad()
    def _restore(self, *step: object) -> None:
        for reference, mask in self._kept:
            if (weight := reference()) is not None:
                mask[0] = mask[0].to(weight.device)  # the model may have moved
                weight.masked_fill_(mask[0], 0)


def keep_zeros(model: nn.Module) -> KeptZeros:
    """Keeps each zero of a model's weights at 0 while anything in this process trains it: a `Trainer`, or a loop.

    Call it before training, and after `get_peft_model` and after what is to be trained requires gradients:

        atp_tune.keep_zeros(model)
        transformers.Trainer(model, ...).train()

    Holds a byte for each weight that is trained. Weights that FSDP or DeepSpeed shard are not kept.

    Args:
        model: A pruned model of torch. LoRA of its linears by peft is masked, so that merging keeps zeros too.

    Returns:
        What ends it: `.release()`, or `with atp_tune.keep_zeros(model): ...`; a model that is dropped ends it as well.

    Raises:
        UserError: If the model has no zeros, or what would fill them: another adapter, a variant of LoRA, dropout.
    """
    return KeptZeros(model)


def _masked(weight: Tensor) -> Any:
    reference = weakref.ref(weight)

    def hook(gradient: Tensor) -> Tensor:
        found = reference()
        return gradient if found is None else gradient.masked_fill(found.detach() == 0, 0)

    return hook
