"""Llama-2-7B and -70B shapes on one 80 GB GPU: seconds of a trial against its floor, streaming, memory.

    python benchmarks/gpu.py             both shapes, on CUDA; nothing is downloaded, it is to end within 4 minutes
    python benchmarks/gpu.py --tiny      the same code on tiny shapes, on any device, in seconds

`scripts/gpu` runs it after the tests and puts what it prints, which is Markdown, into docs/gpu.md.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.blocks.prune_pass import wait_for
from atp_tune.checkpoints.checkpoint import Checkpoint, LentModel
from atp_tune.checkpoints.devices import copy_to, device_name, find_device
from atp_tune.checkpoints.files import Offload
from atp_tune.config.prune import PruneConfig, make_plan
from atp_tune.config.study import ModelConfig
from atp_tune.events import Place
from atp_tune.inputs.items import Items
from atp_tune.plan import Plan
from atp_tune.pruners import sparsegpt
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.search.objective import Record

REPEATS = 10  # of each matmul of the floor
WAYS = ("resident", "streamed, copied ahead", "streamed, copied when asked for")
BUDGET = 140  # seconds after which no further measurement begins
SLOW = 25  # seconds of the products of a trial from which 7B is measured on half the windows
ABOUT = """\
Weights are random numbers in bfloat16, texts random tokens. 7B lies on the device whole: Wanda with 128 × 2048 tokens
to calibrate, and as many to evaluate, or half of both on a card that takes long for them. 70B has 16 × 2048 tokens of
each text, so that all fits into the time. All of its 80 blocks are run, but they share memory, since 140 GB are more
than most hosts have: one block of the device's where it is resident, 8 blocks of pinned host memory where it is
streamed, of which each is copied whenever one of the 80 is used, as one of its own would be. Nothing is extrapolated
unless a table says so.

The floor of the products is the time of the blocks' linears and of the head alone, multiplied with a batch as large as
the trial's, in the same run: the pass that listens has no last linear, and attention, norms and activations are not in
it. Pruning has no floor. The floor of the copies is the time of copying each block once from pinned memory with nothing
else going on. A trial's floor is the larger one; in brackets is how many times its floor something took.
"""


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


@dataclass(frozen=True)
class Floor:
    """Least seconds: of the products of a trial by phase, and of copying all blocks once."""

    calibrate: float
    evaluate: float
    copies: float

    @property
    def products(self) -> float:
        """Of a whole trial."""
        return self.calibrate + self.evaluate


SHAPES = (
    Shape("7B", 4096, 11008, 32, 32, 32, 32000, 128, 2048, 32),
    Shape("70B", 8192, 28672, 80, 64, 8, 32000, 16, 2048, 8),
)
TINY = (
    Shape("7B, tiny", 64, 160, 4, 4, 4, 512, 8, 32, 4),
    Shape("70B, tiny", 128, 320, 6, 8, 2, 512, 4, 32, 2),
)


# --- models with random weights


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


def open_context(shape: Shape, offload: Offload, distinct: int, device: torch.device, ahead: bool = True) -> Session:
    """A bench over random windows; the first block is pruned, and all run once, to warm up."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model = make_model(shape, distinct, device)
    checkpoint = Checkpoint(model, device, offload, ahead)
    for block in checkpoint.blocks:  # memory that is shared once more by parameters that are not
        put(block, {name: nn.Parameter(p.data, requires_grad=False) for name, p in block.named_parameters()})
    ids = torch.randint(shape.vocabulary, (2, shape.windows, shape.tokens), generator=torch.Generator().manual_seed(0))
    texts = {role: Items.windows(part.numpy()) for role, part in zip(("calibration", "validation"), ids, strict=True)}
    folder = LentModel(Path(tempfile.gettempdir()) / "nothing", "random", shape.name, model=model)
    setup = Setup(ModelConfig(source=shape.name), PruneConfig(), {}, Place(Path()))
    context = Session(folder, checkpoint, texts, setup)
    next(iter(context.prune(uniform(context))))
    return context


def uniform(context: Session, pruner: str = "wanda") -> Plan:
    """50 % everywhere."""
    return make_plan(pruner, "uniform", context.budget(0.5), {})


# --- what is measured


@dataclass(frozen=True)
class Trial:
    """Seconds of one trial by phase, and bytes at its peak."""

    seconds: dict[str, float]
    peak: int

    @property
    def whole(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def trial(context: Session) -> Trial:
    """One trial of Wanda."""
    record = Record(context)
    record.items["nlls"] = context.measure(uniform(context), [record, RoleScores("validation")])[1]["nlls"]
    found = record.close()
    return Trial(found["seconds"], max(found["peak_bytes"].values()))


def dense_seconds(context: Session) -> float:
    """Seconds of the dense model on the validation text, in which a block computes least while the next one comes."""
    began = perf_counter()
    context.measure(None, [RoleScores("validation")])
    return perf_counter() - began


def find_floor(context: Session, shape: Shape) -> Floor:
    """Seconds of the linears alone, by phase, and of the copies."""
    checkpoint, tokens = context.checkpoint, shape.windows * shape.tokens
    batch = context.batch("calibration").windows * shape.tokens
    weights = checkpoint.weights(0)
    each = {key: multiply(tensor, batch) * tokens / batch for key, tensor in weights.items() if tensor.dim() == 2}
    rows = min(batch, 2048)
    head = multiply(checkpoint.model.get_parameter("lm_head.weight"), rows) * tokens / rows
    once = sum(each.values())
    listen = once - each["mlp.down_proj.weight"]
    copies = copy_seconds(list(weights.values()), checkpoint.device)
    return Floor(shape.blocks * (listen + once), shape.blocks * once + head, shape.blocks * copies)


def multiply(weight: Tensor, rows: int) -> float:
    """Seconds of one product of inputs [rows, in] with a weight [out, in]."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return seconds_of(lambda: nn.functional.linear(x, weight), weight.device)


def copy_seconds(block: list[Tensor], device: torch.device) -> float:
    """Seconds that a block takes from pinned memory to the device."""
    is_cuda = device.type == "cuda"
    there = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda).copy_(tensor) for tensor in block]
    return seconds_of(lambda: [copy_to(device, tensor) for tensor in there], device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Mean seconds of some work, after it was done twice to warm up."""
    for repeats in (2, REPEATS):
        wait_for(device)
        began = perf_counter()
        for _ in range(repeats):
            work()
        wait_for(device)
    return (perf_counter() - began) / REPEATS


# --- what is printed


def line(*cells: object) -> None:
    """One row of a table, at once: the run may be cut off."""
    print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in cells)} |", flush=True)


def head(title: str, *cells: str) -> None:
    """The beginning of a table."""
    print(f"\n{title}\n")
    line(*cells)
    print(f"|{'---|' * len(cells)}", flush=True)


def show_trial(name: str, offload: Offload, found: Trial, floor: Floor) -> None:
    """A trial's row: seconds by phase, those with a floor over it, and memory."""
    least = floor.products if offload == "none" else max(floor.products, floor.copies)
    copies = "–" if offload == "none" else floor.copies
    phases = [
        f"{found.seconds[phase]:.2f} (×{found.seconds[phase] / of:.2f})"
        for phase, of in (("calibrate", floor.calibrate), ("evaluate", floor.evaluate))
    ]
    whole = f"{found.whole:.2f} (×{found.whole / least:.2f})"
    lies = {"none": "resident", "cpu": "streamed"}[offload]
    line(name, lies, *phases, found.seconds["prune"], whole, floor.products, copies, found.peak / 1e9)


def show_resident(shape: Shape, context: Session) -> Floor:
    """A trial with all weights on the device, of half the windows if it would take long; the floor of all."""
    floor, name = find_floor(context, shape), shape.name
    own = floor
    if floor.products > SLOW:
        name = f"{name}, {shape.windows // 2} windows"
        for role, windows in context.windows.items():
            context = context._with(role, windows.thinned(2))
        own = Floor(floor.calibrate / 2, floor.evaluate / 2, floor.copies)
    show_trial(name, "none", trial(context), own)
    return floor


def streamed(shape: Shape, device: torch.device, floor: Floor, is_late: Callable[[], bool]) -> list[float]:
    """A trial with copies made ahead; seconds of the dense model with copies ahead, and when they are asked for."""
    found = []
    for ahead in (True, False):
        if is_late():
            break
        context = open_context(shape, "cpu", shape.distinct, device, ahead)
        if ahead:
            show_trial(shape.name, "cpu", trial(context), floor)
        found.append(dense_seconds(context))
        del context
    return found


def sparsegpt_seconds(context: Session) -> dict[str, float]:
    """Seconds by phase of SparseGPT in the second block, after the first to warm up."""
    return list(islice(context.prune(uniform(context, "sparsegpt")), 2))[1].seconds


def show_sparsegpt(shape: Shape, found: dict[str, float], device: torch.device) -> None:
    """SparseGPT in one block, and its inner loop by the kernel and without."""
    total = shape.blocks
    head(f"SparseGPT, {shape.name}, one block; {total} blocks are extrapolated", "phase", "seconds", f"× {total}")
    for phase, seconds in found.items():
        line(phase, f"{seconds:.3f}", seconds * total)
    W, U = torch.randn(128, shape.width, device=device), torch.eye(128, device=device)
    fast = sparsegpt.on_gpu(device) if device.type == "cuda" else sparsegpt.strips
    head(f"Its inner loop over 128 columns of {shape.width} rows", "way", "milliseconds")
    for way in (fast, sparsegpt.plain):
        line(f"`{way.__name__}`", 1000 * seconds_of(partial(way, W, U, torch.zeros_like(W)), device))


def main() -> None:
    """Measures both shapes and prints their tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device, began = find_device("auto"), perf_counter()
    if device.type != "cuda" and not tiny:
        raise SystemExit("no CUDA device here; --tiny runs the same code anywhere")
    small, large = TINY if tiny else SHAPES
    print(f"{device_name(device)}, torch {torch.__version__}, {date.today()}\n\n{ABOUT}", flush=True)
    context = open_context(small, "none", small.distinct, device)
    show_sparsegpt(small, sparsegpt_seconds(context), device)
    of_trial = ("shape", "weights", "calibrate", "evaluate", "prune", "trial", "products", "copies", "peak memory, GB")
    head("One trial, in seconds", *of_trial)
    show_resident(small, context)
    del context
    context = open_context(large, "none", 1, device)
    floor = show_resident(large, context)
    rate = dense_seconds(context)
    del context
    ways = [rate, *streamed(large, device, floor, lambda: perf_counter() - began > BUDGET)]
    head(f"{large.name}, the dense model on the validation text", "weights", "seconds", "of the resident rate")
    for way, seconds in zip(WAYS, ways, strict=False):
        line(way, seconds, f"{rate / seconds:.0%}")
    print(f"\n{perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    main()
