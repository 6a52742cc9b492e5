"""The blocks of a model: one list, or several lists in the stages of an image classifier.

Between the stages of an image classifier lie steps such as downsampling, which belong to no block and stay dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from atp_tune.checkpoints.classes import is_image_classifier, language_model
from atp_tune.errors import UserError


@dataclass(frozen=True)
class Blocks:
    """The blocks in the order in which they run, and the name in the model of each.

    `name`: of their list; of several lists with `*` where they differ, such as swin.encoder.layers.*.blocks.
    """

    name: str
    names: tuple[str, ...]
    modules: nn.ModuleList


def find_blocks(model: nn.Module) -> Blocks:
    """The blocks: the `nn.ModuleList` with the most parameters, or the lists in it; UserError if there is none.

    In a model that also reads images, only its language model is searched.
    """
    inside = set(language_model(model).modules())
    named = ((name, module) for name, module in model.named_modules() if module in inside)
    lists = [(name, module) for name, module in named if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model {type(model).__name__}: has no list of blocks; only transformer models can be pruned")
    name, found = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    if not is_image_classifier(model):
        return Blocks(name, tuple(f"{name}.{index}" for index in range(len(found))), found)
    leaves = list(_leaves(name, found))
    without = next((block for _, block in leaves if not _has_linear(block)), None)
    if without is not None:
        raise UserError(
            f"model {type(model).__name__}: block {type(without).__name__} has no linear; models of convolutions "
            "alone cannot be pruned, take one with linears in all of its blocks, such as ViT, DINOv2, Swin or ConvNeXt"
        )
    return Blocks(_common([name for name, _ in leaves]), tuple(name for name, _ in leaves), nn.ModuleList(
        block for _, block in leaves
    ))  # fmt: skip


def _leaves(name: str, members: nn.ModuleList | nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """The members of a list; in the place of a stage the members of its lists."""
    for index, member in enumerate(members):
        inner = list(_lists(f"{name}.{index}", member))
        if not inner:
            yield f"{name}.{index}", member
        for place, found in inner:
            yield from _leaves(place, found)


def _lists(name: str, module: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists in a module, or the module itself, of blocks: all with linears inside."""
    if isinstance(module, nn.ModuleList | nn.Sequential) and _holds_blocks(module):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _lists(f"{name}.{key}", child)


def _holds_blocks(members: nn.ModuleList | nn.Sequential) -> bool:
    return len(members) > 0 and all(_has_linear(member) and not isinstance(member, nn.Linear) for member in members)


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())


def _common(names: list[str]) -> str:
    """The name of the lists: the names of their blocks without the index, with `*` for parts that differ."""
    rows = {tuple(name.split(".")[:-1]) for name in names}
    if len({len(row) for row in rows}) > 1:
        return min(rows)[0]
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*rows, strict=True))
