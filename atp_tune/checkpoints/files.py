"""Reads a model folder before it is loaded: code, pickles, links, malformed files, sizes, quantization, places.

The first are safety checks of folders from unknown sources. Nothing here loads torch.

Errors: UserError that names the key that allows it, if there is one.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from atp_tune.errors import UserError
from atp_tune.utils.system import install, missing

if TYPE_CHECKING:
    from torch import nn

Table = dict[str, Any]  # of a JSON file, or of a part of one

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
PICKLES = "pytorch_model*.bin"
CODE = "*.py"  # code that `model.trust_remote_code` runs
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
SLIM = "atp_slim"  # as in packed.modeling_atp_sparse, which imports torch: atp_tune's own code, not the folder's, runs
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
ASK_PICKLE = "model.allow_pickle = true (--set model.allow_pickle=true; apply: --allow-pickle)"
ASK_CODE = "model.trust_remote_code = true (--set model.trust_remote_code=true; apply: --trust-remote-code)"


def is_slim(folder: Path) -> bool:
    """Whether a folder holds a slim model, which has fewer channels than its family's models."""
    return config_in(folder).get("model_type") == SLIM


def find_weights(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a folder: safetensors, or pickles if there are no others and they are allowed."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = read_table(index).get("weight_map")
        names: list[Any] = [*files.values()] if isinstance(files, dict) else [None]
        # Each must be the name of a file in the index's own folder.
        if any(not isinstance(x, str) or not x.endswith(".safetensors") or PurePath(x).name != x for x in names):
            raise UserError(
                f"model.source: {index} names weights that are no *.safetensors of its folder; do not use it"
            )
        shards = {*names}
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            lack = f"{len(missing)} of {len(shards)} weight files, {missing[0]} first"
            raise UserError(f"model.source: {folder} lacks {lack}; copy or download it again")
    if weights := sorted(folder.glob("*.safetensors")):
        return weights
    pickles = sorted(folder.glob(PICKLES))
    if not pickles:
        raise UserError(f"model.source: {folder} holds no *.safetensors and no {PICKLES}; where are its weights?")
    if not allow_pickle:
        raise UserError(
            f"model.source: {folder} has its weights in pickles only ({pickles[0].name}); "
            f"take safetensors, or allow them with {ASK_PICKLE}"
        )
    return pickles


def check_code(folder: Path, trusted: bool) -> None:
    """UserError if a model needs code that is not allowed, or code of another repository."""
    from transformers import CONFIG_MAPPING

    configs = [read_table(folder / name) for name in _CONFIGS if (folder / name).is_file()]
    foreign = next((name for config in configs for name in _classes(config) if "--" in name), None)
    if trusted and foreign is not None:
        raise UserError(
            f"model.source: {folder} wants code of another repository ({foreign.partition('--')[0]}); "
            "only code in the model's own folder is run"
        )
    kind = configs[0].get("model_type")
    is_own = _classes(configs[0]) and kind != SLIM and str(kind) not in CONFIG_MAPPING
    if not trusted and (is_own or any("/" in str(configs[0].get(key)) for key in _KERNELS)):
        raise UserError(
            f"model.source: {folder} needs code of its own, which is not run; read it, then allow it with {ASK_CODE}"
        )


def _classes(config: Table) -> list[str]:
    """The classes in `auto_map`: `FILE.CLASS` or `REPOSITORY--FILE.CLASS`."""
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]


def small_files(folder: Path) -> list[Path]:
    """The files of a folder, and of its folder of licences, without weights.

    UserError for a link to a file outside it, but for the folder `blobs` two levels up, as in the Hugging Face cache.
    """
    home = folder.resolve()
    inside = (home, *(root / "blobs" for root in home.parents[1:2]))
    files = sorted([*folder.iterdir(), *folder.glob("LICEN[CS]E*/*")])
    small = [file for file in files if file.is_file() and file.suffix not in WEIGHTS]
    for file in small:
        if not any(file.resolve().is_relative_to(root) for root in inside):
            raise UserError(f"model.source: {file} is a link to {file.resolve()}, outside its folder; copy the file")
    return small


def copy_small(source: Path, out: Path, without: tuple[str, ...] = ()) -> None:
    """Copies a model folder's small files, but those whose "/NAME" ends like `without`, or that `out` has."""
    for file in small_files(source):
        copy = out / file.relative_to(source)
        if not f"/{file.name}".endswith(without) and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def read_table(path: Path) -> Table:
    """Reads a JSON object; UserError if the file holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise UserError(f"model.source: {path} is no JSON object; download the model again")
    return table


def write_table(path: Path, table: Table) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def config_in(folder: Path) -> Table:
    """The `config.json` of a folder; empty without one."""
    file = folder / "config.json"
    return read_table(file) if file.is_file() else {}


# --- Sizes of a model, from the headers of its safetensors, before it is loaded.

LONGEST = 100 * 2**20  # maximum bytes of a header, as in safetensors
TOWERS = ("vision", "visual", "image", "audio", "speech")  # in names of blocks outside the language model
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIDES = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "ffn_hidden_size")
NUMBERED = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class ModelSizes:
    """Number of values in all tensors (`total`) and in each block; bytes of all tensors in the files, and of a value.

    `itemsize`: of the number format that most values of the blocks have.
    """

    total: int
    blocks: tuple[int, ...]
    bytes: int
    itemsize: int


def read_sizes(folder: Path) -> ModelSizes:
    """The sizes of a model in a folder; UserError if a file has no header or there are no blocks."""
    tensors = read_headers(folder)
    counts = {name: prod(entry["shape"]) for name, entry in tensors.items()}
    stored = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in tensors.items()}
    lists, formats = dict[str, Counter[int]](), Counter[int]()
    for name, count in counts.items():
        if match := NUMBERED.match(name):
            lists.setdefault(match["list"], Counter())[int(match["index"])] += count
            formats[stored[name] // max(1, count)] += count
    if not lists:
        raise UserError(f"model {folder}: its files name no blocks; only transformer models can be pruned")
    spoken = {name: sizes for name, sizes in lists.items() if not any(tower in name for tower in TOWERS)} or lists
    blocks = max(spoken.values(), key=lambda sizes: sizes.total())
    itemsize = max(formats, key=formats.__getitem__)
    return ModelSizes(
        sum(counts.values()), tuple(blocks[index] for index in sorted(blocks)), sum(stored.values()), itemsize
    )


def has_experts(folder: Path) -> bool:
    """Whether a model has mixtures of experts, by the numbers of experts in its config."""
    parts = nested_configs(read_table(folder / "config.json"), depth=99)
    counts = (value for part in parts for key, value in part.items() if "expert" in key and type(value) is int)
    return any(count > 1 for count in counts)


def check_claims(folder: Path) -> None:
    """UserError if a config has more blocks than there are tensors, or a dimension larger than all values together.

    transformers would allocate such a model before it notices that weights are missing. Also if two files have a tensor
    of one name, of which it would load one.
    """
    config = read_table(folder / "config.json")
    values, files = 0, dict[str, Path]()
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            values += prod(entry["shape"])
            if (other := files.setdefault(name, file)) != file:
                raise UserError(
                    f"model {folder}: {name} is in {other.name} and in {file.name}, of which one is loaded; give a "
                    "folder without the other"
                )
    for table in nested_configs(config, depth=1):
        for keys, most, what in ((_COUNTS, len(files), "tensors"), (_SIDES, values, "values")):
            if key := next((key for key in keys if type(table.get(key)) is int and table[key] > most), None):
                raise UserError(
                    f"model {folder}: {key} is {table[key]:.3g}, but its files hold {most} {what}; download it again"
                )


def offsets(file: Path) -> dict[str, int]:
    """Offset in the file of each tensor's bytes; UserError if the file has no header."""
    text = header_text(file)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in parse_header(text, file).items()}


def read_headers(folder: Path) -> Table:
    """Dtype, shape and offsets of each tensor of all files of a folder; UserError if one has no header."""
    return {name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()}


def read_header(file: Path) -> Table:
    """Dtype, shape and offsets of each tensor of a file; UserError if the file has no header."""
    return parse_header(header_text(file), file)


def header_text(file: Path) -> bytes:
    """The header as it stands in a file, or what stands in its place."""
    with file.open("rb") as stream:
        return stream.read(min(int.from_bytes(stream.read(8), "little"), LONGEST))


def parse_header(text: bytes, file: Path) -> Table:
    """Dtype, shape and offsets of each tensor by the header of a file; UserError if it is none."""
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        if all(_is_entry(entry) for entry in entries.values()):
            return entries
        raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"model {file}: is no safetensors file; download it again") from None


def _is_entry(entry: Any) -> bool:
    lists = [entry.get(key) for key in ("shape", "data_offsets")] if isinstance(entry, dict) else [None]
    return all(isinstance(one, list) and all(type(n) is int and n >= 0 for n in one) for one in lists) and (
        len(entry["data_offsets"]) == 2
    )


# --- Quantized checkpoints: which can be dequantized, and why others cannot.
#
# Pruning needs the weights themselves, so a quantized checkpoint, which holds codes and scales, is dequantized once
# into the cache. Its `config.json` tells that it is quantized, before its weights are downloaded or read.

BY_TENSOR = ("fp8", "mxfp8", "mxfp4", "bitsandbytes_4bit", "bitsandbytes_8bit")  # read by `dequantize`
BY_MODEL = {  # read by transformers with the whole model in memory; the values are extras that it needs
    "compressed-tensors": "quantized",
    "metal": None,
}
FULL = ("F64", "F32", "F16", "BF16")  # dtypes, in names of safetensors, of unquantized weights
_DEPTH = 2  # nesting of configs of parts, such as the language model of a speech model
_INSTEAD = "give the checkpoint that it was made from"
BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ, ModelOpt
_ELSEWHERE = ("compression_config", "quantization")  # of early compressed-tensors, MLX
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "scales", "qscale_weight", "SCB")


def find_method(folder: Path, name: str) -> str | None:
    """The quantization method of a folder, None if it is not quantized; UserError if it cannot be dequantized.

    `name`: the source of the model in the study. Only JSON files are read.
    """
    config = read_table(folder / "config.json")
    if (table := find_quantization(config)) is not None:
        method = _method(table)
        if method not in BY_TENSOR and (reason := _unread(method, table)):
            raise UserError(f'model.source: {name} is quantized by "{method}", {reason} {_INSTEAD}')
        return method
    # Keys and files that tell of quantization in a place that transformers does not read.
    tables = {key: table for key in _ELSEWHERE if isinstance(table := config.get(key), dict)}
    told = [key for key, table in tables.items() if {"bits", "config_groups", "quantization_config"} & table.keys()]
    if told := [*told, *(file for file in BESIDE if (folder / file).is_file())]:
        raise UserError(
            f"model.source: {name} is quantized, as its {told[0]} says, in a form that transformers does not read; "
            f"{_INSTEAD}"
        )
    return None


def check_full(folder: Path) -> None:
    """UserError if a folder is quantized, by its config."""
    if (table := find_quantization(config_in(folder))) is not None:
        raise UserError(f'model {folder}: is quantized by "{_method(table)}"; {_INSTEAD}')


def find_quantization(config: Table) -> Table | None:
    """The quantization config in a `config.json` or in one of its parts, such as `text_config`."""
    tables = (part.get("quantization_config") for part in nested_configs(config))
    value = next((table for table in tables if table is not None), None)
    return value if value is None or isinstance(value, dict) else {"quant_method": value}


def without_quantization(config: Table, depth: int = _DEPTH) -> Table:
    """A copy of a `config.json` without quantization."""
    gone = {"quantization_config", *(_ELSEWHERE if depth == _DEPTH else ())}
    return {
        key: without_quantization(value, depth - 1) if isinstance(value, dict) and depth else value
        for key, value in config.items()
        if key not in gone
    }


def nested_configs(config: Table, depth: int = _DEPTH) -> Iterator[Table]:
    """A `config.json` and the configs of its parts, such as a language model."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and depth and key not in _ELSEWHERE:
            yield from nested_configs(part, depth - 1)


def check_scales(folder: Path, name: str, is_quantized: bool) -> None:
    """UserError if a quantized tensor has no scale, which transformers would use as a weight.

    Unless `is_quantized`, by its config, if one has a scale.
    """
    formats = {key: str(entry["dtype"]) for key, entry in read_headers(folder).items()}
    for key, kind in formats.items():
        scale = next((scale for scale in scale_names(key) if scale in formats), None)
        if kind in FULL or is_quantized != (scale is None):
            continue
        if not is_quantized:
            raise UserError(
                f"model.source: {name} holds {key} as {kind} with a scale beside it ({scale}), but its config.json has "
                f"no quantization_config that says how they belong together; {_INSTEAD}"
            )
        if key.endswith((".weight", ".weight_packed")):
            raise UserError(f"model.source: {name} has {key} as {kind} without its scales; download it again")


def scale_names(key: str) -> list[str]:
    """Possible names of the scales of a tensor."""
    module, _, last = key.rpartition(".")
    beside = [f"{module}.{scale}" for scale in _SCALES] if last in ("weight", "weight_packed") else []
    return [*beside, *(f"{key}_{scale}" for scale in ("scale_inv", "scale", "scales"))]


def check_plain(block: "nn.Module", keys: Iterable[str]) -> None:
    """UserError if a tensor, named by its key in a block, is not the plain weight matrix of its module."""
    from torch import nn

    for key in dict.fromkeys(keys):
        path, _, name = key.rpartition(".")
        module = block.get_submodule(path)
        weight, kind = getattr(module, name), type(module).__name__
        own = {*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))}
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
            what = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
            raise UserError(f"model module {kind}: {key} is a {what}, which is not pruned; {_INSTEAD}")
        if isinstance(module, nn.Linear) and (more := sorted(own - {"weight", "bias"})):
            raise UserError(f"model module {kind}: {key} has {more[0]} beside it, which is not pruned; {_INSTEAD}")


def _method(table: Table) -> str:
    """The name of the method in transformers, which has two for bitsandbytes."""
    for size in ("4bit", "8bit"):
        if table.get(f"load_in_{size}"):
            return f"bitsandbytes_{size}"
    return " ".join(str(table.get("quant_method", "an unnamed method")).split())[:40]  # untrusted text, in one line


def _unread(method: str, table: Table) -> str | None:
    """The reason why transformers cannot dequantize, with the start of the remedy; None if it can."""
    if method not in BY_MODEL:
        return f"which cannot be dequantized (supported are {', '.join([*BY_TENSOR, *BY_MODEL])});"
    extra = BY_MODEL[method]
    if extra and missing(extra):
        return f"and {missing(extra)} is needed to read it: {install(extra)}, or"
    if table.get("transform_config"):
        return "with rotations (transform_config) that would not be undone;"
    groups = table.get("config_groups")
    if isinstance(groups, dict) and len(groups) > 1:
        return f"in {len(groups)} ways at once (config_groups), of which transformers reads one;"
    return None


# --- The place of a model's weights: on the compute device, in host memory, or memory-mapped on disk. Loads no torch.

Offload = Literal["none", "cpu", "disk"]

FITS = 0.7  # share of free device memory for weights; the rest is for activations
FULL_SHARE = 0.9  # the same for weights and what is known to lie beside them
HOST_FITS, HOST_ROOM = 0.7, 16 * 10**9  # blocks leave a part of free host memory to the system, at most so many bytes
MATRICES = 3  # of float32, as large as a Hessian, while its factor is computed


@dataclass(frozen=True)
class Free:
    """Free bytes on the compute device and in host memory; `bounded`: False for a CPU that shares the host's memory."""

    device: int
    host: int
    bounded: bool = True


def choose(total: int, blocks: int, free: Free, work: int = 0) -> Offload:
    """The first place that weights of `total` bytes, `blocks` of them in blocks, fit into, with `work` bytes beside."""
    if not free.bounded or (total <= FITS * free.device and total + work <= FULL_SHARE * free.device):
        return "none"
    return "cpu" if blocks <= max(HOST_FITS * free.host, free.host - HOST_ROOM) else "disk"


def states(calibration: int, validation: int, within: int = 0) -> int:
    """Peak bytes of hidden states, by those of the texts: calibration's exist twice for a moment, beside validation's.

    `within`: of all calibration windows within a block, where linears are pruned in order.
    """
    return max(validation + 2 * calibration + within, 2 * validation)


def hessian_bytes(inputs: int) -> int:
    """Peak bytes of a Hessian of so many inputs."""
    return 4 * MATRICES * inputs**2
