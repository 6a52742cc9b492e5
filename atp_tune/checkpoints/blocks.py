"""The blocks of a model: one list, or several lists in the stages of an image classifier.

Of a model that reads images beside text those of its vision tower may come before those of its language model.
Between the stages of an image classifier lie steps such as downsampling, which belong to no block and stay dense.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from atp_tune.checkpoints.classes import is_image_classifier, language_model, vision_tower
from atp_tune.errors import UserError
from atp_tune.spec.block_names import joined


@dataclass(frozen=True)
class Blocks:
    """The blocks in the order in which they run, and the name in the model of each.

    `name`: of their list; of several lists with `*` where they differ, such as swin.encoder.layers.*.blocks;
    see also `spec.block_names`. `in_tower`: so many of them, the first, are of the vision tower.
    """

    name: str
    names: tuple[str, ...]
    modules: nn.ModuleList
    in_tower: int = 0

    def __add__(self, other: "Blocks") -> "Blocks":
        """The blocks of a vision tower, and behind them those of the language model."""
        modules = nn.ModuleList([*self.modules, *other.modules])
        name = joined(self.name, len(self.names), other.name)
        return Blocks(name, (*self.names, *other.names), modules, len(self.names))


def find_blocks(model: nn.Module, with_tower: bool = False) -> Blocks:
    """The blocks: the `nn.ModuleList` with the most parameters, or the lists in it; UserError if there is none.

    In a model that also reads images, only its language model is searched; `with_tower`: its vision tower too.
    """
    if with_tower:
        return _of_tower(model) + find_blocks(model)
    name, found = _largest(model, language_model(model))
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


def _of_tower(model: nn.Module) -> Blocks:
    """The blocks of a model's vision tower; UserError if it has none."""
    tower = vision_tower(model)
    if tower is None:
        raise UserError(
            f'model.prune: {type(model).__name__} has no vision tower that transformers knows of; take ["language"]'
        )
    name, found = _largest(model, tower)
    return Blocks(name, tuple(f"{name}.{index}" for index in range(len(found))), found)


def _largest(model: nn.Module, part: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name in the model, and list, of the most parameters in a part of it; UserError if it has no list."""
    inside = set(part.modules())
    named = ((name, module) for name, module in model.named_modules() if module in inside)
    lists = [(name, module) for name, module in named if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"model {type(model).__name__}: has no list of blocks; only transformer models can be pruned")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


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
