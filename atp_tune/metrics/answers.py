"""The first test images of a study of an image classifier with the answers of dense, uniform and best, for reports."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from atp_tune.frozen import FrozenModel
from atp_tune.metrics.continuations import NAMES

COUNT = 10  # images
SIDE = 64  # pixels of the longer side, at most

Words = Annotated[str, Field(max_length=1000)]
Picture = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=100_000)]  # base64 of a PNG


class ImageAnswer(FrozenModel):
    """A model's most probable class of an image."""

    name: Words
    index: int = Field(ge=0)  # of the class: names may be equal
    probability: float = Field(ge=0, le=1)


class Answers(FrozenModel):
    """Images as PNG in base64, name and index of each one's class, and the answer of each model, in the same order."""

    pictures: tuple[Picture, ...] = Field(min_length=1, max_length=100)
    labels: tuple[Words, ...]
    indices: tuple[int, ...]
    dense: tuple[ImageAnswer, ...]
    uniform: tuple[ImageAnswer, ...]
    best: tuple[ImageAnswer, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if {len(self.labels), len(self.indices), *(len(self.of(name)) for name in NAMES)} != {len(self.pictures)}:
            raise ValueError("not one label, one index and one answer of each model for each picture")
        return self

    def of(self, name: str) -> tuple[ImageAnswer, ...]:
        """The answers of a model."""
        return {"dense": self.dense, "uniform": self.uniform, "best": self.best}[name]
