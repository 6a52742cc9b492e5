"""The dense checkpoint: its blocks, their linears, and the place of the weights. Weights are never written to.

If the weights fit, all of them are on the compute device. Else the blocks are in host memory (pinned for CUDA), and if
they do not fit there, memory-mapped on disk. Then the tensors of a block are copied to the device while the block
before it computes (`devices.Stream`): the device must hold two blocks, the shell (embeddings, final norm, head) and the
activations.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as hf_logging

from atp_tune.allocations import Shape
from atp_tune.checkpoints.blocks import (
    Linear,
    auto_class,
    find_blocks,
    find_linears,
    hidden_width,
    is_image_classifier,
)
from atp_tune.checkpoints.convert import as_user_error, one_line
from atp_tune.checkpoints.devices import (
    DTYPES,
    Stream,
    Tensors,
    device_limit,
    free_memory,
    host_memory,
    is_out_of_memory,
    make_current,
    mapped_files,
    move_into,
    on_disk,
    pinned,
    plain,
    release_memory,
)
from atp_tune.checkpoints.files import Free, Offload, check_full, choose, hessian_bytes, states
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import MEMORY
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.utils.cache import temporary_folder


class Released(ABC):
    """A context manager for an object with much memory, which is released at the end."""

    @abstractmethod
    def release(self) -> None:
        """Frees the memory; the object must not be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class ModelState:
    """A model's state as it was before its use: all that the use changes; weights are only read."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, module.training, vars(module).get("forward"), [*module._forward_pre_hooks])
            for module in model.modules()
        ]
        self._tensors = [(each, each.device, each.requires_grad) for _, each in _tensors(model)]
        self._config: Any = getattr(model, "config", None)
        self.gives_router_logits = bool(getattr(self._config, "output_router_logits", False))

    def restore(self) -> None:
        """Restores the mode of each module, the config, and the device of each tensor; needed after an error too."""
        for module, training, own, hooks in self._modules:
            module.training = training
            vars(module).update(forward=own) if own is not None else vars(module).pop("forward", None)
            for left in {*module._forward_pre_hooks} - {*hooks}:
                del module._forward_pre_hooks[left]
        if self.gives_router_logits:
            self._config.output_router_logits = True
        for tensor, device, flag in self._tensors:
            tensor.data = tensor.data.to(device)
            if tensor.is_leaf:  # not a buffer that the model has computed since
                tensor.requires_grad_(flag)


class Checkpoint(Released):
    """A model in evaluation mode as a list of blocks; its weights are only read.

    At the end of `with Checkpoint(model, device) as checkpoint` the model is restored; one that `load` loaded is freed.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        offload: Offload | None = None,
        ahead: bool = True,
        with_tower: bool = False,
        positions: tuple[int, int] = (0, 0),
    ) -> None:
        """`offload`: place of the blocks, None: by free memory; `ahead`: copy the next block while one is used.

        `with_tower`: the blocks of the vision tower come before those of the language model. `positions`: of the texts
        that calibrate and that are measured, whose hidden states lie beside the weights.
        """
        self._state: ModelState | None = ModelState(model)  # None of one that `load` loaded
        self.model = model.eval()
        if self._state.gives_router_logits:
            self.config.output_router_logits = False  # used for training only, and bypassed blocks have none
        self.device = device
        blocks, has_others = find_blocks(model, with_tower), is_image_classifier(model)
        self.blocks_name, self.block_names, self.blocks = blocks.name, blocks.names, blocks.modules
        self.in_tower = blocks.in_tower  # so many blocks, the first, are of the vision tower
        self._first = 0  # the place of block 0 in the whole model's blocks
        self.linears = [find_linears(block, has_others) for block in self.blocks]
        self.offload = offload or self._choose(*positions)
        if self.in_tower and self.offload != "none" and device.type != "cpu":
            raise UserError(
                f"model.offload: a model whose vision tower is pruned too must lie on {device.type} as a whole, and "
                'does not; leave the key out, take model.prune = ["language"], a larger device or the CPU'
            )
        self._stream = self._move(ahead)

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, trusted: bool = False, **how: Any
    ) -> "Checkpoint":
        """Loads a folder of safetensors; UserError if that fails. `trusted`: code in the folder may run.

        `how`: `offload`, `with_tower`, `positions`, as for the class.
        """
        check_full(folder)
        hf_logging.disable_progress_bar()
        try:
            # transformers only logs missing weights, and fills them with random numbers
            model, info = auto_class(folder).from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=trusted,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:  # parsers of unknown files raise many types
            if is_out_of_memory(error):
                raise
            raise UserError(f"model {folder}: transformers cannot load it: {one_line(error)}") from error
        wrong = sorted(info["missing_keys"]) + [key for key, *_ in info["mismatched_keys"]]
        if wrong:
            raise UserError(f"model {folder}: has no {wrong[0]} of the shape that its config says; download it again")
        checkpoint = cls(model.requires_grad_(False), device, **how)
        checkpoint._state = None
        return checkpoint

    def release(self) -> None:
        """Restores the model, or frees one that `load` loaded; then frees device memory."""
        self._stream = None
        if self._state is None:
            self.model, self.blocks = nn.Module(), nn.ModuleList()
        else:
            self._state.restore()
        release_memory()

    def take_model(self) -> nn.Module:
        """The model that `load` loaded, for the caller to keep, on one device; the checkpoint is empty after that."""
        model = self.model if self.offload == "none" else self.model.to("cpu")
        self.release()
        return model

    def part(self, start: int, stop: int) -> "Checkpoint":
        """A view of the model with these blocks alone, in the same places; not to be released."""
        part = copy(self)
        for name in ("sizes", "shapes"):
            vars(part).pop(name, None)
        part.blocks, part.block_names = self.blocks[start:stop], self.block_names[start:stop]
        part.linears, part.in_tower, part._first = self.linears[start:stop], 0, self._first + start
        return part

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of prunable weights of each block."""
        return tuple(sum(linear.size for linear in linears) for linears in self.linears)

    @property
    def linear_names(self) -> list[list[str]]:
        """Names of the linears of each block, relative to the block."""
        return [[linear.name for linear in linears] for linears in self.linears]

    @property
    def has_conv1d(self) -> bool:
        """Whether a linear is a `Conv1D`, whose weight is stored [in, out]."""
        return any(linear.transposed and linear.expert is None for linears in self.linears for linear in linears)

    @cached_property
    def shapes(self) -> tuple[tuple[Shape, ...], ...]:
        """Shape of each linear of each block, for allocations; whether it is of attention, or its value projection."""
        return tuple(
            tuple(
                Shape(
                    linear.out_features,
                    linear.in_features,
                    "attn" in linear.name or "attention" in linear.name,
                    linear.name.rpartition(".")[2] in ("v_proj", "value"),  # not fused with others
                )
                for linear in linears
            )
            for linears in self.linears
        )

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks."""
        return next(self.blocks.parameters()).dtype

    def weights(self, index: int) -> Tensors:
        """Parameters and buffers of a block on the compute device, by name in the block.

        Callers may keep them, but must not write to them.
        """
        return block_tensors(self.blocks[index]) if self._stream is None else self._stream.get(self._first + index)

    def tower_weights(self) -> list[Tensors]:
        """The tensors of the blocks of a vision tower that is pruned too, as `weights`; else none."""
        return [self.weights(index) for index in range(self.in_tower)]

    def key(self, index: int, linear: Linear) -> str:
        """Name in the model of the tensor that holds the weight of a linear."""
        return f"{self.block_names[index]}.{linear.key}"

    def as_saved(self, name: str, tensor: Tensor) -> Tensors:
        """The tensors, by name, that a saved folder holds for a parameter; for example one for each expert."""
        model: Any = self.model
        saved: Tensors = revert_weight_conversion(model, {name: tensor})
        return saved

    def _choose(self, calibration: int, validation: int) -> Offload:
        """The place of the blocks, beside the states of so many positions of each text and the largest Hessian."""
        is_mapped, inside, work = mapped_files(), list(self.blocks.parameters()), 0
        there = sum(tensor.nbytes for tensor in inside if not is_mapped(tensor))  # in host memory, and may stay there
        bounded = self.device.type != "cpu" or device_limit() is not None
        if calibration:
            state = hidden_width(self.config, is_image_classifier(self.model)) * self.dtype.itemsize
            widest = max(linear.in_features for linears in self.linears for linear in linears)
            work = states(calibration * state, validation * state) + hessian_bytes(widest)
        total, of_blocks = (sum(tensor.nbytes for tensor in each) for each in (self.model.parameters(), inside))
        return choose(total, of_blocks, Free(free_memory(self.device), host_memory() + there, bounded), work)

    def _move(self, ahead: bool) -> Stream | None:
        """Moves tensors to their places; returns a stream of blocks unless all are on the device."""
        make_current(self.device)
        if self.offload == "none":
            self.model.to(self.device)
            return None
        for block in self.blocks:
            # Those that are not in their place yet: to a mapped file, to pinned or to plain host memory.
            is_mapped, tensors = mapped_files(), [tensor for _, tensor in _tensors(block)]
            if self.offload == "disk":
                move_into(on_disk, [tensor for tensor in tensors if not is_mapped(tensor)])
            elif self.device.type == "cuda":
                move_into(pinned, [tensor for tensor in tensors if not tensor.is_pinned()])
            else:
                move_into(plain, [tensor for tensor in tensors if is_mapped(tensor)])
        in_blocks = {id(tensor) for _, tensor in _tensors(self.blocks)}
        for _, tensor in _tensors(self.model):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(self.device)
        return Stream([block_tensors(block) for block in self.blocks], self.device, ahead)


def block_tensors(block: nn.Module) -> Tensors:
    """Parameters and buffers of a block by name, without gradients."""
    return {name: tensor.detach() for name, tensor in _tensors(block)}


# --- Models in the caller's memory: a study calls one `memory:SHA256`, by the content of its weights and its config.
#
# While a model is lent, a folder holds its config and its tokenizer, and a registry of this process holds the model.
# Weights are only read; all else of the model is restored at the end.

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
        return {  # places, and numbers of writes, which inference tensors do not count
            name: (tensor.data_ptr(), tensor.nbytes, 0 if tensor.is_inference() else tensor._version)
            for name, tensor in _tensors(self.model)
        }


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
    with temporary_folder() as folder:
        # Saves a tokenizer; UserError if what is read back makes other tokens.
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            given = "is needed beside a model in memory" if tokenizer is None else f"is a {type(tokenizer).__name__}"
            raise UserError(f"tokenizer: {given}; give the model's own, from AutoTokenizer.from_pretrained")
        with as_user_error("tokenizer: cannot be saved and read again"):
            tokenizer.save_pretrained(folder)
            again = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if again(SAMPLE).input_ids != tokenizer(SAMPLE).input_ids or again.bos_token_id != tokenizer.bos_token_id:
            raise UserError("tokenizer: makes other tokens after it is saved and read again; give the model's folder")
        config = {**_config(model), "architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        content = model_digest(model)
        entry = LentModel(folder, content, MEMORY + content, model=model)
        before = _lent.get(entry.id)
        _lent[entry.id] = entry
        try:
            model.requires_grad_(False)
            yield entry
        finally:
            if before is None:
                del _lent[entry.id]
            else:
                _lent[entry.id] = before
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


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's saved tensors and of its config, without what does not change its output."""
    digest = hashlib.sha256(json.dumps(_config(model, NOT_CONTENT), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config(model: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in without}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
