import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from families import CPU, FAMILIES, MIXTURES, checkpoint_of, copy_of, same_bits, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints import checkpoint as module
from atp_tune.checkpoints.blocks import find_blocks, find_linears
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import Mapped, mapped_files
from atp_tune.checkpoints.files import Offload
from atp_tune.errors import UserError

BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon": "transformer.h",
    "falcon-alibi": "transformer.h",
    "falcon-new": "transformer.h",
    "bloom": "transformer.h",
}
# [out, in] of the linears that are not the same in every family
SHAPES = {
    "llama": {"self_attn.k_proj": (12, 24), "mlp.down_proj": (24, 40)},
    "gpt2": {"attn.c_attn": (72, 24), "attn.c_proj": (24, 24), "mlp.c_fc": (96, 24), "mlp.c_proj": (24, 96)},
    "phi3": {"self_attn.qkv_proj": (48, 24), "mlp.gate_up_proj": (80, 24)},
    "falcon": {"self_attention.query_key_value": (36, 24), "mlp.dense_4h_to_h": (24, 96)},
    "opt": {"fc1": (40, 24), "fc2": (24, 40)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_is_a_linear_and_nothing_else(family: str) -> None:
    checkpoint = checkpoint_of(tiny(family))
    assert checkpoint.blocks_name == BLOCKS.get(family, "model.layers")
    for block, linears, size in zip(checkpoint.blocks, checkpoint.linears, checkpoint.sizes, strict=True):
        matrices = {name: p for name, p in block.named_parameters() if p.dim() == 2}
        assert [linear.key for linear in linears] == list(matrices)
        assert size == sum(p.numel() for p in matrices.values()) == sum(linear.size for linear in linears)


@pytest.mark.parametrize("family", SHAPES)
def test_shapes_are_out_by_in(family: str) -> None:
    linears = {linear.name: linear for linear in checkpoint_of(tiny(family)).linears[0]}
    for name, shape in SHAPES[family].items():
        assert (linears[name].out_features, linears[name].in_features) == shape
        weight = torch.zeros(shape[::-1] if family == "gpt2" else shape)
        assert linears[name].matrix(weight).shape == shape
        assert linears[name].matrix(linears[name].matrix(weight)).shape == weight.shape


# [out, in] of the experts' linears, and how many experts
EXPERTS = {
    "mixtral": (4, (80, 24), (24, 40)),
    "qwen2_moe": (4, (32, 24), (24, 16)),
    "qwen3_moe-mixed": (4, (32, 24), (24, 16)),
    "olmoe": (5, (80, 24), (24, 40)),
    "gpt_oss": (4, (80, 24), (24, 40)),
}


@pytest.mark.parametrize("family", EXPERTS)
def test_every_expert_has_two_linears(family: str) -> None:
    count, up, down = EXPERTS[family]
    checkpoint = checkpoint_of(tiny(family))
    path, linears = "mlp.experts", {linear.name: linear for linear in checkpoint.linears[1]}
    found = [name for name in linears if "experts" in name]
    assert found == [f"{path}.{weight}[{e}]" for weight in ("gate_up_proj", "down_proj") for e in range(count)]
    for name, linear in linears.items():
        weight = naive.weight_of(checkpoint.model, f"model.layers.1.{name}")
        view = linear.matrix(checkpoint.weights(1)[linear.key])
        assert view.data_ptr() == weight.data_ptr() and torch.equal(view, weight)
        assert view.shape == weight.shape == (linear.out_features, linear.in_features)
        assert linear.size == weight.numel()
        if name in found:
            assert (linear.out_features, linear.in_features) == (up if "gate_up" in name else down)


@pytest.mark.parametrize("family", MIXTURES)
def test_all_of_a_mixture_is_pruned_but_what_chooses_experts(family: str) -> None:
    checkpoint = checkpoint_of(tiny(family))
    for block, linears, size in zip(checkpoint.blocks, checkpoint.linears, checkpoint.sizes, strict=True):
        weights = {name: p for name, p in block.named_parameters() if p.dim() > 1 and not name.endswith("_bias")}
        gates = {name for name in weights if ".gate." in name or ".router." in name or "shared_expert_gate" in name}
        assert {linear.key for linear in linears} == weights.keys() - gates
        assert size == sum(p.numel() for name, p in weights.items() if name not in gates)
        assert bool(gates) == any(linear.expert is not None for linear in linears)


def test_blocks_with_and_without_experts() -> None:
    sizes = checkpoint_of(tiny("qwen3_moe-mixed")).sizes
    assert sizes[0] == sizes[2] != sizes[1]


class OtherExperts(nn.Module):
    """Experts kept and run in a way of their own."""

    def __init__(self, **said: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(2, 6, 4)), nn.Parameter(torch.ones(2, 4, 3))
        for name, value in said.items():
            setattr(self, name, value)


def test_a_depthwise_convolution_and_a_stack_of_one_vector_are_no_linears() -> None:
    class Recurrence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, groups=4)
            self.mix, self.decay = nn.Parameter(torch.ones(1, 1, 4)), nn.Parameter(torch.ones(4, 2))
            self.x_proj, self.dt_proj = nn.Linear(16, 12), nn.Linear(2, 4)

    assert [linear.name for linear in find_linears(Recurrence())] == ["x_proj"]


def test_matrices_that_are_no_linears_and_hold_much_of_a_block_are_refused() -> None:
    """As DBRX keeps its experts: all of them in one matrix of two dimensions."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.ones(8, 4))

    with pytest.raises(UserError, match="model module Flat: w1 is a matrix in a form that is not known"):
        find_linears(nn.Sequential(nn.Linear(4, 4), Flat()))


@pytest.mark.parametrize("module", [OtherExperts(), OtherExperts(has_gate=False), nn.Conv1d(3, 3, 1)])
def test_weights_of_a_form_that_is_not_known_are_refused(module: nn.Module) -> None:
    with pytest.raises(UserError, match="has 3 dimensions in a form that is not known") as error:
        find_linears(nn.Sequential(nn.Linear(4, 4), module))
    assert str(error.value).startswith(f"model module {type(module).__name__}: ")
    assert len(str(error.value).splitlines()) == 1


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="has no list of blocks"):
        find_blocks(nn.Sequential(nn.Linear(3, 3)))


def test_a_block_without_linears_is_refused() -> None:
    with pytest.raises(UserError, match="model block Sequential: has no linear"):
        find_linears(nn.Sequential(nn.LayerNorm(3), nn.Embedding(3, 3)))


def test_the_list_with_the_most_parameters_is_taken() -> None:
    model = nn.Module()
    model.few = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
    model.many = nn.ModuleList([nn.Linear(9, 9)])
    assert (find_blocks(model).name, find_blocks(model).modules) == ("many", model.many)


def test_kin_of_linear_count_and_are_found_in_order() -> None:
    class Kin(nn.Linear):
        pass

    block = nn.ModuleDict({"b": Conv1D(5, 3), "a": nn.ModuleList([Kin(4, 2)]), "norm": nn.LayerNorm(3)})
    assert [(x.name, x.out_features, x.in_features, x.transposed) for x in find_linears(block)] == [
        ("b", 5, 3, True),
        ("a.0", 2, 4, False),
    ]


def test_weights_are_all_tensors_of_a_block() -> None:
    model = tiny("llama")
    model.model.layers[1].register_buffer("table", torch.ones(3))
    checkpoint = checkpoint_of(model)
    weights = checkpoint.weights(1)
    assert set(weights) == {name for name, _ in model.model.layers[1].named_parameters()} | {"table"}
    assert all(same_bits(tensor, model.model.layers[1].state_dict()[name]) for name, tensor in weights.items())
    assert not any(tensor.requires_grad for tensor in weights.values())


def test_keys_are_the_model_s_own_names() -> None:
    checkpoint = checkpoint_of(tiny("opt"))
    names = dict(checkpoint.model.named_parameters())
    for index, linears in enumerate(checkpoint.linears):
        for linear in linears:
            assert names[checkpoint.key(index, linear)].shape == (linear.out_features, linear.in_features)


def test_the_model_evaluates_and_is_given_back_as_it_was() -> None:
    model = tiny("mixtral").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    model.config.output_router_logits = True
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), checkpoint_of(model):
        assert not any(module.training for module in model.modules())
        assert not model.config.output_router_logits
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert model.config.output_router_logits


def test_a_model_that_is_loaded_keeps_no_gradients(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, torch.float32, CPU)
    assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())


@pytest.mark.parametrize(
    ("device", "host", "offload"),
    [(10**9, 10**9, "none"), (10**4, 10**9, "cpu"), (10**4, 10**4, "disk"), (10**9, 10**4, "none")],
)
def test_weights_lie_in_the_first_place_where_they_fit(
    device: int, host: int, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device_: device)
    monkeypatch.setattr(module, "host_memory", lambda: host)
    monkeypatch.setattr(module, "mapped_files", lambda: Mapped(((0, 2**63),)))
    monkeypatch.setattr(Checkpoint, "_place", lambda self, ahead: None)
    assert Checkpoint(tiny("llama"), torch.device("cuda")).offload == offload


def test_blocks_that_are_in_host_memory_already_fit_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 10**4)
    monkeypatch.setattr(module, "host_memory", lambda: 10**5)
    monkeypatch.setattr(Checkpoint, "_place", lambda self, ahead: None)
    assert Checkpoint(tiny("llama"), torch.device("cuda")).offload == "cpu"


@pytest.mark.parametrize("offload", ["cpu", "disk"])
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
    copies = {tensor.data_ptr() for tensor in checkpoint.weights(0).values()}
    assert not copies & set().union(*blocks)


def test_a_gpu_is_the_current_one_before_anything_is_put_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(device: torch.device) -> None:
        raise KeyError(str(device))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    for offload in ("none", "cpu", "disk"):
        with pytest.raises(KeyError, match="cuda:1"):
            Checkpoint(tiny("llama"), torch.device("cuda:1"), offload)  # type: ignore[arg-type]


def test_on_the_cpu_weights_lie_where_they_are_unless_it_plays_a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 0)
    assert checkpoint_of(tiny("llama")).offload == "none"
    monkeypatch.setenv("ATP_TUNE_DEVICE_MEMORY", "10kB")
    assert checkpoint_of(tiny("llama")).offload == "cpu"
    monkeypatch.setattr(module, "free_memory", lambda device: 800_000)
    assert checkpoint_of(tiny("llama")).offload == "none"
    assert Checkpoint(tiny("llama"), CPU, positions=(500, 2000)).offload == "none"
    assert Checkpoint(tiny("llama"), CPU, positions=(500, 6000)).offload == "cpu"  # twice 6000 · 24 · 4 bytes


@pytest.mark.parametrize(("offload", "mapped"), [("none", True), ("cpu", False), ("disk", True)])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_blocks_lie_where_the_residency_says(
    family: str, offload: Offload, mapped: bool, tmp_path: Path, cache: Path
) -> None:
    """In float32 as saved; what transformers puts together is mapped from a file without a name."""
    tiny(family).save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, torch.float32, CPU, offload=offload)
    files = mapped_files()
    for block in checkpoint.blocks:
        for name, tensor in block.named_parameters():
            if family != "mixtral" or offload != "none" or "experts" not in name:
                assert files.holds(tensor) == mapped, name
    assert not list(cache.glob("blocks/*"))
    saved = copy_of(tiny(family))
    assert all(same_bits(tensor, saved[name]) for name, tensor in copy_of(checkpoint.model).items())


def test_disk_also_holds_for_blocks_that_were_converted(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.load(tmp_path, torch.bfloat16, CPU, offload="disk")
    files, saved = mapped_files(), copy_of(tiny("llama"))
    for name, tensor in checkpoint.blocks.named_parameters(prefix=checkpoint.blocks_name):
        assert files.holds(tensor)
        assert same_bits(tensor, saved[name].to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "qwen2_moe-mixed"])
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "shape", "corrupt", "cut", "none", "config", "family", "vision"])
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, how: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    _break(tmp_path, how)
    with pytest.raises(UserError) as error:
        Checkpoint.load(tmp_path, torch.float32, CPU)
    assert str(error.value).startswith((f"model {tmp_path}: ", f"model.source: {tmp_path}/config.json is no JSON"))
    assert len(str(error.value).splitlines()) == 1
    if how in {"missing", "shape"}:
        assert "has no model.layers.1.mlp.up_proj.weight of the shape" in str(error.value)


def test_config_and_dtype() -> None:
    checkpoint = checkpoint_of(tiny("gpt2", torch.float16))
    assert checkpoint.config.n_layer == 3
    assert checkpoint.dtype == torch.float16


def test_shapes_are_the_weights_own() -> None:
    """Whatever a module calls its features."""
    odd = nn.Linear(4, 6)
    odd.in_features = odd.out_features = SimpleNamespace()  # type: ignore[assignment]
    assert [(x.out_features, x.in_features) for x in find_linears(nn.Sequential(odd))] == [(6, 4)]
