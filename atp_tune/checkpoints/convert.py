"""Converts GGUF files, `.bin` weights and quantized weights to folders of unquantized safetensors."""

import functools
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from atp_tune.cache import check_room, folder_atomically, sha256_of, temporary_folder
from atp_tune.checkpoints.quantized import BESIDE, BY_TENSOR, check_plain, check_scaled, without_quantization
from atp_tune.checkpoints.trust import ASK_CODE, copy_small, read_table
from atp_tune.errors import UserError

ORIGIN = "origin.json"  # of a folder that was a GGUF file
HUB = "https://huggingface.co/"
GGUF_FACTS = {  # keys of a model card's head; the last that a file has counts
    "license": ("general.license",),
    "license_name": ("general.license.name",),
    "license_link": ("general.license.link",),
    "language": ("general.languages",),
    "base_model": ("general.base_model.0.repo_url", "general.source.repo_url"),
}
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_(global_)?(scale|zero_point)$")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
INDEX = (".index.json",)


def gguf_to_folder(file: Path, target: Path) -> None:
    """Converts a GGUF file to the folder `target`: float32 safetensors, config, tokenizer and origin.

    Errors: UserError if transformers cannot read the file or weights are missing.
    """
    # In a folder of its own, since transformers would prefer a tokenizer.json beside the file.
    with temporary_folder() as alone:
        (alone / file.name).symlink_to(file.resolve())
        with written_folder(file, target) as folder:
            _save_gguf(alone.resolve(), file.name, folder)
            _save_card(file, folder / "README.md")
            (folder / ORIGIN).write_text(json.dumps({"file": file.name, "sha256": sha256_of(file)}))


def bin_to_folder(source: Path, target: Path, trusted: bool) -> None:
    """Converts the `.bin` weights of `source` to safetensors in the folder `target`, and copies its small files.

    Pickles are read with `weights_only`; `trusted`: code in the folder may run. Errors: UserError if transformers
    cannot read the folder.
    """
    options = {"use_safetensors": False, "weights_only": True, "trust_remote_code": trusted}
    with written_folder(source, target) as folder:
        _complete_model(source, dtype="auto", **options).save_pretrained(folder)
        copy_small(source, folder, WEIGHTS, INDEX)


def quantized_to_folder(source: Path, target: Path, method: str, trusted: bool) -> None:
    """Dequantizes the weights of `source`, quantized by `method`, into the folder `target`, and copies its small files.

    `trusted`: code in the folder may run. Errors: UserError if a weight cannot be dequantized.
    """
    from atp_tune.checkpoints.dequantize import dequantize_folder

    with written_folder(source, target) as folder:
        if method in BY_TENSOR:
            dequantize_folder(source, folder)
        else:
            _save_dequantized(source, folder, method, trusted)
        copy_small(source, folder, WEIGHTS, (*INDEX, *BESIDE))


def is_of_gguf(folder: Path) -> bool:
    """Whether a folder was converted from a GGUF file."""
    return (folder / ORIGIN).is_file() and str(read_table(folder / ORIGIN).get("file")).endswith(".gguf")


def gguf_content(folder: Path) -> str:
    """SHA-256 of the GGUF file that a folder was converted from."""
    return str(json.loads((folder / ORIGIN).read_text())["sha256"])


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Suppresses progress bars and warnings of libraries; real problems are exceptions."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def one_line(error: Exception, limit: int = 200) -> str:
    """Type and message of a foreign error in one line; a remedy if it is about code that may not run."""
    if "trust_remote_code" in str(error):
        return f"it needs code of its own, which is not run; read it, then allow it with {ASK_CODE}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def written_folder(source: Path, target: Path) -> Iterator[Path]:
    """Yields the folder that becomes `target`; turns errors of transformers into a UserError about `source`."""
    import transformers.utils.logging  # noqa: F401  (its log handler keeps the real stderr)

    files = [source] if source.is_file() else [file for file in source.iterdir() if file.suffix in WEIGHTS]
    check_room(target, sum(file.stat().st_size for file in files))  # at least: most are unpacked to more bits
    with folder_atomically(target, shared=True) as folder, quiet("transformers"):
        try:
            yield folder
        except UserError:
            raise
        except Exception as error:  # parsers of unknown files raise many types
            reason = one_line(error)
            raise UserError(f"model.source: transformers cannot convert {source}: {reason}") from error
        for file in folder.iterdir():
            file.chmod(0o644)  # transformers makes weights readable by their owner only


def _save_gguf(folder: Path, name: str, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    with _gguf_parsed_once():
        options = {"gguf_file": name, "trust_remote_code": False, **_dequantized()}
        model = _complete_model(folder, dtype=torch.float32, **options)
        options = {"gguf_file": name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    if hasattr(model.config, "quantization_config"):  # save_pretrained refuses quantized models
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _save_card(file: Path, card: Path) -> None:
    """The head of a model card: what a GGUF file says of its licence, its languages and its source on the hub."""
    import gguf
    import yaml

    fields = gguf.GGUFReader(file).fields
    said = {key: fields[name].contents() for key, names in GGUF_FACTS.items() for name in names if name in fields}
    source = str(said.pop("base_model", ""))
    if source.startswith(HUB):
        said["base_model"] = source.removeprefix(HUB)
    card.write_text(f"---\n{yaml.safe_dump(said)}---\n")


def _save_dequantized(source: Path, target: Path, method: str, trusted: bool) -> None:
    """Dequantizes with transformers, with the whole model in memory."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    check_scaled(sorted(source.glob("*.safetensors")), str(source))
    asked = AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)
    options = {"use_safetensors": True, "trust_remote_code": trusted, "device_map": {"": "cpu"}}
    with warnings.catch_warnings(action="ignore"):  # about settings that are also in the folder's config
        model = _complete_model(source, dtype="auto", whole=True, quantization_config=asked, **options)
    check_plain(model, (name for name, _ in model.named_parameters()))
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(without_quantization(config), indent=2))


def _complete_model(folder: Path, whole: bool = False, **settings: Any) -> Any:
    """Loads the model of a folder; UserError if weights are missing, which transformers only logs.

    `whole`: UserError also for unused tensors, except scales of activations.
    """
    from atp_tune.checkpoints.classes import auto_class

    loaded: Any = auto_class(folder).from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, **settings
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model.source: the file lacks {len(missing)} weights, the first is {missing[0]}")
    left = sorted(key for key in info["unexpected_keys"] if whole and not _OF_ACTIVATIONS.search(key))
    if left:
        raise UserError(f"model.source: {folder} has {left[0]}, which transformers leaves out when it dequantizes")
    return model


def _dequantized() -> dict[str, Any]:
    """Options for unpacked weights; transformers before 5.2x always unpacks GGUF weights."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Caches the parsed file and the table of names, which transformers computes repeatedly."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in kept.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(gguf, name, original)
