"""Scales of rows and columns: in every family, against their own merge, against plain autograd, and at zeros."""

from typing import Any

import families
import pytest
import torch
from families import checkpoint_of, copy_of, random_ids
from test_lora import FEW, merge, with_zeros
from torch import nn

from atp_tune.folders.training import Scales, recompute_blocks


def trained(model: Any) -> tuple[Scales, dict[str, nn.Parameter]]:
    """Scales that are not one any more."""
    scales = Scales(checkpoint_of(model))
    parameters = scales.parameters
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.3)
    return scales, parameters


@pytest.mark.parametrize("family", families.few(families.ALL, FEW))
def test_folded_weights_are_the_scaled_model(family: str) -> None:
    model = with_zeros(family)
    before = copy_of(model)
    plain = model(input_ids=random_ids(2)).logits
    scales, _ = trained(model)
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


def test_each_weight_is_multiplied_by_its_row_and_column() -> None:
    model = with_zeros("gpt2")  # which stores weights [in, out]
    scales, parameters = trained(model)
    for name, was, tuned in scales.merged():
        rows, columns = (parameters[f"{name}.{side}"].detach() for side in ("rows", "columns"))
        for i, j in ((0, 0), (1, 3), (4, 2), (7, 7)):
            expected = float(was[j, i].detach()) * float(rows[i].exp()) * float(columns[j].exp())
            assert float(tuned[j, i]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
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


def test_they_begin_without_an_effect_and_in_float32() -> None:
    model = with_zeros("qwen2", torch.bfloat16)
    before = model(input_ids=random_ids(2)).logits
    scales = Scales(checkpoint_of(model))
    assert {parameter.dtype for parameter in scales.parameters.values()} == {torch.float32}
    assert torch.equal(model(input_ids=random_ids(2)).logits, before)
    assert all(torch.equal(was, tuned) for _, was, tuned in scales.merged())


def test_a_linear_with_a_forward_of_its_own() -> None:
    """Outputs are clipped after the scales, as in the folded model."""

    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clip(-0.1, 0.1)

    def clipped(model: Any) -> Any:
        for layer in model.model.layers:
            layer.mlp.up_proj.__class__ = Clipped
        return model

    model = clipped(with_zeros("llama"))
    scales, _ = trained(model)
    merged = clipped(merge("llama", scales))
    ids = random_ids(2)
    assert torch.allclose(merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_recomputing_blocks_changes_no_gradient() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = with_zeros("llama")
        if recompute:
            recompute_blocks(checkpoint_of(model).blocks)
        _, parameters = trained(model)
        model(input_ids=random_ids(3), use_cache=False).logits.logsumexp(-1).sum().backward()
        return [parameter.grad for parameter in parameters.values() if parameter.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert len(kept)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
