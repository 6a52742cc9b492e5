"""Safety checks of model folders from unknown sources: code, pickles, links, malformed files.

Errors: UserError that names the key that allows it, if there is one.
"""

import json
import shutil
from pathlib import Path, PurePath
from typing import Any

from atp_tune.errors import UserError

PICKLES = "pytorch_model*.bin"
CODE = "*.py"  # code that `model.trust_remote_code` runs
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
SLIM = "atp_slim"  # as in packed.modeling_atp_slim, which imports torch: atp_tune's own code, not the folder's, runs
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
ASK_PICKLE = "model.allow_pickle = true (--set model.allow_pickle=true; apply: --allow-pickle)"
ASK_CODE = "model.trust_remote_code = true (--set model.trust_remote_code=true; apply: --trust-remote-code)"


def is_slim(folder: Path) -> bool:
    """Whether a folder holds a slim model, which has fewer channels than its family's models."""
    file = folder / "config.json"
    return file.is_file() and read_table(file).get("model_type") == SLIM


def find_weights(folder: Path, allow_pickle: bool) -> list[Path]:
    """The weight files of a folder: safetensors, or pickles if there are no others and they are allowed."""
    _check_shards(folder)
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


def _check_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    places = read_table(index).get("weight_map")
    shards = set(places.values()) if isinstance(places, dict) and all(map(_is_name, places.values())) else None
    if shards is None:
        raise UserError(f"model.source: {index} names weights that are no *.safetensors of its folder; do not use it")
    if missing := sorted(name for name in shards if not (folder / name).is_file()):
        lack = f"{len(missing)} of {len(shards)} weight files, {missing[0]} first"
        raise UserError(f"model.source: {folder} lacks {lack}; copy or download it again")


def _is_name(value: Any) -> bool:
    """Whether an entry of an index is a file name in its own folder."""
    return isinstance(value, str) and value.endswith(".safetensors") and PurePath(value).name == value


def check_code(folder: Path, trusted: bool) -> None:
    """UserError if a model needs code that is not allowed, or code of another repository."""
    configs = [read_table(folder / name) for name in _CONFIGS if (folder / name).is_file()]
    foreign = next((name for config in configs for name in _classes(config) if "--" in name), None)
    if trusted and foreign is not None:
        raise UserError(
            f"model.source: {folder} wants code of another repository ({foreign.partition('--')[0]}); "
            "only code in the model's own folder is run"
        )
    if not trusted and _needs_code(configs[0]):
        raise UserError(
            f"model.source: {folder} needs code of its own, which is not run; read it, then allow it with {ASK_CODE}"
        )


def _needs_code(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    kernels = any("/" in str(config.get(key)) for key in _KERNELS)
    known = config.get("model_type") == SLIM or str(config.get("model_type")) in CONFIG_MAPPING
    return kernels or (bool(list(_classes(config))) and not known)


def _classes(config: dict[str, Any]) -> list[str]:
    """The classes in `auto_map`: `FILE.CLASS` or `REPOSITORY--FILE.CLASS`."""
    found = config.get("auto_map")
    values = list(found.values()) if isinstance(found, dict) else [found]
    return [str(name) for value in values for name in (value if isinstance(value, list) else [value]) if name]


def small_files(folder: Path, weights: tuple[str, ...]) -> list[Path]:
    """The files of a folder, and of its folder of licences, without weights (by suffix).

    UserError for a link to a file outside it, but for the folder `blobs` two levels up, as in the Hugging Face cache.
    """
    home, blobs = folder.resolve(), folder.resolve().parents[1:2]
    files = sorted([*folder.iterdir(), *folder.glob("LICEN[CS]E*/*")])
    found = [file for file in files if file.is_file() and file.suffix not in weights]
    for file in found:
        inside = (home, *(place / "blobs" for place in blobs))
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise UserError(f"model.source: {file} is a link to {file.resolve()}, outside its folder; copy the file")
    return found


def copy_small(source: Path, out: Path, weights: tuple[str, ...], without: tuple[str, ...] = ()) -> None:
    """Copies a model folder's small files, but those whose "/NAME" ends like `without`, or that `out` has."""
    for file in small_files(source, weights):
        copy = out / file.relative_to(source)
        if not f"/{file.name}".endswith(without) and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def read_table(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError if the file holds none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise UserError(f"model.source: {path} is no JSON object; download the model again")
    return table
