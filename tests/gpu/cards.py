"""A Llama that keeps a GPU busy, a bench over it, and a device with little memory."""

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from families import NoFolder, setup_of
from plans import planned
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import Tensors
from atp_tune.checkpoints.files import Offload
from atp_tune.config.prune import PruneConfig
from atp_tune.inputs.items import Items
from atp_tune.plan import Plan
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session
from atp_tune.search.objective import Record

MIB = 1 << 20
VOCABULARY = 512


def llama(device: torch.device, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights at each call, in host memory: blocks of 46 MB for a GPU, so that copies and kernels overlap."""
    width, inner, blocks = (1024, 2752, 8) if device.type == "cuda" else (64, 160, 4)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():  # random numbers by the hundred million
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).cpu().eval().requires_grad_(False)


def bench_on(
    device: torch.device,
    offload: Offload | None = "none",
    dtype: torch.dtype = torch.float32,
    prune: PruneConfig | None = None,
    windows: int = 16,
) -> Session:
    """A bench over so many random windows a text, for a GPU of 512 tokens."""
    tokens = 512 if device.type == "cuda" else 32
    ids = torch.randint(VOCABULARY, (2, windows, tokens), generator=torch.Generator().manual_seed(0))
    texts = {role: Items.windows(part.numpy()) for role, part in zip(("calibration", "validation"), ids, strict=True)}
    model = llama(device, dtype)
    folder = NoFolder(Path(), "random", "llama")
    return Session(folder, Checkpoint(model, device, offload), texts, setup_of(prune))


def plan(context: Session, pruner: str = "wanda") -> Plan:
    """Half of the weights of each block."""
    return planned(pruner, "uniform", (0.5,) * len(context.checkpoint.blocks))


def trial(context: Session, pruner: str = "wanda") -> Record:
    """A trial as the objective runs it; its record is not closed yet."""
    record = Record(context)
    record.items["nlls"] = context.measure(plan(context, pruner), [record, RoleScores("validation")])[1]["nlls"]
    return record


def pruned_blocks(context: Session, pruner: str = "wanda") -> list[Tensors]:
    """The blocks that a plan comes to, in host memory."""
    return [
        {name: tensor.cpu() for name, tensor in block.weights.items()} for block in context.prune(plan(context, pruner))
    ]


def held(device: torch.device) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated(device)


def let_go(device: torch.device) -> None:
    """Frees what nobody refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def little_memory(device: torch.device, room: int) -> Iterator[None]:
    """So many bytes more than are taken, and the device's own error where somebody wants more than that."""
    let_go(device)
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + room) / whole, device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def same_blocks(some: list[Tensors], others: list[Tensors]) -> bool:
    """Whether all tensors of all blocks are equal byte by byte."""
    return len(some) == len(others) and all(
        one.keys() == other.keys() and all(_same(tensor, other[name]) for name, tensor in one.items())
        for one, other in zip(some, others, strict=True)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
