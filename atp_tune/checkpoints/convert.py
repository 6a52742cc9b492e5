"""Checkpoints that are no folder of safetensors in full numbers, as one: GGUF files, `.bin` weights, quantized ones."""

import functools
import io
import json
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from atp_tune.cache import folder_atomically, sha256_of
from atp_tune.checkpoints.quantized import BESIDE, BY_TENSOR, check_plain, check_scaled, without_quantization
from atp_tune.checkpoints.trust import ASK_CODE, small_files
from atp_tune.errors import UserError

_ORIGIN = "origin.json"
_OF_ACTIVATIONS = re.compile(r"\.(input|output|activation|[qkv])_(global_)?(scale|zero_point)$")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")


def gguf_to_folder(file: Path, target: Path) -> None:
    """Writes the folder `target`: float32 safetensors, config, tokenizer and origin of a GGUF file.

    Errors: UserError where transformers cannot read the file or misses weights in it.
    """
    # Alone in a folder: transformers would prefer a tokenizer.json that lies beside it.
    with tempfile.TemporaryDirectory(prefix="atp_tune.") as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        with _written(file, target) as folder:
            _save_gguf(Path(alone).resolve(), file.name, folder)
            (folder / _ORIGIN).write_text(json.dumps({"file": file.name, "sha256": sha256_of(file)}))


def bin_to_folder(source: Path, target: Path, trusted: bool) -> None:
    """Writes the folder `target`: the `.bin` weights of `source` as safetensors, small files as they are.

    Pickles are read with `weights_only`; `trusted`: code in the folder may run. Errors: UserError where transformers
    cannot read the folder.
    """
    with _written(source, target) as folder:
        _save_bin(source, folder, trusted)


def quantized_to_folder(source: Path, target: Path, method: str, trusted: bool) -> None:
    """Writes the folder `target`: the weights of `source`, quantized by `method`, in full numbers, small files as they
    are.

    `trusted`: code in the folder may run. Errors: UserError where the weights cannot be read back whole.
    """
    from atp_tune.checkpoints.dequantize import dequantize_folder

    with _written(source, target) as folder:
        if method in BY_TENSOR:
            dequantize_folder(source, folder)
        else:
            _save_dequantized(source, folder, method, trusted)
        _copy_small(source, folder, BESIDE)


def gguf_content(folder: Path) -> str:
    """SHA-256 of the GGUF file that a folder was made from."""
    return str(json.loads((folder / _ORIGIN).read_text())["sha256"])


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keeps progress bars and warnings of libraries off the terminal; what matters comes as an exception."""
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
    """The type and message of somebody else's error on one line; what to do where it is code that was not run."""
    if "trust_remote_code" in str(error):
        return f"it needs code of its own, which is not run; read it, then allow it with {ASK_CODE}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def _written(source: Path, target: Path) -> Iterator[Path]:
    """Yields the folder that becomes `target`; errors of transformers become one line about `source`."""
    import transformers.utils.logging  # noqa: F401  (its log handler keeps the real stderr)

    with folder_atomically(target) as folder, quiet("transformers"):
        try:
            yield folder
        except UserError:
            raise
        except Exception as error:  # a parser of foreign files fails in any way it likes
            reason = one_line(error)
            raise UserError(f"model.source: transformers cannot convert {source}: {reason}") from error
        for file in folder.iterdir():
            file.chmod(0o644)  # transformers writes weights that only their owner can read


def _save_gguf(folder: Path, name: str, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    with _gguf_parsed_once():
        options = {"gguf_file": name, "trust_remote_code": False, **_dequantized()}
        model = _complete_model(folder, dtype=torch.float32, **options)
        options = {"gguf_file": name, "local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    if hasattr(model.config, "quantization_config"):  # save_pretrained refuses what looks quantised
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _save_bin(source: Path, target: Path, trusted: bool) -> None:
    options = {"use_safetensors": False, "weights_only": True, "trust_remote_code": trusted}
    _complete_model(source, dtype="auto", **options).save_pretrained(target)
    _copy_small(source, target)


def _save_dequantized(source: Path, target: Path, method: str, trusted: bool) -> None:
    """By transformers, with the whole model in memory."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    check_scaled(sorted(source.glob("*.safetensors")), str(source))
    asked = AUTO_QUANTIZATION_CONFIG_MAPPING[method](dequantize=True)
    options = {"use_safetensors": True, "trust_remote_code": trusted, "device_map": {"": "cpu"}}
    with warnings.catch_warnings(action="ignore"):  # that most of what is asked for is in the folder's own config
        model = _complete_model(source, dtype="auto", whole=True, quantization_config=asked, **options)
    check_plain(model, (name for name, _ in model.named_parameters()))
    model.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(without_quantization(config), indent=2))


def _copy_small(source: Path, target: Path, without: tuple[str, ...] = ()) -> None:
    for file in small_files(source, WEIGHTS):
        if not file.name.endswith((".index.json", *without)) and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _complete_model(folder: Path, whole: bool = False, **settings: Any) -> Any:
    """The model of a folder; transformers would fill missing weights with random numbers and only log it.

    `whole`: nothing may be left over in the folder either, but scales of what is no weight.
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
    """Asks transformers 5.2x for plain weights; before that it never kept GGUF weights packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Remembers what transformers does again and again: 3 parses, and a table of names for each submodule."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in kept.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(gguf, name, original)
