"""Labelled images as a kind of input: a model is called with pixels [images, channels, height, width]."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atp_tune.checkpoints.blocks import classifies_images, model_config
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.config.data import ImageSet
from atp_tune.errors import UserError, within
from atp_tune.inputs import InputKind, cut_draws
from atp_tune.inputs.items import LABELS, PIXELS, ByRole, Items, shared
from atp_tune.inputs.pictures import ImageProcessor, Pictures, cached_pixels, class_indices, pictures, sides

DOUBLES = 0.01  # share of a role's images that an earlier role may have too; they are left out
PATCH = 4  # pixels between positions in the first blocks of models with stages


@dataclass(frozen=True)
class LabelledImages(InputKind):
    """The `InputKind` of image classifiers; its items are `Items`. `shape`: channels, height, width of an image."""

    shape: tuple[int, ...] = ()
    called = "an image"
    has_steps = True

    def of(self, items: ByRole) -> "LabelledImages":
        """The kind for images of the size of these; UserError if they differ in size."""
        shapes = {role: tuple(images.tensors[PIXELS].shape[1:]) for role, images in items.items()}
        (first, shape), *others = shapes.items()
        for role, other in others:
            if other != shape:
                raise UserError(f"images.{role}: images are {sides(other)}, those of images.{first} {sides(shape)}")
        return replace(self, shape=shape)

    def read(self, texts: Mapping[str, ImageSet], folder: ModelFolder, base: Path, bos: bool) -> dict[str, Items]:
        """The images of each role; UserError for bad input, or if two roles share an image."""
        if not classifies_images(folder.path):
            names = ", ".join(getattr(model_config(folder.path, folder.trusted), "architectures", None) or ["no class"])
            raise UserError(
                f"model.source: {folder.id} is no image classifier of transformers (its config.json names {names}); "
                "give one"
            )
        items = {role: read_images(role, wanted, folder, base) for role, wanted in texts.items()}
        doubles = duplicate_images(items)
        return {role: images.without(doubles[role]) for role, images in items.items()}

    def draws(
        self, text: ImageSet, count: int, positions: int, folder: ModelFolder, base: Path, bos: bool
    ) -> list[tuple[Items, Items]]:
        """Items and pool of each draw: pieces of the one order in which the images of the part are drawn."""
        whole = len(pictures(text, base))
        part, nsamples = int(text.part[1] * whole) - int(text.part[0] * whole), text.nsamples or whole
        if (wanted := count * nsamples) > part:
            raise UserError(
                f"images.calibration.draws: {count} draws take {wanted} images, and the part has {part}; lower one"
            )
        pool = _pool_size(text, positions, folder, base)
        per = min(max(nsamples, pool if positions else 0), part // count)
        more = text.of_length(count * per)
        return cut_draws(read_images("calibration", more, folder, base), count, nsamples, text.stride, pool)

    def many(self, text: ImageSet, positions: int, folder: ModelFolder, base: Path, bos: bool) -> Items:
        """Reads as many calibration images as hold `positions` hidden states: the first that are drawn."""
        more = text.of_length(_pool_size(text, positions, folder, base))
        return read_images("calibration", more, folder, base, at_most=True)

    def check_disjoint(self, items: ByRole) -> None:
        """UserError if two roles share more than a few images, pixel by pixel: sources have some images twice."""
        duplicate_images(items)

    def forward(self, model: nn.Module, batch: Items) -> Any:
        """The output of the model for images, in its dtype."""
        return model(**batch.in_dtype(model.dtype))  # type: ignore[arg-type]

    def examples(self, checkpoint: Checkpoint, items: int, positions: int) -> tuple[Items, Items, Items]:
        """Items of the right shape: black ones, noise, and the same noise upside down."""
        noise = torch.randn(items, *self.shape, generator=torch.Generator().manual_seed(0)).to(checkpoint.device)
        classes = torch.zeros(items, dtype=torch.int64, device=checkpoint.device)
        blank, one, other = (
            Items({PIXELS: pixels, LABELS: classes}, 1) for pixels in (torch.zeros_like(noise), noise, noise.flip(2))
        )
        return blank, one, other


LABELLED_IMAGES = LabelledImages()


def _pool_size(text: ImageSet, positions: int, folder: ModelFolder, base: Path) -> int:
    """How many images hold `positions` hidden states."""
    return max(1, positions // read_images("calibration", text.of_length(1), folder, base).positions)


def duplicate_images(items: ByRole) -> dict[str, dict[int, str]]:
    """The images that an earlier role has too, with that role, by role; UserError if they are more than a few."""
    by_role = shared(items)
    for role, doubles in by_role.items():
        if len(doubles) > DOUBLES * len(items[role]):
            first, other = next(iter(doubles.items()))
            raise UserError(
                f"images.{role}: image {first} is also in images.{other}, as are "
                f"{len(doubles) - 1} others; give them other images or parts"
            )
    return by_role


def read_images(role: str, wanted: ImageSet, folder: ModelFolder, base: Path, at_most: bool = False) -> Items:
    """The images of one role, as the model's processor makes them; UserError that names the key."""
    with within(f"images.{role}"):
        return image_items(wanted, folder, base, at_most)


def image_items(wanted: ImageSet, folder: ModelFolder, base: Path, at_most: bool = False) -> Items:
    """The images of a set, as the model's processor makes them; UserError that starts with a key of the set.

    `at_most`: fewer than `nsamples`, if the part has fewer.
    """
    selection, config = chosen(pictures(wanted, base), wanted, at_most), model_config(folder.path, folder.trusted)
    labels = torch.tensor(class_indices(selection, wanted, config), dtype=torch.int64)
    pixels = cached_pixels(ImageProcessor.of(folder.path, folder.trusted), selection)
    # Hidden states of an image in the first block, by the size of the model's patches, if its config says it.
    patch = getattr(getattr(config, "vision_config", config), "patch_size", PATCH)
    height, width = pixels.shape[2:]
    side = patch if isinstance(patch, int) and 0 < patch <= min(height, width) else PATCH
    return Items.of({PIXELS: pixels, LABELS: labels}, height // side * (width // side) + 1)


def chosen(source: Pictures, wanted: ImageSet, at_most: bool = False) -> Pictures:
    """The images of a role, of all that its source holds: a part of the shuffled ones, and a draw from it.

    `at_most`: fewer than `nsamples`, if the part has fewer.
    """
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    start, end = (int(share * len(source)) for share in wanted.part)
    part = order[start:end]
    count = len(part) if wanted.nsamples is None else wanted.nsamples
    if at_most:
        count = min(count, len(part))
    if not 0 < count <= len(part):
        raise UserError(
            f"nsamples: the part [{wanted.part[0]:g}, {wanted.part[1]:g}] of {wanted.source} has {len(part)} images, "
            f"{max(count, 1)} are asked for; lower it, or widen the part"
        )
    if wanted.nsamples is not None:
        part = part[torch.randperm(len(part), generator=torch.Generator().manual_seed(wanted.seed))[:count]]
    return source.select(part[:: wanted.stride].tolist())
