"""From pictures to a model's pixels and classes, by the image processor and the class names of its folder.

The processor is that of transformers with Pillow, which needs no torchvision and gives the same numbers on all
machines.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.checkpoints.convert import one_line
from atp_tune.errors import UserError, did_you_mean
from atp_tune.extras import require
from atp_tune.inputs.pictures import Pictures
from atp_tune.spec.images import ImageSet

AT_A_TIME = 64  # pictures that are processed together
UNNAMED = "LABEL_"  # before the number of a class without a name


@dataclass(frozen=True)
class Processor:
    """The image processor of a folder."""

    own: Any
    folder: Path

    @classmethod
    def of(cls, folder: Path, size: int | None = None) -> "Processor":
        """Loads it; UserError if the folder has none that transformers can run with Pillow.

        `size`: height and width of its images, instead of its own resizing and cropping.
        """
        require("images", "source")
        from transformers import AutoImageProcessor
        from transformers.image_utils import SizeDict

        try:
            own: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder), local_files_only=True, backend="pil"
            )
        except Exception as error:  # processors raise many types
            raise UserError(
                f"source: the image processor of the model in {folder} cannot be loaded: {one_line(error)}"
            ) from error
        if size is not None:
            own.size, own.do_resize, own.do_center_crop = SizeDict(height=size, width=size), True, False
        return cls(own, folder)

    @property
    def settings(self) -> dict[str, Any]:
        """What it does, as JSON."""
        return json.loads(self.own.to_json_string())  # type: ignore[no-any-return]

    def pixels(self, found: Pictures) -> Tensor:
        """Pixels float32 [images, channels, height, width]; UserError for a picture that cannot be read."""
        parts, shape = [], None
        for start in range(0, len(found), AT_A_TIME):
            for index in range(start, min(start + AT_A_TIME, len(found))):
                part = self._one(found, index)
                if part.shape != (shape or part.shape):
                    raise UserError(
                        f"source: {found.name(index)} is {_size(part)} after the model's processor, others are "
                        f"{_size(shape)}; a preprocessor_config.json with one size is needed"
                    )
                shape = part.shape
                parts.append(part)
        return torch.stack(parts)

    def _one(self, found: Pictures, index: int) -> Tensor:
        picture = found.picture(index)
        try:
            pixels = self.own(picture, return_tensors="pt")["pixel_values"]
        except Exception as error:  # processors raise many types
            raise UserError(f"source: the processor cannot read {found.name(index)}: {one_line(error)}") from error
        return torch.as_tensor(pixels, dtype=torch.float32)[0]


def class_indices(found: Pictures, wanted: ImageSet, config: Any) -> list[int]:
    """The model's class of each picture: by name where the source has names, else by number.

    The names of `wanted.labels` are those of the source's numbers. UserError for a label that the model lacks.
    """
    names = {index: str(name) for index, name in config.id2label.items()}
    is_named = not all(name.startswith(UNNAMED) for name in names.values())
    known = _by_name(names) if is_named else _by_order(found, len(names)) if found.classes else {}
    result = []
    for index, given in enumerate(found.labels):
        label = _named(given, found.name(index), wanted) if is_named else given
        own = label if isinstance(label, int) and label in names else known.get(_plain(str(label)))
        if own is None:
            some = ", ".join(list(names.values())[:3])
            raise UserError(
                f"source: {found.name(index)} has the class {label!r}, the model's {len(names)} classes are {some}, …"
                f"{did_you_mean(str(label), list(names.values()))}"
            )
        result.append(own)
    return result


def _named(label: str | int, picture: str, wanted: ImageSet) -> str | int:
    """The name of a numbered label, if the study file names the numbers."""
    if isinstance(label, str) or wanted.labels is None:
        return label
    if not 0 <= label < len(wanted.labels):
        raise UserError(f"labels: {picture} has class {label}, and there are {len(wanted.labels)} names")
    return wanted.labels[label]


def _by_name(names: dict[int, str]) -> dict[str, int]:
    """Class by name, without regard to case; of ImageNet's lists of synonyms each, unless two classes share it."""
    found: dict[str, int] = {}
    shared = set()
    for index, name in names.items():
        for synonym in {_plain(name), *map(_plain, name.split(","))}:
            if found.setdefault(synonym, index) != index:
                shared.add(synonym)
    whole = {_plain(name): index for index, name in names.items()}
    return {name: index for name, index in found.items() if name not in shared} | whole


def _by_order(found: Pictures, count: int) -> dict[str, int]:
    """Class by the alphabetical order of the source's names, for a model whose classes have no names."""
    names = sorted(found.classes)
    if len(names) != count:
        raise UserError(
            f"source: has {len(names)} classes, and the model has {count} without names; give config.json an id2label"
        )
    return {_plain(name): index for index, name in enumerate(names)}


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def _size(shape: Any) -> str:
    return "×".join(map(str, getattr(shape, "shape", shape)))


def labels_of(found: Pictures, wanted: ImageSet) -> tuple[str, ...]:
    """The names of all classes of a source, in the order of their numbers, for a classifier to be fitted."""
    if wanted.labels is not None:
        return wanted.labels
    if found.classes:
        return tuple(sorted(found.classes))
    numbers: Sequence[Any] = found.labels
    return tuple(map(str, range(max(numbers) + 1)))
