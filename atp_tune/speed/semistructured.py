"""The engine `semi-structured`: 2:4 zeros on the sparse tensor cores of an NVIDIA GPU, by `torch.sparse`.

The dense model beside it is the same in the same number format, with the plain tensor cores.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.speed import torch_engine
from atp_tune.speed.model_pair import Pair
from atp_tune.speed.throughput import Engine, Task

NAME = "semi-structured"
CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores


def opened(pair: Pair, task: Task, device: torch.device) -> AbstractContextManager[Engine]:
    """Both models in bf16; UserError where the zeros are not 2:4 or the card is not there."""
    check(pair.pattern, device)
    return torch_engine.opened(pair, task, device, torch.bfloat16, NAME, compress)


def check(pattern: str, device: torch.device) -> None:
    """UserError where the zeros are not 2:4 or the card is not there."""
    if pattern != "2:4":
        raise UserError(f'--engine {NAME}: needs zeros in the pattern "2:4", those of this model are {pattern}')
    check_device(device)


def check_device(device: torch.device) -> None:
    """UserError where there is no GPU with sparse tensor cores."""
    found = f"{device.type} has none"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    raise UserError(f"--engine {NAME}: needs an NVIDIA GPU of compute capability 8.0 or above, {found}")


def compress(checkpoint: Checkpoint) -> None:
    """Puts compressed weights in the place of the pruned linears' own; UserError for experts and GPT-2's linears."""
    for block, linears in zip(checkpoint.blocks, checkpoint.linears, strict=True):
        for linear in linears:
            module = None if linear.expert is not None else block.get_submodule(linear.name)
            if not isinstance(module, nn.Linear):
                raise UserError(f"--engine {NAME}: {linear.name} is no nn.Linear, and torch.sparse compresses no other")
            check_groups(linear.name, module.weight)
            module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)


def check_groups(name: str, weight: Tensor) -> None:
    """UserError if one of a weight's groups [out, in / 4, 4] has fewer than 2 zeros: they would be lost."""
    if weight.shape[1] % 4 or int((weight.reshape(len(weight), -1, 4) == 0).sum(2).min()) < 2:
        raise UserError(f"--engine {NAME}: {name} is not 2:4 everywhere; was the folder changed after `apply`?")
