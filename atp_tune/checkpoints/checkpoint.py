"""The dense checkpoint: its blocks, their linears, and where the weights lie. Nothing here is ever written to.

Three residencies. Where the weights fit, all of them lie on the compute device. Where they don't, the blocks lie in
host memory, pinned for CUDA, and where they don't fit there either they stay on disk, memory-mapped. Then a block's
tensors are copied to the device, the next one's while it computes (`streaming`), so that two blocks, the shell
(embeddings, final norm, head) and the activations are all that the device must hold.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as hf_logging

from atp_tune.allocations import Shape
from atp_tune.checkpoints.buffers import mapped_files, move_into, on_disk, pinned, plain
from atp_tune.checkpoints.classes import auto_class, language_model
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.devices import (
    device_limit,
    free_memory,
    host_memory,
    is_out_of_memory,
    make_current,
    release_memory,
)
from atp_tune.checkpoints.linears import Linear, find_linears, is_attention, is_value
from atp_tune.checkpoints.offload import Free, Offload, choose
from atp_tune.checkpoints.quantized import check_full
from atp_tune.checkpoints.streaming import Stream, Tensors
from atp_tune.errors import UserError


class Released(ABC):
    """Something that holds much memory, and is released at the end of a `with`."""

    @abstractmethod
    def release(self) -> None:
        """Frees the memory; the object is of no use afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Checkpoint(Released):
    """A model in evaluation mode, seen as a list of blocks; weights are read, never written.

    As a context manager it gives a caller's model back as it was, and frees one that it has loaded itself: `with
    Checkpoint(model, device) as checkpoint`.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, offload: Offload | None = None, ahead: bool = True
    ) -> None:
        """`offload`: None chooses; `ahead`: whether the next block is copied while one is used."""
        tensors = (*model.parameters(), *model.buffers())
        self._modes = [(module, module.training) for module in model.modules()]
        self._places = [(tensor, tensor.device) for tensor in tensors]
        self._gives_router_logits = bool(getattr(getattr(model, "config", None), "output_router_logits", False))
        self._is_loaded = False  # here, for this checkpoint alone
        self.model = model.eval()
        if self._gives_router_logits:
            self.config.output_router_logits = False  # for the loss in training; bypassed blocks have none to give
        self.device = device
        self.blocks_name, self.blocks = find_blocks(model)
        self.linears = [find_linears(block) for block in self.blocks]
        self.offload = offload or self._choose()
        self._stream = self._place(ahead)

    @classmethod
    def load(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        trusted: bool = False,
        offload: Offload | None = None,
    ) -> "Checkpoint":
        """Loads a folder of safetensors; UserError where transformers cannot. `trusted`: code in it may run."""
        check_full(folder)
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        options = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            loaded: Any = auto_class(folder).from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=trusted, **options
            )
        except Exception as error:  # a parser of foreign files fails in any way it likes
            if is_out_of_memory(error):
                raise
            raise UserError(f"model {folder}: transformers cannot load it: {one_line(error)}") from error
        model, found = loaded  # transformers fills what is missing with random numbers, and only logs it
        wrong = sorted(found["missing_keys"]) + [key for key, *_ in found["mismatched_keys"]]
        if wrong:
            raise UserError(f"model {folder}: has no {wrong[0]} of the shape that its config says; download it again")
        checkpoint = cls(model.requires_grad_(False), device, offload)
        checkpoint._is_loaded = True
        return checkpoint

    def release(self) -> None:
        """Gives the model back as it was: the mode of each module, its config, the device of each tensor.

        One that `load` has loaded is freed instead. The device's memory is free for what comes next.
        """
        self._stream = None
        if self._is_loaded:
            self.model, self.blocks, self._modes, self._places = nn.Module(), nn.ModuleList(), [], []
        else:
            self._restore()
        release_memory()

    def _restore(self) -> None:
        for module, training in self._modes:
            module.training = training
        if self._gives_router_logits:
            self.config.output_router_logits = True
        for tensor, device in self._places:
            tensor.data = tensor.data.to(device)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of prunable weights of each block."""
        return tuple(sum(linear.size for linear in linears) for linears in self.linears)

    @property
    def linear_names(self) -> list[list[str]]:
        """Names of the linears of each block, within their block."""
        return [[linear.name for linear in linears] for linears in self.linears]

    @cached_property
    def shapes(self) -> tuple[tuple[Shape, ...], ...]:
        """Shape of each linear of each block, as an allocation sees it."""
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
        """Number format in which the model is computed."""
        return next(self.blocks.parameters()).dtype

    def weights(self, index: int) -> Tensors:
        """All tensors of a block (parameters and buffers) on the compute device, by their name in the block.

        They may be kept as long as one likes, and are not to be written to.
        """
        return tensors_of(self.blocks[index]) if self._stream is None else self._stream.get(index)

    def key(self, index: int, linear: Linear) -> str:
        """Name within the whole model of the tensor that holds a linear's weight."""
        return f"{self.blocks_name}.{index}.{linear.key}"

    def as_saved(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What a folder holds in the place of a parameter, by its names there: the experts one by one, say."""
        model: Any = self.model
        saved: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        return saved

    def _choose(self) -> Offload:
        mapped, inside = mapped_files(), list(self.blocks.parameters())
        there = mapped.bytes_beside(inside)  # already in memory of our own, which the blocks may keep
        bounded = self.device.type != "cpu" or device_limit() is not None
        free = Free(free_memory(self.device), host_memory() + there, bounded)
        return choose(bytes_of(self.model.parameters()), bytes_of(inside), free)

    def _place(self, ahead: bool) -> Stream | None:
        """Moves tensors to where they are to lie; the stream of blocks where that is not the device."""
        make_current(self.device)
        if self.offload == "none":
            self.model.to(self.device)
            return None
        for block in self.blocks:
            self._settle([*block.parameters(), *block.buffers()])
        in_blocks = {id(tensor) for tensor in (*self.blocks.parameters(), *self.blocks.buffers())}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in in_blocks:
                tensor.data = tensor.data.to(self.device)
        return Stream([tensors_of(block) for block in self.blocks], self.device, ahead)

    def _settle(self, block: list[Tensor]) -> None:
        """Moves what does not lie where the offload says: to a mapped file, to pinned memory, out of mapped files."""
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
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's blocks: the `nn.ModuleList` with the most parameters; UserError if there is none.

    Of a model that reads images too it is one of its language model.
    """
    inside = set(language_model(model).modules())
    named = ((name, module) for name, module in model.named_modules() if module in inside)
    lists = [(name, module) for name, module in named if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model {type(model).__name__}: has no list of blocks; only transformer models can be pruned")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
