"""The classes that a sparse image classifier and its dense model see in pictures, for the command `classify`.

The probability of a class is its softmax. Of equal ones the class with the lower index comes first, as in accuracies.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.checkpoints.classes import model_config
from atp_tune.checkpoints.devices import oom_as_user_error
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.errors import UserError
from atp_tune.events import Place
from atp_tune.frozen import FrozenModel
from atp_tune.inputs import InputKind
from atp_tune.inputs.images import LABELLED_IMAGES, Images
from atp_tune.inputs.pictures import Pictures, pictures_of
from atp_tune.inputs.pixels import ImageProcessor, class_name
from atp_tune.sparse.both_models import BothModels, Use, WholeModel

TOP = 5  # classes of an answer
BATCH = 32  # pictures at a time


class Guess(FrozenModel):
    """A class: its index and name in the model's config, and its probability."""

    index: int
    name: str
    probability: float


class Classified(FrozenModel):
    """The classes of a picture by the model that was asked, and by its dense model: the most probable is the first."""

    file: str
    classes: tuple[Guess, ...]
    dense: tuple[Guess, ...] | None = None


def classify(files: Sequence[Path], folder: Path, both: bool, place: Place) -> tuple[Classified, ...]:
    """The first `TOP` classes of each picture by the model of a folder or a configuration.

    `both`: by its dense model too. UserError, before a model is loaded, for a file that is
    no picture.
    """
    found = _Found(pictures_of(files, "FILE"))
    use = Use("classify", "classify DIR FILE", found.kind, of_images=True)
    with BothModels(folder, use, place, dense=both) as models, oom_as_user_error("classify"):
        sparse = found.guesses(models.model("sparse"))
        dense = found.guesses(models.model("dense")) if both else [None] * len(sparse)
    return tuple(
        Classified(file=str(file), classes=own, dense=other)
        for file, own, other in zip(files, sparse, dense, strict=True)
    )


class _Found:
    """Pictures, decoded once to see that all can be, and their pixels by the processor of the first model."""

    def __init__(self, found: Pictures) -> None:
        self._pictures = found
        self._folder: ModelFolder | None = None
        for index in range(len(found)):
            found.picture(index)

    def kind(self, folder: ModelFolder) -> InputKind[Any]:
        """The kind of input of a model, for images of the size of these."""
        self._folder = self._folder or folder
        return LABELLED_IMAGES.of({"test": self._images})

    def guesses(self, own: WholeModel) -> list[tuple[Guess, ...]]:
        """The first classes of each picture by a model."""
        self._folder = self._folder or own.folder
        return list(self._guesses(own, model_config(own.folder.path, own.folder.trusted).id2label))

    def _guesses(self, own: WholeModel, names: Mapping[int, Any]) -> Iterator[tuple[Guess, ...]]:
        for start in range(0, len(self._images), BATCH):
            batch = self._images[start : start + BATCH].batch(own.device)
            with torch.inference_mode(), own.opened() as model:
                logits = LABELLED_IMAGES.forward(model, batch).logits
            if not logits.isfinite().all():
                raise UserError(f"classify: the numbers of {own.folder.id} overflow, or are not defined")
            for places, values in zip(*_first(logits), strict=True):
                yield tuple(
                    Guess(index=index, name=class_name(names, index), probability=value)
                    for index, value in zip(places.tolist(), values.tolist(), strict=True)
                )

    @cached_property
    def _images(self) -> Images:
        assert self._folder is not None
        pixels = ImageProcessor.of(self._folder.path, self._folder.trusted).pixels(self._pictures)
        return Images.of(pixels, torch.zeros(len(pixels), dtype=torch.int64), 1)


def _first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and probabilities [images, at most TOP] of the most probable classes of logits [images, classes]."""
    values, places = logits.float().softmax(1).sort(dim=1, descending=True, stable=True)
    return places[:, :TOP], values[:, :TOP]
