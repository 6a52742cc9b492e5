"""The dense checkpoint: its blocks, their linears, and the place of the weights. Weights are never written to.

If the weights fit, all of them are on the compute device. Else the blocks are in host memory (pinned for CUDA), and if
they do not fit there, memory-mapped on disk. Then the tensors of a block are copied to the device while the block
before it computes (`streaming`): the device must hold two blocks, the shell (embeddings, final norm, head) and the
activations.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as hf_logging

from atp_tune.allocations import Shape
from atp_tune.checkpoints.blocks import Linear, find_blocks, find_linears, is_attention, is_value
from atp_tune.checkpoints.buffers import mapped_files, move_into, on_disk, pinned, plain
from atp_tune.checkpoints.classes import auto_class, is_image_classifier, width_of
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import (
    device_limit,
    free_memory,
    host_memory,
    is_out_of_memory,
    make_current,
    release_memory,
)
from atp_tune.checkpoints.offload import Free, Offload, choose, hessian_bytes, states
from atp_tune.checkpoints.quantized import check_full
from atp_tune.checkpoints.streaming import Stream, Tensors
from atp_tune.errors import UserError


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
    """What is changed of a model while it is used, as it was: all but its weights, which are only read."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, module.training, vars(module).get("forward"), [*module._forward_pre_hooks])
            for module in model.modules()
        ]
        self._tensors = [(tensor, tensor.device) for tensor in (*model.parameters(), *model.buffers())]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
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
        for tensor, device in self._tensors:
            tensor.data = tensor.data.to(device)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


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
        found, has_others = find_blocks(model, with_tower), is_image_classifier(model)
        self.blocks_name, self.block_names, self.blocks = found.name, found.names, found.modules
        self.in_tower = found.in_tower  # so many blocks, the first, are of the vision tower
        self._first = 0  # the place of block 0 in the whole model's blocks
        self.linears = [find_linears(block, has_others) for block in self.blocks]
        self.offload = offload or self._choose(positions)
        if self.in_tower and self.offload != "none" and device.type != "cpu":
            raise UserError(
                f"model.offload: a model whose vision tower is pruned too must lie on {device.type} as a whole, and "
                'does not; leave the key out, take model.prune = ["language"], a larger device or the CPU'
            )
        self._stream = self._place(ahead)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        trusted: bool = False,
        offload: Offload | None = None,
        with_tower: bool = False,
        positions: tuple[int, int] = (0, 0),
    ) -> "Checkpoint":
        """Loads a folder of safetensors; UserError if that fails. `trusted`: code in the folder may run.

        `with_tower`, `positions`: as for the class.
        """
        check_full(folder)
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            loaded: Any = auto_class(folder).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=trusted, **options
            )
        except Exception as error:  # parsers of unknown files raise many types
            if is_out_of_memory(error):
                raise
            raise UserError(f"model {folder}: transformers cannot load it: {one_line(error)}") from error
        model, found = loaded  # transformers only logs missing weights, and fills them with random numbers
        wrong = sorted(found["missing_keys"]) + [key for key, *_ in found["mismatched_keys"]]
        if wrong:
            raise UserError(f"model {folder}: has no {wrong[0]} of the shape that its config says; download it again")
        checkpoint = cls(model.requires_grad_(False), device, offload, with_tower=with_tower, positions=positions)
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
        self._stream = None
        self.model, self.blocks = nn.Module(), nn.ModuleList()
        return model

    def part(self, start: int, stop: int) -> "Checkpoint":
        """The same model with these blocks alone, in the same places; not to be released."""
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
        """Shape of each linear of each block, for allocations."""
        return tuple(
            tuple(
                Shape(linear.out_features, linear.in_features, is_attention(linear.name), is_value(linear.name))
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
        return tensors_of(self.blocks[index]) if self._stream is None else self._stream.get(self._first + index)

    def tower_weights(self) -> list[Tensors]:
        """The tensors of the blocks of a vision tower that is pruned too, as `weights`; else none."""
        return [self.weights(index) for index in range(self.in_tower)]

    def key(self, index: int, linear: Linear) -> str:
        """Name in the model of the tensor that holds the weight of a linear."""
        return f"{self.block_names[index]}.{linear.key}"

    def as_saved(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensors, by name, that a saved folder holds for a parameter; for example one for each expert."""
        model: Any = self.model
        saved: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        return saved

    def _choose(self, positions: tuple[int, int]) -> Offload:
        mapped, inside = mapped_files(), list(self.blocks.parameters())
        there = mapped.bytes_beside(inside)  # already in host memory, and may stay there
        bounded = self.device.type != "cpu" or device_limit() is not None
        free = Free(free_memory(self.device), host_memory() + there, bounded)
        return choose(bytes_of(self.model.parameters()), bytes_of(inside), free, self._work(*positions))

    def _work(self, calibration: int, validation: int) -> int:
        """Bytes beside the weights while a text of so many positions calibrates, with the largest Hessian."""
        if not calibration:
            return 0
        state = width_of(self.config, is_image_classifier(self.model)) * self.dtype.itemsize
        widest = max(linear.in_features for linears in self.linears for linear in linears)
        return states(calibration * state, validation * state) + hessian_bytes(widest)

    def _place(self, ahead: bool) -> Stream | None:
        """Moves tensors to their places; returns a stream of blocks unless all are on the device."""
        make_current(self.device)
        if self.offload == "none":
            self.model.to(self.device)
            return None
        for block in self.blocks:
            self._move_offloaded([*block.parameters(), *block.buffers()])
        in_blocks = {id(tensor) for tensor in (*self.blocks.parameters(), *self.blocks.buffers())}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(self.device)
        return Stream([tensors_of(block) for block in self.blocks], self.device, ahead)

    def _move_offloaded(self, block: list[Tensor]) -> None:
        """Moves tensors that are not in their place yet: to a mapped file, to pinned or to plain host memory."""
        mapped = mapped_files()
        if self.offload == "disk":
            move_into(on_disk, [tensor for tensor in block if not mapped.holds(tensor)])
        elif self.device.type == "cuda":
            move_into(pinned, [tensor for tensor in block if not tensor.is_pinned()])
        else:
            move_into(plain, [tensor for tensor in block if mapped.holds(tensor)])


def tensors_of(block: nn.Module) -> Tensors:
    """Parameters and buffers of a block by name, without gradients."""
    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Total bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)
