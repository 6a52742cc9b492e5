"""Checkpoints that cannot be memory-mapped, as folders of safetensors: GGUF files and pickled `.bin` weights."""

import functools
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from atp_tune.cache import folder_atomically
from atp_tune.errors import UserError

_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.safetensors*")


def gguf_to_folder(file: Path, target: Path) -> None:
    """Writes the folder `target`: float32 safetensors, config and tokenizer of a GGUF file.

    Errors: UserError where transformers cannot read the file or misses weights in it.
    """
    # Alone in a folder: transformers would prefer a tokenizer.json that lies beside it.
    with tempfile.TemporaryDirectory(prefix="atp_tune.") as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        _written(file, target, functools.partial(_save_gguf, Path(alone).resolve(), file.name))


def bin_to_folder(source: Path, target: Path) -> None:
    """Writes the folder `target`: the `.bin` weights of `source` as safetensors, all other small files as they are.

    Pickles are read with `weights_only`. Errors: UserError where transformers cannot read the folder.
    """
    _written(source, target, functools.partial(_save_bin, source))


def one_line(error: Exception, limit: int = 200) -> str:
    """The type and message of somebody else's error on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _written(source: Path, target: Path, save: Callable[[Path], None]) -> None:
    with folder_atomically(target) as folder, _transformers_silenced():
        try:
            save(folder)
        except UserError:
            raise
        except Exception as error:  # a parser of foreign files fails in any way it likes
            raise UserError(f"model.source: transformers cannot convert {source}: {one_line(error)}") from error
        for file in folder.iterdir():
            file.chmod(0o644)  # transformers writes weights that only their owner can read


def _save_gguf(folder: Path, name: str, target: Path) -> None:
    import torch  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    with _gguf_parsed_once():
        model = _complete_model(folder, gguf_file=name, dtype=torch.float32, **_dequantized())
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=name, local_files_only=True)
    if hasattr(model.config, "quantization_config"):  # save_pretrained refuses what looks quantised
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _save_bin(source: Path, target: Path) -> None:
    _complete_model(source, dtype="auto", use_safetensors=False, weights_only=True).save_pretrained(target)
    for file in source.iterdir():
        small = file.is_file() and not any(file.match(pattern) for pattern in _WEIGHTS)
        if small and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def _complete_model(folder: Path, **settings: Any) -> Any:
    """The model of a folder; transformers would fill missing weights with random numbers and only log it."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, output_loading_info=True, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model.source: the file lacks {len(missing)} weights, the first is {missing[0]}")
    return model


def _dequantized() -> dict[str, Any]:
    """Asks transformers 5.2x for plain weights; before that it never kept GGUF weights packed."""
    import transformers  # noqa: PLC0415

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """Remembers what transformers does again: 3 parses of a file, and one table of names a submodule (25 s → 11 s)."""
    import gguf  # noqa: PLC0415

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, original in kept.items():
        setattr(gguf, name, functools.cache(original))
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(gguf, name, original)


@contextmanager
def _transformers_silenced() -> Iterator[None]:
    from transformers.utils import logging  # noqa: PLC0415  (first, so that its log handler keeps the real stderr)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with redirect_stderr(io.StringIO()):  # its progress bars have no common switch
            yield
    finally:
        logging.set_verbosity(verbosity)
