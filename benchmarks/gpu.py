"""Llama-2-7B and -70B shapes on one 80 GB GPU: seconds of a trial against the matmul floor, streaming, memory.

    python benchmarks/gpu.py             both shapes, on CUDA; nothing is downloaded, it is to end within 8 minutes
    python benchmarks/gpu.py --tiny      the same code on tiny shapes, on any device, in seconds

Weights are random, in bfloat16. 7B lies on the device whole: Wanda with 128 x 2048 tokens to calibrate, and as many to
evaluate. 70B is streamed from pinned host memory, with 16 x 2048 tokens of each text so that all fits into the time.
Its 80 blocks share 8 blocks of distinct memory, since 140 GB are more than most hosts have; each of the 80 is still
copied whenever it is used, as one of its own would be. What it costs to have all of it resident is measured with blocks
that share one block of device memory.

The floor is the time of a block's linears alone, multiplied with a batch as large as the trial's, in the same run: the
pass that listens has no last linear, and attention, norms and activations are not in it. Pruning has no floor.
"""

import argparse
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import device_name, find_device, peak_memory, reset_peak_memory
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.checkpoints.residency import Residency
from atp_tune.plan import Plan
from atp_tune.search.bench import Bench
from atp_tune.search.record import Record
from atp_tune.spec.study import Prune
from atp_tune.texts.windows import Windows

REPEATS = 10  # of each matmul of the floor
BUDGET = 420  # seconds after which no further measurement begins


@dataclass(frozen=True)
class Shape:
    """A Llama, the texts that it is measured with, and how many blocks of memory its blocks share while they stream."""

    name: str
    width: int
    inner: int
    blocks: int
    heads: int
    keys: int
    vocabulary: int
    windows: int
    tokens: int
    distinct: int


SHAPES = (
    Shape("7B", 4096, 11008, 32, 32, 32, 32000, 128, 2048, 32),
    Shape("70B", 8192, 28672, 80, 64, 8, 32000, 16, 2048, 8),
)
TINY = (
    Shape("7B, tiny", 64, 160, 4, 4, 4, 512, 8, 32, 4),
    Shape("70B, tiny", 128, 320, 6, 8, 2, 512, 4, 32, 2),
)


def make_model(shape: Shape, distinct: int, device: torch.device) -> LlamaForCausalLM:
    """A random model in host memory, whose blocks take turns with `distinct` blocks of memory."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks, num_attention_heads=shape.heads, num_key_value_heads=shape.keys,
        max_position_embeddings=shape.tokens,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    pool = [fill(block, device) for block in model.model.layers[:distinct]]
    for index, block in enumerate(model.model.layers):
        put(block, pool[index % distinct])
    rest = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    for name in rest:
        put(model, {name: random_like(model.get_parameter(name), device)})
    return model


def fill(block: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Random tensors for a block, by name."""
    return {name: random_like(parameter, device) for name, parameter in block.named_parameters()}


def random_like(parameter: Tensor, device: torch.device) -> nn.Parameter:
    """Random numbers made on the device, which is much faster, and kept in host memory; norms are 1."""
    if parameter.dim() == 1:
        return nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
    made = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) / parameter.shape[-1] ** 0.5
    return nn.Parameter(made.cpu(), requires_grad=False)


def put(module: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Makes these the module's parameters."""
    for name, parameter in parameters.items():
        path, _, own = name.rpartition(".")
        setattr(module.get_submodule(path), own, parameter)


def open_bench(shape: Shape, residency: Residency, distinct: int, device: torch.device, ahead: bool = True) -> Bench:
    """A bench over random windows; the first block is pruned, and all run once, to warm up."""
    checkpoint = Checkpoint(make_model(shape, distinct, device), device, residency, ahead)
    for block in checkpoint.blocks:  # memory that is shared once more by parameters that are not
        put(block, {name: nn.Parameter(p.data, requires_grad=False) for name, p in block.named_parameters()})
    ids = torch.randint(shape.vocabulary, (2, shape.windows, shape.tokens), generator=torch.Generator().manual_seed(0))
    texts = {role: Windows(part.numpy(), role) for role, part in zip(("calibration", "search"), ids, strict=True)}
    folder = ModelFolder(Path(tempfile.gettempdir()) / "nothing", "random", shape.name)
    bench = Bench(folder, checkpoint, texts, Prune(), lambda event: None)
    next(iter(bench.prune(uniform(bench))))
    return bench


def uniform(bench: Bench) -> Plan:
    """Wanda, 50 % everywhere."""
    return Plan("wanda", "uniform", (0.5,) * len(bench.checkpoint.blocks))


def trial(bench: Bench) -> dict[str, Any]:
    """One trial: what its record says."""
    record = Record(bench.checkpoint.device, bench.dtype)
    blocks = record.follow(bench.prune(uniform(bench)), bench.checkpoint.sizes)
    record.nlls = bench.all_nlls(blocks, "search")
    return record.close()


def dense_seconds(bench: Bench) -> float:
    """Seconds of the dense model on the search text, in which a block computes least while the next one comes."""
    began = perf_counter()
    bench.all_nlls(bench.dense(), "search")
    return perf_counter() - began


def floor(bench: Bench, shape: Shape) -> dict[str, float]:
    """Seconds of the linears alone, by phase."""
    checkpoint, tokens = bench.checkpoint, shape.windows * shape.tokens
    batch = bench.batch("calibration").windows * shape.tokens
    block = {name: tensor for name, tensor in checkpoint.weights(0).items() if tensor.dim() == 2}
    each = {name: multiply(tensor, batch) * tokens / batch for name, tensor in block.items()}
    head = multiply(checkpoint.model.get_output_embeddings().weight, min(batch, 2048)) * tokens / min(batch, 2048)
    once = sum(each.values())
    listen = once - each["mlp.down_proj.weight"]
    return {"calibrate": shape.blocks * (listen + once), "evaluate": shape.blocks * once + head}


def multiply(weight: Tensor, rows: int) -> float:
    """Seconds of one product of inputs [rows, in] with a weight [out, in]."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    for repeats in (2, REPEATS):
        wait(weight.device)
        began = perf_counter()
        for _ in range(repeats):
            nn.functional.linear(x, weight)
        wait(weight.device)
    return (perf_counter() - began) / REPEATS


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(*cells: object) -> None:
    """One row of a table, at once: the run may be cut off."""
    print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def show_trial(name: str, way: str, found: dict[str, Any], least: dict[str, float]) -> None:
    """A trial's row: seconds by phase, those with a floor over it, and memory."""
    seconds = found["seconds"]
    phases = [f"{seconds[phase]:.2f} (×{seconds[phase] / least[phase]:.2f})" for phase in ("calibrate", "evaluate")]
    whole = sum(seconds.values())
    peak = max(found["peak_bytes"].values()) / 1e9
    line(name, way, *phases, seconds["prune"], f"{whole:.2f} (×{whole / sum(least.values()):.2f})", peak)


def resident(shape: Shape, device: torch.device, distinct: int) -> tuple[float, dict[str, float]]:
    """A trial with all weights on the device: seconds of the dense model, and the floor."""
    bench = open_bench(shape, "device", distinct, device)
    least = floor(bench, shape)
    show_trial(shape.name, "resident", trial(bench), least)
    return dense_seconds(bench), least


def streamed(shape: Shape, device: torch.device, least: dict[str, float], late: bool) -> list[float]:
    """A trial with copies made ahead; seconds of the dense model with copies ahead, and when they are asked for."""
    found = []
    for ahead in (True, False):
        if not ahead and late:
            break
        reset_peak_memory(device)
        bench = open_bench(shape, "host", shape.distinct, device, ahead)
        if ahead:
            show_trial(shape.name, "streamed", trial(bench), least)
        found.append(dense_seconds(bench))
        del bench
    return found


def main() -> None:
    """Measures both shapes and prints two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device, began = find_device("auto"), perf_counter()
    if device.type != "cuda" and not tiny:
        raise SystemExit("no CUDA device here; --tiny runs the same code anywhere")
    small, large = TINY if tiny else SHAPES
    print(f"{device_name(device)}, torch {torch.__version__}, {date.today()}; seconds (× matmul floor), GB\n")
    line("shape", "weights", "calibrate", "evaluate", "prune", "trial", "peak memory")
    print(f"|{'---|' * 7}")
    resident(small, device, small.distinct)
    rate, least = resident(large, device, 1)
    ways = [rate, *streamed(large, device, least, perf_counter() - began > BUDGET)]
    print(f"\n{large.name}, dense model on the search text\n")
    line("weights", "seconds", "of the resident rate")
    print("|---|---|---|")
    for way, seconds in zip(
        ("resident", "streamed, copied ahead", "streamed, copied when asked for"), ways, strict=False
    ):
        line(way, seconds, f"{rate / seconds:.0%}")
    print(f"\n{perf_counter() - began:.0f} s in all, peak {peak_memory(device) / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
