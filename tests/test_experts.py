"""Mixtures of experts: who hears what, experts that hear nothing, and the way from a study to a sparse folder."""

from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from expect import parametrize, slow
from families import MIXTURES, TOKENS, bench_of, few, nlls_of, same_bits, tiny
from plans import planned
from safetensors.torch import load_file
from test_input_hooks import gather
from tinystudy import make_tokenizer, study_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from atp_tune.api.pruning import prune_study
from atp_tune.blocks.replay import block_bytes
from atp_tune.checkpoints.blocks import expert_inputs, find_linears
from atp_tune.config.prune import PruneConfig
from atp_tune.events import ignore_events
from atp_tune.pruners.statistics import InputNorms

# --- in which order they are added up


class Additions(TorchDispatchMode):
    """Operations that add floats in the order in which threads arrive on CUDA, unless each place is met but once."""

    def __init__(self) -> None:
        super().__init__()
        self.unordered: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = str(func), kwargs or {}
        self.seen += 1
        accumulates = "index_put" in name and (options.get("accumulate") or args[3:4] == (True,))
        adds = any(word in name for word in ("index_add", "scatter_add", "scatter_reduce", "index_reduce"))
        if (adds or accumulates) and args[0].is_floating_point():
            places = args[1][0] if accumulates else args[2]
            if len(places.unique()) < places.numel():
                self.unordered.append(name)
        return func(*args, **options)


@slow
@parametrize("statistics", ["block", "sequential"])
@parametrize("family", MIXTURES)
def test_a_mixture_is_summed_in_a_fixed_order(family: str, statistics: Any) -> None:
    """Else a trial on CUDA would come to other bits each time."""
    work = bench_of(tiny(family), PruneConfig(statistics=statistics))
    plan = planned("wanda", "uniform", (0.5,) * len(work.checkpoint.blocks))
    with Additions() as additions:
        nlls_of(work, [(block.index, block.weights) for block in work.prune(plan)], "validation")
    assert additions.seen > 100
    assert additions.unordered == []


# --- who hears what


def heard_by(block: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """Statistics of the mixture of a block, called as the block calls it."""
    return gather(block, InputNorms, batches)


def mixture(family: str = "qwen2_moe") -> Any:
    return tiny(family).model.layers[1].mlp


def test_each_expert_hears_its_tokens_over_all_batches() -> None:
    batches = [torch.randn(2, TOKENS, 24), torch.randn(1, 1, 24)]  # two experts hear nothing of the second
    block, found = mixture(), heard_by(mixture(), batches)
    flat = torch.cat([x.reshape(-1, 24) for x in batches])
    chosen = block.gate(flat)[-1]
    inputs = naive.expert_inputs(block.experts, "experts", flat, chosen)
    assert set(inputs) < set(found)
    for name, x in inputs.items():
        assert_close(found[name].norms(), x.norm(dim=0))
    assert_close(found["shared_expert.up_proj"].norms(), flat.norm(dim=0))
    assert len({id(found[name]) for name in inputs}) == len(inputs)
    assert found["shared_expert.up_proj"] is found["shared_expert.gate_proj"]


def test_experts_without_a_gate() -> None:
    """Nemotron's: W_up alone, and the activation."""
    experts: Any = nn.Module()
    experts.up_proj, experts.down_proj = nn.Parameter(torch.randn(2, 5, 4)), nn.Parameter(torch.randn(2, 4, 5))
    experts.num_experts, experts.has_gate, experts.has_bias, experts.is_transposed = 2, False, False, False
    experts.act_fn, experts._apply_gate = torch.relu, None
    names = [linear.name for linear in find_linears(nn.ModuleDict({"experts": experts}))]
    assert names == ["experts.up_proj[0]", "experts.up_proj[1]", "experts.down_proj[0]", "experts.down_proj[1]"]
    x = torch.randn(3, 4)
    chosen = torch.tensor([[1], [0], [1]])
    (expert, rows), (other, inner) = (list(expert_inputs(experts, w, x, chosen))[1] for w in ("up_proj", "down_proj"))
    assert expert == other == 1
    assert torch.equal(rows, x[[0, 2]])
    assert_close(inner, torch.relu(x[[0, 2]] @ experts.up_proj[1].T))


# --- experts that hear nothing


def silence(model: Any) -> Any:
    """The model with an expert of block 1 that never is among the first two: expert 2."""
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        if hasattr(mlp, "router"):
            mlp.router.bias[2] = -1e4
            return model
        center, one, other = torch.randn(3, mlp.gate.weight.shape[1])
        mlp.gate.weight.copy_(torch.stack([center + one, center - one, center, center + other, center - other]))
    return model


# --- the whole way


def test_activations_are_of_the_experts_that_a_token_meets() -> None:
    """In the largest block: attention, the expert that all tokens share, and 2 of 4 experts."""
    work = bench_of(tiny("qwen2_moe-mixed"))
    attention = (24 + 24) + 2 * (24 + 12) + (24 + 24)
    experts, shared = 2 * ((24 + 32) + (16 + 24)), 3 * (24 + 20)
    assert block_bytes(work.checkpoint) == 2 * 4 * (attention + experts + shared)


@pytest.fixture
def mixed(place: Path) -> Path:
    """The tiny study with a mixture in which one expert is never asked."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "olmoe", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=20, num_hidden_layers=3, num_experts=5,
        num_attention_heads=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = silence(AutoModelForCausalLM.from_config(config)).eval()
    for file in (place / "model").glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(place / "model", max_shard_size="60KB")
    return place


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@slow
@parametrize("pruner", few(["wanda", "sparsegpt"], ["wanda"]))
def test_a_sparse_folder_of_a_mixture(pruner: str, mixed: Path, tmp_path: Path) -> None:
    file, out = study_file(mixed, f"prune.pruners=['{pruner}']", "sparsity=0.5"), tmp_path / "out"
    plan, written = prune_study(file, {"beta": 0.1}, out, ignore_events)
    _, measured = prune_study(file, {"beta": 0.1}, None, ignore_events)
    assert written.value == pytest.approx(measured.value, rel=1e-6)
    before, after = tensors(mixed / "model"), tensors(out)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if not key.endswith("_proj.weight"):
            assert same_bits(after[key], tensor), key
            continue
        index, silent = int(key.split(".")[2]), ".1.mlp.experts.2." in key
        zeros = int((after[key] == 0).sum())
        if pruner == "wanda" and not silent:
            assert zeros == tensor.shape[0] * int(tensor.shape[1] * plan.amounts[index])
        elif ".experts." not in key or ".down_proj." in key:
            assert zeros == int(tensor.numel() * plan.amounts[index])
    assert sum(".experts." in key for key in after) == 3 * 5 * 3
