import json
import re
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, refused, slow
from families import CPU, TOKENS, bench_of, checkpoint_of, random_ids, same_bits, tiny
from plans import planned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_config import config
from torch import Tensor
from transformers import AutoModelForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.config.best import read_config
from atp_tune.folders.applying import Shards, write_sparse
from atp_tune.run.session import Session


def raw(folder: Path) -> dict[str, tuple[str, str, list[int], bytes]]:
    """Each tensor of a folder, read without a library: file, number format, shape, bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        for key, entry in json.loads(content[8 : 8 + length]).items():
            if key != "__metadata__":
                start, end = (8 + length + offset for offset in entry["data_offsets"])
                found[key] = (file.name, entry["dtype"], entry["shape"], content[start:end])
    return found


def metadata(file: Path) -> Any:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]).get("__metadata__")


def bench_over(folder: Path, dtype: torch.dtype = torch.float32) -> Session:
    """A bench over the folder as the engine would load it."""
    return bench_of(Checkpoint.load(folder, dtype, CPU).model, folder=folder)


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    tiny(family, dtype).save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    return folder


def save_base(family: str, folder: Path) -> Path:
    """The model without its head, so that names lack the prefix."""
    model = tiny(family)
    getattr(model, model.base_model_prefix).save_pretrained(folder)
    return folder


SOURCES: dict[str, Any] = {
    "one shard": lambda folder: save("llama", folder),
    "many shards": lambda folder: save("llama", folder, max_shard_size="20KB"),
    "a shard per tensor": lambda folder: save("llama", folder, max_shard_size="1KB"),
    "tied embeddings": lambda folder: save("llama-tied", folder, max_shard_size="20KB"),
    "transposed": lambda folder: save("gpt2", folder, max_shard_size="30KB"),
    "transposed, without prefix": lambda folder: save_base("gpt2", folder),
    "without prefix": lambda folder: save_base("llama-tied", folder),
    "opt": lambda folder: save("opt", folder),
    "bloom": lambda folder: save("bloom", folder),
    "falcon": lambda folder: save("falcon", folder),
    "phi3": lambda folder: save("phi3", folder),
    "fp16": lambda folder: save("llama", folder, torch.float16, max_shard_size="20KB"),
    "mixtral": lambda folder: save("mixtral", folder, max_shard_size="20KB"),
    "qwen2_moe": lambda folder: save("qwen2_moe", folder),
    "experts in some blocks": lambda folder: save("qwen3_moe-mixed", folder, max_shard_size="40KB"),
    "olmoe in bf16": lambda folder: save("olmoe", folder, torch.bfloat16, max_shard_size="20KB"),
    "experts together": lambda folder: save("qwen3_moe", folder, save_original_format=False),
    "experts without prefix": lambda folder: save_base("qwen2_moe-mixed", folder),
    "gpt_oss": lambda folder: save("gpt_oss", folder),
    "bf16": lambda folder: save("gpt2", folder, torch.bfloat16),
}


def source_key(name: str, keys: Any, prefix: str) -> str:
    return name if name in keys else name.removeprefix(f"{prefix}.")


def pruned_keys(work: Session, keys: Any) -> dict[str, tuple[int, str, Any]]:
    """Key in the source, block, name in the block and place in that tensor of each matrix."""
    checkpoint, found = work.checkpoint, {}
    for index, linears in enumerate(checkpoint.linears):
        for x in linears:
            key = source_key(checkpoint.key(index, x), keys, checkpoint.model.base_model_prefix)
            if x.expert is None or key in keys:
                found[key] = index, x.key, slice(None)
                continue
            mixtral = checkpoint.config.model_type == "mixtral"
            half = x.out_features // 2
            halves = {"gate_proj": slice(half), "up_proj": slice(half, None)}
            for part, rows in (halves if "gate_up" in key else {"down_proj": slice(None)}).items():
                name = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part] if mixtral else part
                stem = f"{checkpoint.blocks_name}.{index}.{'block_sparse_moe' if mixtral else 'mlp'}.experts.{x.expert}"
                one = source_key(f"{stem}.{name}.weight", keys, checkpoint.model.base_model_prefix)
                found[one] = index, x.key, (x.expert, rows)
    return found


UPDATED = ("many shards", "transposed", "mixtral", "gpt_oss", "bf16")  # in the fast suite by SparseGPT too
CASES = [
    *((source, "wanda") for source in SOURCES),
    *(pytest.param(source, "sparsegpt", marks=() if source in UPDATED else pytest.mark.slow) for source in SOURCES),
]


@slow
@parametrize(("source", "pruner"), CASES)
def test_what_is_written(source: str, pruner: str, tmp_path: Path) -> None:
    folder, out = SOURCES[source](tmp_path / "dense"), tmp_path / "sparse"
    before, work = raw(folder), bench_over(folder)
    plan = planned(pruner, "uniform", (0.5,) * len(work.checkpoint.blocks))
    write_sparse(work, plan, out, config())
    after, blocks = raw(out), list(work.prune(plan))

    linears = pruned_keys(work, before)
    assert set(linears) <= set(before) == set(after)
    for key in before:
        if key not in linears:
            assert after[key] == before[key], key  # file, number format, shape and every byte
        assert after[key][:3] == before[key][:3]
    found = {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
    dense = {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
    for key, (index, name, place) in linears.items():
        sparse = blocks[index].weights[name][place]
        assert same_bits(found[key], sparse.to(dense[key].dtype)), key
        if pruner == "wanda":
            assert same_bits(found[key], dense[key].masked_fill(sparse == 0, 0)), key
    assert raw(folder) == before
    if pruner == "wanda":
        check_that_anybody_can_load(out, work, blocks)


def check_that_anybody_can_load(out: Path, work: Session, blocks: list[Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    loaded = checkpoint_of(model)
    for block in blocks:
        weights = loaded.weights(block.index)
        for linear in loaded.linears[block.index]:
            assert same_bits(weights[linear.key], block.weights[linear.key])
    dense = work.checkpoint.model
    ids = random_ids(2, TOKENS)
    with torch.inference_mode():
        for block in blocks:
            work.checkpoint.blocks[block.index].load_state_dict(block.weights)
        assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)


@slow
def test_files_beside_the_weights(tmp_path: Path) -> None:
    folder, out = SOURCES["many shards"](tmp_path / "dense"), tmp_path / "deep" / "sparse"
    for name in ("pytorch_model.bin", "model.gguf", "old.pt"):
        (folder / name).write_text("weights in another form")
    plan = planned("wanda", "uniform", (0.5,) * 4)
    write_sparse(bench_over(folder), plan, out, config())
    left_out = {"pytorch_model.bin", "model.gguf", "old.pt", "notes"}
    names = {file.name for file in folder.iterdir()} - left_out
    assert {file.name for file in out.iterdir()} == names | {"atp_tune.json", "README.md"}
    assert read_config(out / "atp_tune.json").plan == config().plan
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        else:
            assert metadata(out / name) == metadata(folder / name) == {"format": "pt"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}
    assert [file.name for file in out.parent.iterdir()] == ["sparse"]


@slow
def test_weights_that_were_not_pruned_keep_what_the_compute_format_loses(tmp_path: Path) -> None:
    """float32 on disk, computed in bf16: what stays is the source's float32."""
    folder, out = save("llama", tmp_path / "dense"), tmp_path / "sparse"
    work, plan = bench_over(folder, torch.bfloat16), planned("wanda", "uniform", (0.5,) * 4)
    write_sparse(work, plan, out, config())
    dense, sparse = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    for block in work.prune(plan):
        for linear in work.checkpoint.linears[block.index]:
            key = work.checkpoint.key(block.index, linear)
            mask = block.weights[linear.key] == 0
            assert same_bits(sparse[key], dense[key].masked_fill(mask, 0))
            assert not torch.equal(dense[key], dense[key].bfloat16().float())


def anonymous() -> int:
    """Bytes that this process holds apart from mapped files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])  # type: ignore[index]


@slow
def test_no_shard_is_held_in_memory(tmp_path: Path) -> None:
    """Not even where a source spreads the tensors that are pruned together over all of its shards."""
    out, size, count = tmp_path / "out", (1024, 1024), 8  # 4 MiB a tensor
    out.mkdir()
    for shard in range(count):
        save_file({f"{block}.{shard}": torch.rand(size) for block in range(4)}, tmp_path / f"{shard}.safetensors")
    names = [f"{block}.{shard}" for block in range(4) for shard in range(count)]
    held = []

    def pruned() -> Any:
        for name in names:
            with safe_open(tmp_path / f"{name[2:]}.safetensors", framework="pt") as tensors:
                dense = tensors.get_tensor(name)
            yield name, dense, torch.zeros_like(dense)
            held.append(anonymous())

    Shards(tmp_path, "model").write(out, set(names), pruned())
    assert max(held) - held[0] < 16 * 2**20  # a shard
    assert all(not tensor.any() for file in out.iterdir() for tensor in load_file(file).values())


def _changed(tensor: Tensor) -> Tensor:
    other = tensor.clone()
    other[0, 0] += 1
    return other


@parametrize("change", [_changed, lambda tensor: tensor.T.contiguous()])
def test_a_source_that_is_not_what_was_loaded(change: Any, tmp_path: Path) -> None:
    folder, out = save("llama", tmp_path / "dense"), tmp_path / "sparse"
    work = bench_over(folder)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, key: change(tensors[key])}, folder / "model.safetensors", {"format": "pt"})
    with refused(f"{key} in model.safetensors is not what transformers loaded"):
        write_sparse(work, planned("wanda", "uniform", (0.5,) * 4), out, config())
    assert not out.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]
