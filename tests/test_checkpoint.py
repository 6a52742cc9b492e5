import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refusal, refused, slow
from families import CPU, FAMILIES, MIXTURES, checkpoint_of, copy_of, same_bits, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from atp_tune.checkpoints.blocks import find_linears
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import mapped_files
from atp_tune.checkpoints.files import Offload

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "falcon-alibi": "transformer.h",
    "falcon-new": "transformer.h",
    "bloom": "transformer.h",
}


@parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_linear_and_nothing_else(family: str) -> None:
    checkpoint = checkpoint_of(tiny(family))
    assert checkpoint.blocks_name == BLOCKS.get(family, "model.layers")
    for block, linears, size in zip(checkpoint.blocks, checkpoint.linears, checkpoint.sizes, strict=True):
        matrices = {name: p for name, p in block.named_parameters() if p.dim() == 2}
        assert [linear.key for linear in linears] == list(matrices)
        assert size == sum(p.numel() for p in matrices.values()) == sum(linear.size for linear in linears)


@parametrize("family", MIXTURES)
def test_all_of_a_mixture_is_pruned_but_what_chooses_experts(family: str) -> None:
    checkpoint = checkpoint_of(tiny(family))
    for block, linears, size in zip(checkpoint.blocks, checkpoint.linears, checkpoint.sizes, strict=True):
        weights = {name: p for name, p in block.named_parameters() if p.dim() > 1 and not name.endswith("_bias")}
        gates = {name for name in weights if ".gate." in name or ".router." in name or "shared_expert_gate" in name}
        assert {linear.key for linear in linears} == weights.keys() - gates
        assert size == sum(p.numel() for name, p in weights.items() if name not in gates)
        assert bool(gates) == any(linear.expert is not None for linear in linears)


class OtherExperts(nn.Module):
    """Experts kept and run in a way of their own."""

    def __init__(self, **said: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 6, 4)), nn.Parameter(torch.ones(2, 4, 3))
        for name, value in said.items():
            setattr(self, name, value)


def test_matrices_that_are_no_linears_and_hold_much_of_a_block_are_refused() -> None:
    """As DBRX keeps its experts: all of them in one matrix of two dimensions."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(8, 4))

    with refused("model module Flat: w1 is a matrix in a form that is not known"):
        find_linears(nn.Sequential(nn.Linear(4, 4), Flat()))


@parametrize("module", [OtherExperts(), OtherExperts(has_gate=False), nn.Conv1d(3, 3, 1)])
def test_weights_of_a_form_that_is_not_known_are_refused(module: nn.Module) -> None:
    with refused("has 3 dimensions in a form that is not known") as error:
        find_linears(nn.Sequential(nn.Linear(4, 4), module))
    assert str(error.value).startswith(f"model module {type(module).__name__}: ")


@parametrize("offload", ["cpu", "disk"])
def test_the_device_keeps_all_but_the_blocks(offload: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: set[int] = set()
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        moved.add(tensor.data_ptr())
        return original(tensor, *args, **kwargs)

    def places(module: nn.Module) -> set[int]:
        return {tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())}

    model = tiny("llama-tied")
    model.model.layers[0].register_buffer("table", torch.ones(3))
    monkeypatch.setattr(torch.Tensor, "to", to)
    checkpoint = checkpoint_of(model, offload)
    blocks = [places(block) for block in checkpoint.blocks]
    assert moved == places(model) - set().union(*blocks)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not {tensor.data_ptr() for tensor in checkpoint.weights(0).values()} & set().union(*blocks)


def test_a_gpu_is_the_current_one_before_anything_is_put_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device) -> None:
        raise KeyError(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    for offload in ("none", "cpu", "disk"):
        with pytest.raises(KeyError, match="cuda:1"):
            Checkpoint(tiny("llama"), torch.device("cuda:1"), offload)  # type: ignore[arg-type]


@parametrize(("offload", "mapped"), [("none", True), ("cpu", False), ("disk", True)])
@parametrize("family", ["llama", "mixtral", "gpt2"])
def test_blocks_lie_where_the_residency_says(
    family: str, offload: Offload, mapped: bool, tmp_path: Path, cache: Path
) -> None:
    """In float32 as saved; what transformers puts together is mapped from a file without a name."""
    tiny(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, torch.float32, CPU, offload=offload)
    is_mapped = mapped_files()
    for block in checkpoint.blocks:
        for name, tensor in block.named_parameters():
            if family != "mixtral" or offload != "none" or "experts" not in name:
                assert is_mapped(tensor) == mapped, name
    assert not list(cache.glob("blocks/*"))
    saved = copy_of(tiny(family))
    assert all(same_bits(tensor, saved[name]) for name, tensor in copy_of(checkpoint.model).items())


@parametrize("dtype", [torch.float32, torch.bfloat16])
@parametrize("family", ["llama-tied", "mixtral", "qwen2_moe-mixed"])
def test_load(family: str, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, dtype, CPU)
    assert checkpoint.dtype == dtype
    saved = copy_of(model)
    assert all(same_bits(tensor, saved[name].to(dtype)) for name, tensor in copy_of(checkpoint.model).items())


def _break(folder: Path, how: str) -> None:
    file, key = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors, metadata = load_file(file), {"format": "pt"}
    match how:
        case "missing":
            del tensors[key]
            save_file(tensors, file, metadata)
        case "shape":
            save_file({**tensors, key: tensors[key][:, :5].clone()}, file, metadata)
        case "corrupt":
            file.write_bytes(b"nonsense")
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "none":
            file.unlink()
        case "config":
            (folder / "config.json").write_text("{")
        case "family":
            (folder / "config.json").write_text('{"model_type": "nothing"}')
        case "vision":
            config = {"model_type": "vit", "architectures": ["ViTModel"]}
            (folder / "config.json").write_text(json.dumps(config))


@slow
@parametrize("how", ["missing", "shape", "corrupt", "cut", "none", "config", "family", "vision"])
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, how: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    _break(tmp_path, how)
    said = refusal(Checkpoint.load, tmp_path, torch.float32, CPU)
    assert said.startswith((f"model {tmp_path}: ", f"model.source: {tmp_path}/config.json is no JSON"))
    if how in {"missing", "shape"}:
        assert "has no model.layers.1.mlp.up_proj.weight of the shape" in said
