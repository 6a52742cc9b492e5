"""Checkpoints that are stored quantized: which can be read back into full numbers, and why others cannot.

What is pruned are weights as they are multiplied. A quantized checkpoint holds codes instead, with scales beside them,
so it is read back once, into the cache, and all that follows sees an ordinary folder. That a folder is quantized is
known from its `config.json`, before anything else of it is downloaded or read.
"""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atp_tune.checkpoints.headers import read_header
from atp_tune.checkpoints.trust import read_table
from atp_tune.errors import UserError

if TYPE_CHECKING:
    from torch import nn

BY_TENSOR = ("fp8", "mxfp8", "mxfp4", "bitsandbytes_4bit", "bitsandbytes_8bit")  # `dequantize` reads these
BY_MODEL = {  # transformers reads these, all of the model in memory, with a package of its own for some
    "compressed-tensors": "compressed_tensors",
    "metal": "transformers",
}
FULL = ("F64", "F32", "F16", "BF16")  # number formats, as headers call them, in which weights need no scale
_DEPTH = 2  # of parts in parts: a talker's language model is in two
_INSTEAD = "give the checkpoint that it was made from"
BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of GPTQ, AWQ, ModelOpt
_ELSEWHERE = ("compression_config", "quantization")  # of early compressed-tensors, MLX
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "scales", "qscale_weight", "SCB")


def find_method(folder: Path, name: str) -> str | None:
    """The method that the weights of a folder are quantized by, if they are; UserError if it cannot be undone.

    `name`: what the study calls the model. Only JSON files are read.
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
    """UserError if the config of a folder that is about to be loaded says that it is quantized."""
    file = folder / "config.json"
    if file.is_file() and (table := quantization_of(read_table(file))) is not None:
        raise UserError(f'model {folder}: is quantized by "{_method(table)}"; {_INSTEAD}')


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a `config.json` says of how its weights are quantized, also that of a part, as in `text_config`."""
    tables = (part.get("quantization_config") for part in parts_of(config))
    found = next((table for table in tables if table is not None), None)
    return found if found is None or isinstance(found, dict) else {"quant_method": found}


def without_quantization(config: dict[str, Any], depth: int = _DEPTH) -> dict[str, Any]:
    """The same `config.json` of weights in full numbers."""
    gone = {"quantization_config", *(_ELSEWHERE if depth == _DEPTH else ())}
    kept = {key: value for key, value in config.items() if key not in gone}
    inner = {key: value for key, value in kept.items() if isinstance(value, dict) and depth}
    return {**kept, **{key: without_quantization(value, depth - 1) for key, value in inner.items()}}


def parts_of(config: dict[str, Any], depth: int = _DEPTH) -> Iterator[dict[str, Any]]:
    """A `config.json` and those of its parts, the language model of one that reads images, say."""
    yield config
    for key, part in config.items():
        if isinstance(part, dict) and depth and key not in _ELSEWHERE:
            yield from parts_of(part, depth - 1)


def check_stored(weights: Iterable[Path], name: str) -> None:
    """UserError if safetensors whose config says nothing of it hold codes with scales beside them."""
    formats = formats_of(weights)
    for key, kind in formats.items():
        scale = None if kind in FULL else next((scale for scale in scales_of(key) if scale in formats), None)
        if scale is not None:
            raise UserError(
                f"model.source: {name} holds {key} as {kind} with a scale beside it ({scale}), but its config.json has "
                f"no quantization_config that says how they belong together; {_INSTEAD}"
            )


def check_scaled(weights: Iterable[Path], name: str) -> None:
    """UserError if a code has no scale beside it: transformers would take it for the weight itself."""
    formats = formats_of(weights)
    for key, kind in formats.items():
        if key.endswith((".weight", ".weight_packed")) and kind not in FULL and not formats.keys() & {*scales_of(key)}:
            raise UserError(f"model.source: {name} has {key} as {kind} without its scales; download it again")


def formats_of(weights: Iterable[Path]) -> dict[str, str]:
    """Number format of each tensor in files of safetensors, as their headers call it."""
    return {key: str(entry["dtype"]) for file in weights for key, entry in read_header(file).items()}


def scales_of(key: str) -> list[str]:
    """Names under which the scales of a tensor may be stored."""
    module, _, last = key.rpartition(".")
    beside = [f"{module}.{scale}" for scale in _SCALES] if last in ("weight", "weight_packed") else []
    return [*beside, *(f"{key}_{scale}" for scale in ("scale_inv", "scale", "scales"))]


def check_plain(block: "nn.Module", keys: Iterable[str]) -> None:
    """UserError if a tensor, by its name in a block, is not the very matrix that its module multiplies by."""
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
    """The method as transformers names it: bitsandbytes has two."""
    if table.get("load_in_4bit") or table.get("load_in_8bit"):
        return "bitsandbytes_4bit" if table.get("load_in_4bit") else "bitsandbytes_8bit"
    return " ".join(str(table.get("quant_method", "an unnamed method")).split())[:40]  # a stranger's text, on one line


def _misplaced(folder: Path, config: dict[str, Any]) -> str | None:
    """What names a method where transformers does not look: the key of the config, or a file beside it."""
    for key in _ELSEWHERE:
        found = config.get(key)
        if isinstance(found, dict) and {"bits", "config_groups", "quantization_config"} & found.keys():
            return key
    return next((file for file in BESIDE if (folder / file).is_file()), None)


def _unread(method: str, table: dict[str, Any]) -> str | None:
    """What keeps transformers from reading weights back rightly, and the first half of what to do about it."""
    if method not in BY_MODEL:
        known = ", ".join([*BY_TENSOR, *BY_MODEL])
        return f"which is not read back into full numbers (what is: {known});"
    package = BY_MODEL[method]
    if find_spec(package) is None:
        return f"and a package is needed to read it: pip install {package.replace('_', '-')}, or"
    if table.get("transform_config"):
        return "with rotations (transform_config) that would not be undone;"
    groups = table.get("config_groups")
    if isinstance(groups, dict) and len(groups) > 1:
        return f"in {len(groups)} ways at once (config_groups), of which transformers reads one;"
    return None
