"""Models in the caller's memory: a study calls one `memory:SHA256`, by the content of its weights and its config.

While a model is lent, a folder holds its config and its tokenizer, and a registry of this process holds the model.
Weights are only read; all else of the model is restored at the end.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from atp_tune.cache import temporary_folder
from atp_tune.checkpoints.checkpoint import Checkpoint, ModelState
from atp_tune.checkpoints.classes import is_image_classifier
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import DTYPES
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError
from atp_tune.spec.data import MEMORY
from atp_tune.spec.study import ModelConfig

NOT_CONTENT = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
SAMPLE = "A naïve café: 東京, 3.14 € — “quoted”\n\n\tif x != 0:  # twice  the  spaces\n"  # read by two tokenizers


@dataclass(frozen=True)
class LentModel(ModelFolder):
    """A folder of config and tokenizer, and the model in memory that they belong to."""

    model: Any = None

    def checkpoint(self, config: ModelConfig, device: torch.device, positions: tuple[int, int] = (0, 0)) -> Checkpoint:
        """The model as a checkpoint, where it lies; UserError if another dtype is asked for."""
        own = self.model.dtype
        if config.dtype != "auto" and DTYPES[config.dtype] != own:
            raise UserError(
                f"model.dtype: the model in memory is {str(own).removeprefix('torch.')}; leave the key out, or convert "
                f"the model with model.to(torch.{config.dtype})"
            )
        return Checkpoint(self.model, device, "none", with_tower=config.has_tower)

    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of all parameters, and of a value."""
        return sum(parameter.nbytes for parameter in self.model.parameters()), int(self.model.dtype.itemsize)

    def _stamps(self) -> dict[str, tuple[int, int, int]]:
        return {name: (tensor.data_ptr(), tensor.nbytes, _version(tensor)) for name, tensor in _tensors(self.model)}


_lent: dict[str, LentModel] = {}


def find(source: str) -> LentModel:
    """The model that is lent by this name; UserError if there is none."""
    if source not in _lent:
        raise UserError(
            f"model.source: {source[:19]}… lay in the memory of a Python process; give the model again, as in "
            "atp_tune.load_study(…, model=model, tokenizer=tokenizer)"
        )
    return _lent[source]


@contextmanager
def lent(model: Any, tokenizer: Any) -> Iterator[LentModel]:
    """Lends a model and its tokenizer to studies; UserError for a model that is not treated exactly.

    A model may be lent again while it is lent.
    """
    check_model(model)
    state = ModelState(model)
    with temporary_folder() as place:
        _save_tokenizer(tokenizer, place)
        config = {**_config(model), "architectures": [type(model).__name__]}
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        content = content_of(model)
        found = LentModel(place, content, MEMORY + content, model=model)
        before = _lent.get(found.id)
        _lent[found.id] = found
        try:
            model.requires_grad_(False)
            yield found
        finally:
            if before is None:
                del _lent[found.id]
            else:
                _lent[found.id] = before
            state.restore()  # whatever was at work with it has not, if it ended with an error


def check_model(model: Any) -> None:
    """UserError for anything but a whole transformers model in full numbers on one device."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        ways = {
            "OptimizedModule": "it is compiled; give the model itself, model._orig_mod",
            "DataParallel": "give the model that it wraps, model.module",
            "PeftModel": "merge its adapters first: model.merge_and_unload()",
        }
        kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in ways), None)
        way = ways[kind] if kind else "give a transformers model, its hub id or its folder"
        raise UserError(f"model: {name} is no PreTrainedModel; {way}")
    devices = {tensor.device for _, tensor in _tensors(model)}
    reason = None
    if is_image_classifier(model):
        raise UserError(f"model: {name} classifies images, and is tuned by a study file with images: docs/images.md")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        reason = "is quantized; load it in full numbers, or give its hub id or folder"
    elif getattr(model, "_hf_peft_config_loaded", False):
        reason = "has adapters; merge them first, or load the model without them"
    elif any(tensor.is_meta for _, tensor in _tensors(model)):
        reason = "has weights on the meta device or offloaded ones; give its hub id or folder, which is then offloaded"
    elif len(devices) > 1:
        reason = f"lies on {len(devices)} devices; move it to one, or give its hub id or folder"
    elif any(parametrize.is_parametrized(module) for module in model.modules()):
        reason = "has parametrized weights; make them permanent first (parametrize.remove_parametrizations)"
    elif pruned := next((name for name, _ in model.named_parameters() if name.endswith("_orig")), None):
        reason = f"is pruned by torch.nn.utils.prune ({pruned}); make that permanent first (prune.remove)"
    if reason:
        raise UserError(f"model: {name} {reason}")


def content_of(model: nn.Module) -> str:
    """SHA-256 of a model's saved tensors and of its config, without what does not change its output."""
    digest = hashlib.sha256(json.dumps(_config(model, NOT_CONTENT), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config(model: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in without}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer; UserError if what is read back makes other tokens."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        given = "is needed beside a model in memory" if tokenizer is None else f"is a {type(tokenizer).__name__}"
        raise UserError(f"tokenizer: {given}; give the model's own, from AutoTokenizer.from_pretrained")
    try:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raise many types
        raise UserError(f"tokenizer: cannot be saved and read again: {one_line(error)}") from error
    is_same = again(SAMPLE).input_ids == tokenizer(SAMPLE).input_ids and again.bos_token_id == tokenizer.bos_token_id
    if not is_same:
        raise UserError("tokenizer: makes other tokens after it is saved and read again; give the model's folder")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _version(tensor: Tensor) -> int:
    """Number of writes to a tensor; inference tensors do not count them."""
    return 0 if tensor.is_inference() else tensor._version
