"""Scales of rows and columns: in every family, against their own merge, against plain autograd, and at zeros."""

from typing import Any

import families
import torch
from expect import parametrize
from families import checkpoint_of, copy_of, random_ids
from test_lora import FEW, merge, with_zeros
from torch import nn

from atp_tune.folders.training import Scales


def trained(model: Any, group_size: int | None = None) -> tuple[Scales, dict[str, nn.Parameter]]:
    """Scales that are not one any more."""
    scales = Scales(checkpoint_of(model), group_size)
    parameters = scales.parameters
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.3)
    return scales, parameters


@parametrize("group_size", [None, 5])
@parametrize("family", families.few(families.ALL, FEW))
def test_folded_weights_are_the_scaled_model(family: str, group_size: int | None) -> None:
    model = with_zeros(family)
    before = copy_of(model)
    plain = model(input_ids=random_ids(2)).logits
    scales, _ = trained(model, group_size)
    scaled = model(input_ids=random_ids(2)).logits
    assert not torch.allclose(scaled, plain, atol=1e-2)
    merged = merge(family, scales)
    assert torch.allclose(merged(input_ids=random_ids(2)).logits, scaled, rtol=1e-4, atol=1e-4)
    after = merged.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == scales.names
    for name in changed:
        assert torch.equal(after[name].sign(), before[name].sign())
        assert torch.equal(torch.signbit(after[name]), torch.signbit(before[name]))  # also of zeros


@parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_the_folded_weights(family: str) -> None:
    """da = (G ⊙ W') 1, db = (G ⊙ W')ᵀ 1, with G the gradient of a plain weight W' in the same place."""
    model = with_zeros(family)
    scales, parameters = trained(model)
    merged = merge(family, scales)
    merged.requires_grad_(True)
    for one in (model, merged):
        one(input_ids=random_ids(3)).logits.logsumexp(-1).sum().backward()
    for name in scales.names:
        weight = dict(merged.named_parameters())[name]
        product = weight.grad * weight.detach()
        product = product.T if family == "gpt2" else product
        assert torch.allclose(parameters[f"{name}.rows"].grad, product.sum(1), rtol=1e-3, atol=1e-3)
        assert torch.allclose(parameters[f"{name}.columns"].grad, product.sum(0), rtol=1e-3, atol=1e-3)
