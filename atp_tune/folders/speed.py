"""The engines `torch` and `semi-structured`: the models as transformers computes them.

`torch` multiplies by zeros too. `semi-structured` runs a 2:4 model on the sparse tensor cores of an NVIDIA GPU, by
`torch.sparse`; the dense model runs in the same number format on the usual tensor cores.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import StaticCache
from transformers.utils import logging as hf_logging

from atp_tune.blocks.prune_pass import wait_for
from atp_tune.checkpoints import convert
from atp_tune.checkpoints.blocks import classifies_images, model_config
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import arithmetic, device_name, find_device, find_dtype, oom_as_user_error
from atp_tune.checkpoints.files import check_claims, read_headers
from atp_tune.checkpoints.models import ModelFolder, check_files, resolve
from atp_tune.config.best import Config
from atp_tune.config.prune import parse
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError, within
from atp_tune.events import EventHandler, Place, Step, TrialStarted
from atp_tune.folders.applying import PLAIN, cast, check_model, write_applied
from atp_tune.folders.card import ABOUT
from atp_tune.folders.comparing import is_fast, pack_linears, packed_copy
from atp_tune.folders.slim import SLIM
from atp_tune.inputs import KINDS
from atp_tune.inputs.pictures import ImageProcessor, Pictures
from atp_tune.inputs.windows import vocabulary
from atp_tune.metrics import GRAPH, SIDES, Measured, Phase, Side, Sizes, Speed
from atp_tune.packed.gpu import has_kernel
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.layout import Kind, packed_bytes
from atp_tune.packed.modeling_atp_sparse import LEAST
from atp_tune.plan import Plan
from atp_tune.pruners.selection import nonzeros
from atp_tune.run.session import Session, Setup
from atp_tune.utils.cache import cache_dir, check_room, folder_atomically, key, temporary_folder
from atp_tune.utils.system import cpu_name, launches, require

# --- The two models to compare: a sparse checkpoint and its dense model.


@dataclass(frozen=True)
class Pair:
    """Both folders, the pattern of zeros, and whether the dense model's own code may run."""

    dense: Path
    sparse: Path
    pattern: str = "unstructured"
    trusted: bool = False

    @property
    def of_images(self) -> bool:
        """Whether the models are image classifiers."""
        return classifies_images(self.dense)

    def load(self, side: Side, dtype: torch.dtype, device: torch.device) -> Checkpoint:
        """Loads one of the models, whole on the device."""
        return Checkpoint.load(
            self.dense if side == "dense" else self.sparse, dtype, device, self.trusted, offload="none"
        )


def about(folder: Path) -> Path:
    """The path of the configuration in a sparse checkpoint; UserError if it has none."""
    path = folder / ABOUT
    if not path.is_file():
        raise UserError(f"{folder}: has no {ABOUT}; give a folder that `apply` wrote, or --config FILE")
    return path


def find_pair(config: Config, sparse: Path | None, place: Place, passing: Path | None = None) -> Pair:
    """The dense model of a configuration, and its sparse model.

    If `sparse` is None, the sparse model is pruned into the cache, as `apply` does, or into the folder `passing`,
    unless the cache has it; one of pruned channels is slim.
    UserError if the dense model is not the configuration's.
    """
    if config.only_rounds:
        raise UserError(
            "speedup: weights are rounded, and run as floats, as fast as the dense model's; "
            "`apply --format` writes them for engines that compute with bits"
        )
    dense = resolve(config.model.model(place.allowed), place.base, place.note)
    check_model(config, dense)
    if sparse is not None and convert.is_packed(sparse):
        sparse = resolve(ModelConfig(source=str(sparse.absolute())), place.base, place.note).path
    elif sparse is not None:
        check_files(sparse)
        check_claims(sparse)
    else:
        cached = _cached(config, dense, place)
        sparse = cached if passing is None or cached.is_dir() else passing
        if not sparse.is_dir():
            with folder_atomically(sparse, shared=True) as folder:
                write_applied(config, folder, place, SLIM if parse(config.prune.pattern).channels else PLAIN)
    return Pair(dense.path, sparse, config.prune.pattern, dense.trusted)


@contextmanager
def passing_pair(config: Config, place: Place) -> Iterator[Pair]:
    """The pair of a configuration; what this writes is removed at the end, and no other process reads it."""
    with temporary_folder(cache_dir("sparse") / "passing") as folder:
        yield find_pair(config, None, place, folder / "sparse")


def _cached(config: Config, dense: ModelFolder, place: Place) -> Path:
    """The folder in the cache of a configuration's sparse model."""
    setup = Setup.of_config(config, place)
    items = KINDS[setup.inputs].read(setup.texts, dense, place.base, bool(setup.bos))
    device = find_device(place.device)
    return cache_dir("sparse") / key(
        "sparse",
        config=config.weights_id,
        batches=dict(config.batches),
        text=items["calibration"].content,
        arithmetic=arithmetic(device, find_dtype(config.model.dtype, device)),
    )


# --- Tokens, or images, per second of two models that take turns, in any engine.


@dataclass(frozen=True)
class Workload:
    """Measured `runs` times: `batch` prompts of `tokens` at once, then `steps` tokens of each, one at a time.

    Of an image classifier `batch` images at once instead.
    """

    tokens: int = 128
    steps: int = 32
    runs: int = 5
    batch: int = 1

    def amount(self, phase: Phase) -> int:
        """Tokens, or images, of a run of a phase."""
        return self.batch * {"prefill": self.tokens, "classify": 1}.get(phase, self.steps)


@dataclass(frozen=True)
class About:
    """An engine and its device; `logits`: the largest difference from transformers' logits, relative to the largest."""

    engine: str
    version: str
    dtype: str
    device: str
    cores: int | None
    logits: float | None = None


class SpeedEngine(Protocol):
    """Computes a dense and a sparse model."""

    @property
    def about(self) -> About:
        """The engine and its device."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that are measured in a run."""

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""


Opening = AbstractContextManager[SpeedEngine]


def measured(opening: Opening, name: str, task: Workload, watch: EventHandler) -> Measured:
    """Opens an engine and measures both models in turns; the first round is a warm-up."""
    watch(TrialStarted(f"measuring {name}", None))
    with opening as engine:
        rates: dict[tuple[Phase, Side], list[float]] = {key: [] for key in product(engine.phases, SIDES)}
        for run in range(task.runs + 1):
            for (phase, side), taken in rates.items():  # dense, sparse, dense, sparse
                seconds = engine.seconds(side, phase)
                if run:
                    taken.append(task.amount(phase) / seconds)
            watch(Step("runs", run + 1, task.runs + 1))
        length = {"tokens": task.tokens, "steps": task.steps} if "prefill" in engine.phases else {}
        fields: Any = {
            phase.replace(GRAPH, "graph"): {side: rates[phase, side] for side in SIDES} for phase in engine.phases
        }
        return Measured(**vars(engine.about), batch=task.batch, **length, **fields)


SEMI_STRUCTURED = "semi-structured"
PICTURE = 256  # pixels a side of a picture from which the size of a classifier's images is learnt
FEW = 4  # tokens by which a changed model is compared: as few as in decoding
CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores
COMPILER = {  # as `generate` compiles with a static cache (mode reduce-overhead), but without a graph it fails
    "options": {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
}
NO_GRAPH = "tokens are decoded by the launches of Python, in no CUDA graph"
EXACT = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}  # differences that the order of sums makes
Change = Callable[[Checkpoint], None]


@dataclass(eq=False)
class Eager:
    """Both models in memory; a compiler decodes single tokens too, with a static cache, on CUDA in a graph.

    `batch`: ids [batch, tokens + steps], or pixels in the models' number format, on their device; `compiler`: arguments
    of `torch.compile`.
    """

    about: About
    models: Mapping[Side, Any]
    batch: Tensor
    task: Workload
    compiler: Mapping[str, Any] | None
    _graphs: dict[Side, tuple[Any, StaticCache]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.phases: tuple[Phase, ...] = ("prefill", "decode") if self.batch.dim() == 2 else ("classify",)
        if self.compiler is not None and launches(self._compile, f"{self.about.engine}: {NO_GRAPH}"):
            self.phases += (GRAPH,)

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""
        return self._run(side, phase)[0]

    def close(self) -> None:
        """Frees the models, their caches and what was compiled."""
        if self._graphs:
            torch.compiler.reset()
        self.models, self._graphs = {}, {}

    def _run(self, side: Side, phase: Phase) -> tuple[float, Tensor]:
        """Seconds of one run of a phase, and its last logits."""
        compute, cache = self._graphs[side] if phase == GRAPH else (self.models[side], None)
        with torch.no_grad() if phase == GRAPH else torch.inference_mode():
            inputs: list[dict[str, Any]] = [{"pixel_values": self.batch}]
            if phase != "classify":
                parts = torch.split(self.batch, [self.task.tokens, *[1] * self.task.steps], dim=1)
                inputs = [{"input_ids": ids, "use_cache": True, "logits_to_keep": 1} for ids in parts]
                # The prompt alone is timed, or what comes after it, from keys and values of its own.
                prompt, inputs = inputs[0], inputs[:1] if phase == "prefill" else inputs[1:]
                if cache is not None:
                    cache.reset()
                if phase != "prefill":
                    cache = self.models[side](**prompt, past_key_values=cache).past_key_values
                    inputs = [{**each, "past_key_values": cache} for each in inputs]
            wait_for(self.batch.device)
            began = perf_counter()
            for each in inputs:
                output = compute(**each)
            wait_for(self.batch.device)
            return perf_counter() - began, output.logits.float().clone()

    def _compile(self) -> None:
        """Compiles the decoding of a token as one graph, and runs it; ValueError if it computes something else."""
        for side, model in self.models.items():
            cache = StaticCache(config=model.config, max_cache_len=self.batch.shape[1])
            self._graphs[side] = torch.compile(model.__call__, fullgraph=True, **self.compiler or {}), cache
            for _ in range(3):  # is compiled, recorded, replayed
                logits = self._run(side, GRAPH)[1]
            wanted = self._run(side, "decode")[1]
            if not (difference := relative(logits, wanted)) <= EXACT[model.dtype]:
                raise ValueError(f"with a static cache logits differ by {difference:.1g} of the largest")


def dtypes(device: torch.device) -> list[torch.dtype]:
    """The number formats to measure: the fast one of the device and, on a CPU, float32."""
    fast = find_dtype("auto", device)
    return list(dict.fromkeys([torch.float32, fast] if device.type == "cpu" else [fast]))


@contextmanager
def opened(
    pair: Pair,
    task: Workload,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "torch",
    change: Change | None = None,
    tolerance: float | None = None,
) -> Iterator[SpeedEngine]:
    """Opens both models on the device; `change` modifies the sparse one.

    `tolerance`: largest difference of its logits that the change may make, over the largest logit; UserError above it.
    """
    about = about_torch(name, dtype, device)
    with pair.load("dense", dtype, device) as dense, pair.load("sparse", dtype, device) as sparse:
        batch, few = _inputs(pair, dense, task)
        if change is not None:
            with torch.inference_mode():
                before: Tensor = sparse.model(**few).logits.float()
                change(sparse)
                after: Tensor = sparse.model(**few).logits.float()
            difference = relative(after, before) if before.isfinite().all() else None
            if difference is not None and tolerance is not None and not difference <= tolerance:
                raise UserError(
                    f"speedup: the logits differ by {difference:.1g} of the largest from transformers'; report it"
                )
            about = replace(about, logits=difference)
        # The engine alone has the models, or they would outlive its closing.
        with closing(_engine(about, {"dense": dense.model, "sparse": sparse.model}, batch, task)) as engine:
            yield engine


def about_torch(name: str, dtype: torch.dtype, device: torch.device) -> About:
    """The description of an engine that torch runs on this device."""
    hf_logging.set_verbosity_error()  # it warns of each argument that it renames
    cpu = device.type == "cpu"
    return About(
        name, torch.__version__, str(dtype).removeprefix("torch."), cpu_name() if cpu else device_name(device),
        torch.get_num_threads() if cpu else None,
    )  # fmt: skip


def _inputs(pair: Pair, dense: Checkpoint, task: Workload) -> tuple[Tensor, dict[str, Any]]:
    """The input of both models, on the device of the dense one, and arguments with few tokens, or an image, of it."""
    if not pair.of_images:
        batch = random_ids(dense, task).to(dense.device)
        return batch, {"input_ids": batch[:1, :FEW], "use_cache": False}
    # Pixels [batch, channels, height, width] of the size that the dense model's image processor makes.
    grey = np.full((PICTURE, PICTURE), 128, np.uint8)
    with within("speedup"):
        one = Pictures([""], lambda _: "a grey picture", lambda _: grey)
        shape = ImageProcessor.of(pair.dense, pair.trusted).pixels(one).shape[1:]
    noise = torch.randn(task.batch, *shape, generator=torch.Generator().manual_seed(0))
    batch = noise.to(dense.device, dense.dtype)
    return batch, {"pixel_values": batch[:1]}


def _engine(about: About, models: Mapping[Side, Any], batch: Tensor, task: Workload) -> Eager:
    return Eager(about, models, batch, task, COMPILER if batch.is_cuda and batch.dim() == 2 else None)


def relative(actual: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest number."""
    return float((actual - wanted).abs().max() / wanted.abs().max())


def random_ids(checkpoint: Checkpoint, task: Workload) -> Tensor:
    """Token ids [batch, tokens + steps], the same for all engines."""
    size = task.batch, task.tokens + task.steps
    return torch.randint(vocabulary(checkpoint), size, generator=torch.Generator().manual_seed(0))


def check_semi_structured(pattern: str, device: torch.device) -> None:
    """UserError if the pattern is not 2:4 or the device has no sparse tensor cores."""
    if pattern != "2:4":
        raise UserError(
            f'--engine semi-structured: needs zeros in the pattern "2:4", those of this model are {pattern}'
        )
    reason = f"{device.type} has none"
    if device.type == "cuda" and torch.version.hip is not None:
        reason = f"{torch.cuda.get_device_name(device)} is none"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        reason = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    raise UserError(f"--engine semi-structured: needs an NVIDIA GPU of compute capability 8.0 or above, {reason}")


def compress(checkpoint: Checkpoint) -> None:
    """Replaces the weights of pruned linears by compressed ones; UserError for experts and GPT-2's linears."""
    for block, linears in zip(checkpoint.blocks, checkpoint.linears, strict=True):
        for linear in linears:
            module = None if linear.expert is not None else block.get_submodule(linear.name)
            if not isinstance(module, nn.Linear):
                raise UserError(
                    f"--engine semi-structured: {linear.name} is no nn.Linear, and torch.sparse compresses no other"
                )
            check_groups(linear.name, module.weight)
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)


def check_groups(name: str, weight: Tensor) -> None:
    """UserError if a group of 4 inputs has fewer than 2 zeros: compression would drop weights."""
    if weight.shape[1] % 4 or int((weight.reshape(len(weight), -1, 4) == 0).sum(2).min()) < 2:
        raise UserError(
            f"--engine semi-structured: {name} is not 2:4 everywhere; was the folder changed after `apply`?"
        )


# --- `speedup`: bytes of the files, plain and compressed; zeros by kind of linear; speed in torch and another engine.

# --- The engine `packed`: the sparse model without its zeros, by the kernels of `packed`, as transformers loads it.

PACKED = "packed"


def opened_packed(pair: Pair, task: Workload, device: torch.device) -> list[Opening]:
    """Opens both models in the fast number format of the device: with the weights as they are, then rounded."""
    dtype = find_dtype("auto", device)
    kinds: list[Kind] = ["bf16", "int8"] if dtype == torch.float32 else ["int8"]
    rounded = [opened(pair, task, device, dtype, f"{PACKED} {kind}", partial(packed, kind=kind)) for kind in kinds]
    return [opened(pair, task, device, dtype, PACKED, packed, EXACT[dtype]), *rounded]  # those differ by their rounding


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
    about, batch = about_torch(PACKED, checkpoint.dtype, checkpoint.device), _inputs(pair, checkpoint, task)[0]
    opening = closing(_engine(about, {"dense": checkpoint.model, "sparse": sparse}, batch, task))  # frees neither
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
    SEMI_STRUCTURED: lambda pair, task, device: [opened(pair, task, device, torch.bfloat16, SEMI_STRUCTURED, compress)],
}


def default_engine(device: str, pattern: str) -> str:
    """The engine that is measured if none is named: `packed` where its kernel runs, else torch alone.

    Slim models are dense, so that torch measures them.
    """
    return PACKED if is_fast(find_device(device)) and not parse(pattern).channels else "torch"


def check(engine: str, pattern: str, device: str) -> None:
    """UserError if an engine cannot run here or not with this pattern; called before a model is pruned."""
    require("speed", "speedup", "zstandard")
    target = find_device(device)
    if engine != "torch" and parse(pattern).channels:
        raise UserError(f"--engine {engine}: runs models with zeros, and this one has fewer channels; take torch")
    if engine == PACKED:
        if target.type not in ("cpu", "cuda"):
            raise UserError(f"--engine {PACKED}: runs on a CPU, not on {target.type}; give --device cpu")
        if target.type == "cuda" and not has_kernel(target):
            raise UserError(
                f"--engine {PACKED}: its Triton kernel does not run here; give --device cpu or --engine torch"
            )
        if target.type == "cpu" and kernel_name() is None:
            raise UserError(
                f"--engine {PACKED}: the kernel is not here; install with a C compiler (cc) or the wheel ziglang, "
                "or give --engine torch"
            )
    if engine == SEMI_STRUCTURED:
        check_semi_structured(pattern, target)


def check_positions(pair: Pair, task: Workload) -> None:
    """UserError if the prompt and the tokens after it exceed the model's positions."""
    config = None if pair.of_images else model_config(pair.dense, pair.trusted).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and task.tokens + task.steps > positions:
        raise UserError(
            f"--tokens {task.tokens}: the model has {positions} positions, of which {task.steps} are for the tokens "
            "after the prompt; lower it"
        )


def measure(pair: Pair, engine: str, task: Workload, device: str, watch: EventHandler) -> Speed:
    """Measures sizes, zeros and rates of a pair of models; torch is measured beside every engine, for comparison."""
    check_positions(pair, task)
    target = find_device(device)
    first = ENGINES[engine](pair, task, target) if engine != "torch" else []  # refused before minutes of work
    with oom_as_user_error("speedup"):
        watch(TrialStarted("compressing the weight files", None))
        with in_format_of(pair.sparse, pair.dense) as dense:
            file_sizes = sizes(dense, pair.sparse, watch)
        with pair.load("sparse", torch.float32, torch.device("cpu")) as sparse:
            zeros = zeros_by_kind(sparse)
        openings = [("torch", each) for each in ENGINES["torch"](pair, task, target)]
        openings += [(engine, each) for each in first]
        engines = tuple(measured(opening, name, task, watch) for name, opening in openings)
        return Speed(sizes=file_sizes, zeros=zeros, engines=engines)


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
    headers = read_headers(dense)
    wanted, there = ({entry["dtype"] for entry in own.values()} for own in (read_headers(sparse), headers))
    if wanted == there or len(wanted) != 1:
        yield dense
        return
    dtype = convert.dtypes()[next(iter(wanted))]
    with temporary_folder(cache_dir("sparse") / "dense") as folder:
        check_room(folder, sum(prod(entry["shape"]) for entry in headers.values()) * dtype.itemsize)
        for file in dense.glob("*.safetensors"):
            cast(file, folder / file.name, dtype)
        yield folder


def sizes(dense: Path, sparse: Path, watch: EventHandler) -> Sizes:
    """Bytes of the weight files of two folders, plain and with zstd."""
    from zstandard import ZstdCompressor

    files = [(folder, file) for folder in (dense, sparse) for file in sorted(folder.glob("*.safetensors"))]
    total = sum(file.stat().st_size for _, file in files)
    plain, packed, unpadded = Counter[Path](), Counter[Path](), 0
    for folder, file in files:
        compressor = ZstdCompressor(level=LEVEL).compressobj()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                packed[folder] += len(compressor.compress(chunk))
                plain[folder] += len(chunk)
                watch(Step("compress", plain.total(), total))
        packed[folder] += len(compressor.flush())
        if folder == sparse:  # what a packed folder's files would have, but for their headers
            with safe_open(file, framework="pt") as tensors:
                unpadded += sum(packed_bytes(tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
    return Sizes(
        dense=plain[dense], sparse=plain[sparse], dense_zstd=packed[dense], sparse_zstd=packed[sparse],
        packed=unpadded,
    )  # fmt: skip
