"""`speedup`: bytes of the files, plain and compressed; zeros by kind of linear; speed in torch and another engine."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from atp_tune.checkpoints.blocks import model_config
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.convert import dtypes as formats
from atp_tune.checkpoints.devices import find_device, find_dtype, oom_as_user_error
from atp_tune.checkpoints.files import read_header
from atp_tune.config.patterns import parse
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Step, TrialStarted
from atp_tune.folders.applying import cast
from atp_tune.folders.comparing import is_fast, pack_linears, packed_copy
from atp_tune.metrics import Sizes, Speed
from atp_tune.packed.gpu import has_kernel
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.layout import LEAST, Kind, packed_bytes
from atp_tune.plan import Plan
from atp_tune.pruners.selection import nonzeros
from atp_tune.run.session import Session
from atp_tune.speed.torch_engine import (
    EXACT,
    SEMI_STRUCTURED,
    Opening,
    Pair,
    Workload,
    check_semi_structured,
    dtypes,
    measured,
    opened,
    opened_in_memory,
    opened_semi_structured,
)
from atp_tune.utils.cache import cache_dir, check_room, temporary_folder
from atp_tune.utils.extras import require

# --- The engine `packed`: the sparse model without its zeros, by the kernels of `packed`, as transformers loads it.

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


def measure_in_memory(session: Session, plan: Plan, task: Workload, watch: EventHandler) -> Speed:
    """Bytes and rates of a plan, packed in memory, beside the dense model; UserError where it cannot be packed so.

    Bytes are of both models' weights there, in the number format of the computation: files may be in another.
    """
    checkpoint, folder = session.checkpoint, session.folder
    if checkpoint.offload != "none":
        raise UserError("the dense model does not fit into memory as a whole")
    sparse, count = packed_copy(checkpoint, session.prune(plan), "memory", "speedup DIR")
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


CHUNK = 16 << 20  # bytes per read
LEVEL = 3  # of zstd, its default
ENGINES: dict[str, Callable[[Pair, Workload, torch.device], list[Opening]]] = {
    "torch": lambda pair, task, device: [opened(pair, task, device, dtype) for dtype in dtypes(device)],
    PACKED: opened_packed,
    SEMI_STRUCTURED: lambda pair, task, device: [opened_semi_structured(pair, task, device)],
}


def default_engine(device: str, pattern: str) -> str:
    """The engine that is measured if none is named: `packed` where its kernel runs, else torch alone.

    Slim models are dense, so that torch measures them.
    """
    return PACKED if is_fast(find_device(device)) and not parse(pattern).channels else "torch"


def check(engine: str, pattern: str, device: str) -> None:
    """UserError if an engine cannot run here or not with this pattern; called before a model is pruned."""
    require("speed", "speedup", "zstandard")
    find_device(device)
    if engine != "torch" and parse(pattern).channels:
        raise UserError(f"--engine {engine}: runs models with zeros, and this one has fewer channels; take torch")
    if engine == PACKED:
        check_packed(find_device(device))
    if engine == SEMI_STRUCTURED:
        check_semi_structured(pattern, find_device(device))


def check_positions(pair: Pair, task: Workload) -> None:
    """UserError if the prompt and the tokens after it exceed the model's positions."""
    if pair.of_images:
        return
    config = model_config(pair.dense, pair.trusted).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and task.tokens + task.steps > positions:
        raise UserError(
            f"--tokens {task.tokens}: the model has {positions} positions, of which {task.steps} are for the tokens "
            "after the prompt; lower it"
        )


def measure(pair: Pair, engine: str, task: Workload, device: str, watch: EventHandler) -> Speed:
    """Measures sizes, zeros and rates of a pair of models; torch is measured beside every engine, for comparison."""
    check_positions(pair, task)
    place = find_device(device)
    first = ENGINES[engine](pair, task, place) if engine != "torch" else []
    with oom_as_user_error("speedup"):
        watch(TrialStarted("compressing the weight files", None))
        with in_format_of(pair.sparse, pair.dense) as dense:
            found = sizes(dense, pair.sparse, watch)
        with pair.load("sparse", torch.float32, torch.device("cpu")) as sparse:
            zeros = zeros_by_kind(sparse)
        openings = [("torch", each) for each in ENGINES["torch"](pair, task, place)]
        openings += [(engine, each) for each in first]
        engines = tuple(measured(opening, name, task, watch) for name, opening in openings)
        return Speed(sizes=found, zeros=zeros, engines=engines)


def zeros_by_kind(checkpoint: Checkpoint) -> dict[str, float]:
    """Share of zeros by name of the linear in its block, over all blocks."""
    zeros, sizes = Counter[str](), Counter[str]()
    for index, linears in enumerate(checkpoint.linears):
        weights = checkpoint.weights(index)
        for linear in linears:
            kind = re.sub(r"\[\d+\]$", "", linear.name)
            zeros[kind] += linear.size - int(nonzeros(linear.matrix(weights[linear.key])))
            sizes[kind] += linear.size
    return {kind: zeros[kind] / size for kind, size in sizes.items()}


@contextmanager
def in_format_of(sparse: Path, dense: Path) -> Iterator[Path]:
    """Yields the dense model's folder, or its weights in the number format of the sparse one: zeros save no bits there.

    The files of a .gguf model are in float32, its sparse model is as the study computed.
    """
    wanted, there = (
        {entry["dtype"] for file in folder.glob("*.safetensors") for entry in read_header(file).values()}
        for folder in (sparse, dense)
    )
    if wanted == there or len(wanted) != 1:
        yield dense
        return
    files, dtype = list(dense.glob("*.safetensors")), formats()[next(iter(wanted))]
    with temporary_folder(cache_dir("sparse") / "dense") as place:
        shapes = (entry["shape"] for file in files for entry in read_header(file).values())
        check_room(place, sum(map(prod, shapes)) * dtype.itemsize)
        for file in files:
            cast(file, place / file.name, dtype)
        yield place


def sizes(dense: Path, sparse: Path, watch: EventHandler) -> Sizes:
    """Bytes of the weight files of two folders, plain and with zstd."""
    from zstandard import ZstdCompressor

    files = [(folder, file) for folder in (dense, sparse) for file in sorted(folder.glob("*.safetensors"))]
    total = sum(file.stat().st_size for _, file in files)
    done, plain, packed, unpadded = 0, Counter[Path](), Counter[Path](), 0
    for folder, file in files:
        compressor = ZstdCompressor(level=LEVEL).compressobj()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                packed[folder] += len(compressor.compress(chunk))
                plain[folder] += len(chunk)
                done += len(chunk)
                watch(Step("compress", done, total))
        packed[folder] += len(compressor.flush())
        if folder == sparse:  # what a packed folder's files would have, but for their headers
            with safe_open(file, framework="pt") as tensors:
                unpadded += sum(packed_bytes(tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
    return Sizes(
        dense=plain[dense], sparse=plain[sparse], dense_zstd=packed[dense], sparse_zstd=packed[sparse],
        packed=unpadded,
    )  # fmt: skip
