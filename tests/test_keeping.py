"""Zeros stay while the real Trainer, any optimizer, or LoRA trains a pruned model."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from expect import parametrize, refused, slow
from families import random_ids
from peft import IA3Config, LoraConfig, get_peft_model
from test_lora import with_zeros

import atp_tune

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def zeros(model: Any) -> dict[str, Any]:
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name}


def steps(model: Any, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    for seed in range(count):
        ids = random_ids(2, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(before: dict[str, Any], model: Any) -> bool:
    after = zeros(model)
    return all(torch.equal(mask, after[name]) for name, mask in before.items() if mask.any())


@slow
def test_the_trainer_keeps_zeros(tmp_path: Path) -> None:
    """It filled all of them: 117,952 were none after two steps."""
    from transformers import Trainer, TrainingArguments

    model = with_zeros("llama")
    before, data = zeros(model), [{"input_ids": ids, "labels": ids} for ids in random_ids(8)]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = TrainingArguments(
        str(tmp_path), max_steps=3, weight_decay=0.1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    with atp_tune.keep_zeros(model):
        Trainer(model, given, train_dataset=data).train()
    assert same(before, model)
    assert len([name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]) == len(weights)
    Trainer(model, given, train_dataset=data).train()  # released
    assert not same(before, model)


@parametrize("kind", ["AdamW", "Muon", "SGD"])
def test_every_optimizer_keeps_them(kind: str) -> None:
    """Muon moves weights without a gradient."""
    model = with_zeros("llama")
    before = zeros(model)
    trained = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    kept = atp_tune.keep_zeros(model)
    steps(model, getattr(torch.optim, kind)(trained, lr=0.05, weight_decay=0.1))
    assert same(before, model)
    kept.release()
    steps(model, getattr(torch.optim, kind)(trained, lr=0.05, weight_decay=0.1))
    assert not same(before, model)


def test_lora_from_its_usual_start_is_trained() -> None:
    """Its B is all 0 then, which were taken for pruned weights: the adapter stayed as it was."""
    model = get_peft_model(with_zeros("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    before = zeros(model.get_base_model())
    with atp_tune.keep_zeros(model):
        steps(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all((p != 0).all() for p in adapters)
    merged = {name.replace(".base_layer", ""): mask for name, mask in before.items() if "lora_" not in name}
    assert same(merged, model.merge_and_unload())


@parametrize(
    ("config", "said"),
    [
        (
            LoraConfig(**LORA, lora_dropout=0.1),
            r"^keep_zeros: .*q_proj has dropout, which fills zeros; give LoRA",
        ),
        (LoraConfig(**LORA, use_dora=True), r"q_proj has a variant or a bias of LoRA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"q_proj is peft's peft\.tuners\.ia3"),
    ],
)
def test_other_adapters_are_refused(config: Any, said: str) -> None:
    model = get_peft_model(with_zeros("llama"), config)
    with refused(said):
        atp_tune.keep_zeros(model)


def test_a_dense_model_has_nothing_to_keep() -> None:
    with refused(r"^keep_zeros: no weight of the model is 0; prune it first$"):
        atp_tune.keep_zeros(families.tiny("llama"))
