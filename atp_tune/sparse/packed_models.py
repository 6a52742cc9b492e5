"""Sparse models whose linears are packed in memory: a kernel multiplies by them faster than by zeros."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.packed.kernel import kernel_name
from atp_tune.packed.layout import LEAST, Kind, packed_linear, zeros_of
from atp_tune.packed.modeling_atp_sparse import is_packable, speed_dense_linears
from atp_tune.run.observers import check_room


def is_fast(device: torch.device) -> bool:
    """Whether packed weights are known to be faster than dense ones on a device."""
    return device.type == "cpu" and kernel_name() is not None


def pack_if_faster(checkpoint: Checkpoint) -> None:
    """Packs the sparse linears of a checkpoint whose weights lie on a device where that is faster."""
    if is_fast(checkpoint.device) and checkpoint.offload == "none":
        pack_linears(checkpoint)


def pack_linears(checkpoint: Checkpoint, kind: Kind = "same") -> int:
    """Replaces the sparse linears of a model by packed ones, and speeds the others; the number of packed ones."""
    found = list(_sparse(checkpoint))
    for block, name, linear in found:
        parent, _, last = name.rpartition(".")
        setattr(block.get_submodule(parent), last, packed_linear(linear, kind))
    speed_dense_linears(checkpoint.model)
    return len(found)


def packed_copy(
    checkpoint: Checkpoint, blocks: Iterable[PrunedBlock], what: str, instead: str
) -> tuple[nn.Module, int]:
    """A copy of a model with the pruned weights of its blocks, packed where that is for, and the number of packed ones.

    All other weights are the model's own, which lies in memory as a whole; the dense model stays as it is. UserError,
    before a block is asked for, if memory is too small: see `check_room`.
    """
    check_room(checkpoint, what, instead)
    model, packed = checkpoint.model, 0
    known: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for block in blocks:
        for linear in checkpoint.linears[block.index]:
            weight = nn.Parameter(block.weights[linear.key], requires_grad=False)
            owner = checkpoint.blocks[block.index]
            module: Any = None if linear.expert is not None else owner.get_submodule(linear.name)
            if is_packable(module) and zeros_of(weight.detach()) >= LEAST:
                pruned = copy.copy(module)
                pruned._parameters = {**module._parameters, "weight": weight}
                known[id(module)] = packed_linear(pruned)
                packed += 1
            else:
                known[id(model.get_parameter(checkpoint.key(block.index, linear)))] = weight
    found = copy.deepcopy(model, known)
    speed_dense_linears(found)
    return found, packed


def _sparse(checkpoint: Checkpoint) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Block, name and module of each linear that packing is for."""
    for block, linears in zip(checkpoint.blocks, checkpoint.linears, strict=True):
        for linear in linears:
            module: Any = None if linear.expert is not None else block.get_submodule(linear.name)
            if is_packable(module) and zeros_of(module.weight.detach()) >= LEAST:
                yield block, linear.name, module
