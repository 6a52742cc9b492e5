"""The engine `packed`: the sparse model without its zeros, by the kernels of `packed`, as transformers loads it."""

from functools import partial

import torch

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import find_dtype
from atp_tune.errors import UserError
from atp_tune.events import EventHandler
from atp_tune.metrics.speed import Sizes, Speed
from atp_tune.packed.gpu import has_kernel
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.layout import LEAST, Kind
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.sparse.comparing import pack_linears, packed_copy
from atp_tune.speed.model_pair import Pair
from atp_tune.speed.throughput import Opening, Workload, measured
from atp_tune.speed.torch_engine import EXACT, opened, opened_in_memory

PACKED = "packed"


def check_packed(device: torch.device) -> None:
    """UserError if the kernel does not run here."""
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--engine {PACKED}: runs on a CPU, not on {device.type}; give --device cpu")
    if device.type == "cuda" and not has_kernel(device):
        raise UserError(f"--engine {PACKED}: its Triton kernel does not run here; give --device cpu or --engine torch")
    if device.type == "cpu" and kernel_name() is None:
        raise UserError(
            f"--engine {PACKED}: the kernel is not here; install with a C compiler (cc) or the wheel ziglang, "
            "or give --engine torch"
        )


def opened_packed(pair: Pair, task: Workload, device: torch.device) -> list[Opening]:
    """Opens both models in the fast number format of the device: with the weights as they are, then rounded."""
    check_packed(device)
    dtype = find_dtype("auto", device)
    kinds: list[Kind] = ["same", "bf16", "int8"] if dtype == torch.float32 else ["same", "int8"]
    names = {kind: PACKED if kind == "same" else f"{PACKED} {kind}" for kind in kinds}
    limits: dict[Kind, float] = {"same": EXACT[dtype]}  # rounded weights differ by how far they are rounded
    return [
        opened(pair, task, device, dtype, names[kind], partial(packed, kind=kind), limits.get(kind)) for kind in kinds
    ]


def measure_in_memory(context: Session, plan: Plan, task: Workload, watch: EventHandler) -> Speed:
    """Bytes and rates of a plan, packed in memory, beside the dense model; UserError where it cannot be packed so.

    Bytes are of both models' weights there, in the number format of the computation: files may be in another.
    """
    checkpoint, folder = context.checkpoint, context.folder
    if checkpoint.offload != "none":
        raise UserError("the dense model does not fit into memory as a whole")
    sparse, count = packed_copy(checkpoint, context.prune(plan), "memory", "speedup DIR")
    if not count:
        raise UserError(f"no linear of the best plan has {LEAST:.0%} zeros, from which packing makes it smaller")
    pair = Pair(folder.path, folder.path, trusted=folder.trusted)
    dense, packed = (sum(weight.nbytes for weight in model.parameters()) for model in (checkpoint.model, sparse))
    sizes = Sizes(dense=dense, sparse=dense, packed=packed)
    opening = opened_in_memory(pair, checkpoint, sparse, task, PACKED)
    return Speed(sizes=sizes, engines=(measured(opening, PACKED, task, watch),))


def packed(checkpoint: Checkpoint, kind: Kind = "same") -> None:
    """Replaces the sparse linears of a model by packed ones; UserError if there is none."""
    if not pack_linears(checkpoint, kind):
        raise UserError(f"--engine {PACKED}: no linear of the model has {LEAST:.0%} zeros")
