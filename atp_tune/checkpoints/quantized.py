"""Quantized checkpoints: which can be dequantized, and why others cannot.

Pruning needs the weights themselves, so a quantized checkpoint, which holds codes and scales, is dequantized once into
the cache. Its `config.json` tells that it is quantized, before its weights are downloaded or read.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_tune.checkpoints.headers import read_header
from atp_tune.checkpoints.trust import read_table
from atp_tune.errors import UserError
from atp_tune.extras import install, missing

if TYPE_CHECKING:
    from torch import nn

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
    if (table := quantization_of(config)) is not None:
        method = _method(table)
        if method not in BY_TENSOR and (reason := _unread(method, table)):
            raise UserError(f'model.source: {name} is quantized by "{method}", {reason} {_INSTEAD}')
        return method
    if place := _misplaced(folder, config):
        raise UserError(
            f"model.source: {name} is quantized, as its {place} says, in a form that transformers does not read; "
            f"{_INSTEAD}"
        )
    return None


def check_full(folder: Path) -> None:
    """UserError if a folder is quantized, by its config."""
    file = folder / "config.json"
    if file.is_file() and (table := quantization_of(read_table(file))) is not None:
        raise UserError(f'model {folder}: is quantized by "{_method(table)}"; {_INSTEAD}')


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization config in a `config.json` or in one of its parts, such as `text_config`."""
    tables = (part.get("quantization_config") for part in parts_of(config))
    found = next((table for table in tables if table is not None), None)
    return found if found is None or isinstance(found, dict) else {"quant_method": found}


def without_quantization(config: dict[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """A copy of a `config.json` without quantization."""
    gone = {"quantization_config", *(_ELSEWHERE if depth == _DEPTH else ())}
    kept = {key: value for key, value in config.items() if key not in gone}
    inner = {key: value for key, value in kept.items() if isinstance(value, dict) and depth}
    return {**kept, **{key: without_quantization(value, depth - 1) for key, value in inner.items()}}


def parts_of(config: dict[str, Any], depth: int = _DEPTH) -> Iterator[dict[str, Any]]:
    """A `config.json` and the configs of its parts, such as a language model."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and depth and key not in _ELSEWHERE:
            yield from parts_of(part, depth - 1)


def check_stored(weights: Iterable[Path], name: str) -> None:
    """UserError if safetensors without a quantization config hold quantized tensors with scales."""
    formats = formats_of(weights)
    for key, kind in formats.items():
        scale = None if kind in FULL else next((scale for scale in scales_of(key) if scale in formats), None)
        if scale is not None:
            raise UserError(
                f"model.source: {name} holds {key} as {kind} with a scale beside it ({scale}), but its config.json has "
                f"no quantization_config that says how they belong together; {_INSTEAD}"
            )


def check_scaled(weights: Iterable[Path], name: str) -> None:
    """UserError if a quantized tensor has no scale; transformers would use it as a weight."""
    formats = formats_of(weights)
    for key, kind in formats.items():
        if key.endswith((".weight", ".weight_packed")) and kind not in FULL and not formats.keys() & {*scales_of(key)}:
            raise UserError(f"model.source: {name} has {key} as {kind} without its scales; download it again")


def formats_of(weights: Iterable[Path]) -> dict[str, str]:
    """Dtype of each tensor in safetensors files, by the name in their headers."""
    return {key: str(entry["dtype"]) for file in weights for key, entry in read_header(file).items()}


def scales_of(key: str) -> list[str]:
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


def _method(table: dict[str, Any]) -> str:
    """The name of the method in transformers, which has two for bitsandbytes."""
    if table.get("load_in_4bit") or table.get("load_in_8bit"):
        return "bitsandbytes_4bit" if table.get("load_in_4bit") else "bitsandbytes_8bit"
    return " ".join(str(table.get("quant_method", "an unnamed method")).split())[:40]  # untrusted text, in one line


def _misplaced(folder: Path, config: dict[str, Any]) -> str | None:
    """The config key or file that tells of quantization in a place that transformers does not read."""
    for key in _ELSEWHERE:
        found = config.get(key)
        if isinstance(found, dict) and {"bits", "config_groups", "quantization_config"} & found.keys():
            return key
    return next((file for file in BESIDE if (folder / file).is_file()), None)


def _unread(method: str, table: dict[str, Any]) -> str | None:
    """The reason why transformers cannot dequantize, with the start of the remedy; None if it can."""
    if method not in BY_MODEL:
        known = ", ".join([*BY_TENSOR, *BY_MODEL])
        return f"which cannot be dequantized (supported are {known});"
    extra = BY_MODEL[method]
    if extra and missing(extra):
        return f"and {missing(extra)} is needed to read it: {install(extra)}, or"
    if table.get("transform_config"):
        return "with rotations (transform_config) that would not be undone;"
    groups = table.get("config_groups")
    if isinstance(groups, dict) and len(groups) > 1:
        return f"in {len(groups)} ways at once (config_groups), of which transformers reads one;"
    return None
