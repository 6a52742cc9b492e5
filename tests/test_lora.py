"""Masked adapters: in every family, against their own merge, against peft without a mask, and bit for bit at zeros."""

from typing import Any

import families
import torch
from expect import parametrize, slow
from families import checkpoint_of, copy_of, random_ids, same_bits, tiny
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from atp_tune.folders.lora import Lora
from atp_tune.folders.training import Adapters

FEW = ("llama", "gpt2", "falcon", "gemma3", "qwen2_moe", "gpt_oss")  # in the fast suite


def with_zeros(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with half of the weights of its linears zero, some of them negative zeros."""
    model = tiny(family, dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(torch.rand_like(parameter) < 0.5)
    return model


def trained(model: Any, rank: int = 2) -> tuple[Adapters, dict[str, nn.Parameter]]:
    """Adapters that are not zero any more."""
    adapters = Lora(checkpoint_of(model), rank, alpha=3, seed=0)
    parameters = adapters.parameters
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.2)
    return adapters, parameters


def merge(family: str, adapters: Adapters, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model with what a folder would hold."""
    model = with_zeros(family, dtype)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, was, tuned in adapters.merged():
            assert same_bits(was, tensors[name])
            tensors[name].copy_(tuned)
    return model


@parametrize("family", families.few(families.ALL, FEW))
def test_what_is_trained_is_what_is_merged(family: str) -> None:
    model = with_zeros(family)
    before = copy_of(model)
    plain = model(input_ids=random_ids(2)).logits
    adapters, _ = trained(model)
    tuned = model(input_ids=random_ids(2)).logits
    assert not torch.allclose(tuned, plain, atol=1e-2)
    merged = merge(family, adapters)
    assert torch.allclose(merged(input_ids=random_ids(2)).logits, tuned, rtol=1e-5, atol=1e-5)
    changed = {name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == adapters.names
    for name in changed:
        assert torch.equal(merged.state_dict()[name] == 0, before[name] == 0)


def test_gradients_are_those_of_the_formula() -> None:
    """dA = s Bᵀ (M ⊙ G), dB = s (M ⊙ G) Aᵀ with G the gradient of a plain weight in the same place."""
    model = with_zeros("llama")
    adapters, parameters = trained(model)
    merged = merge("llama", adapters)
    merged.requires_grad_(True)
    for one in (model, merged):
        one(input_ids=random_ids(3)).logits.logsumexp(-1).sum().backward()
    for name in adapters.names:
        weight = dict(merged.named_parameters())[name]
        masked = weight.grad * (weight != 0)
        a, b = parameters[f"{name}.lora_A"], parameters[f"{name}.lora_B"]
        assert torch.allclose(a.grad, 1.5 * b.T @ masked, rtol=1e-3, atol=1e-3)
        assert torch.allclose(b.grad, 1.5 * masked @ a.T, rtol=1e-3, atol=1e-3)


@slow
def test_without_zeros_they_are_pefts_own() -> None:
    ours, theirs = tiny("llama"), tiny("llama")
    _, parameters = trained(ours)
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=projections), theirs)
    mine = {name: (parameter, theirs.get_parameter(peft_name(name))) for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter, other in mine.values():
            other.copy_(parameter)
    logits = [model(input_ids=random_ids(3)).logits for model in (ours, theirs)]
    assert torch.allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    for each in logits:
        each.logsumexp(-1).sum().backward()
    for parameter, other in mine.values():
        assert parameter.grad is not None and other.grad is not None
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-3)


def peft_name(name: str) -> str:
    layer, _, side = name.replace(".weight.", " ").partition(" ")
    return f"{layer}.{side}.default.weight"
