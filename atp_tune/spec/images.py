"""The tables `[images.*]` of a study of an image classifier."""

import posixpath
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from atp_tune.frozen import SettingsTable
from atp_tune.plan import Share

if TYPE_CHECKING:
    pass

KINDS = {  # of sources → the form of what follows the colon, for people
    "folder": "folder:PATH",
    "idx": "idx:PATH",
    "parquet": "parquet:PATH",
    "hub": "hub:ORG/NAME",
    "package": "package:MODULE/PATH",
}
LOCAL = ("folder:", "idx:", "parquet:")
FORMS = ", ".join(KINDS.values())
IMAGES, CLASSES = "images", "classes"  # the kind of input, and the score, of an image classifier


class ImageSet(SettingsTable):
    """Labelled images of one role: which, and how many. They are shuffled once, alike for all roles of a source."""

    source: str = Field(min_length=1, description=f"{FORMS}; folder: PATH/CLASS/FILE, idx: a file of MNIST's format")
    config: str | None = Field(None, description="configuration of a hub dataset")
    split: str | None = Field(None, description="split of a hub dataset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    column: str = Field("image", description="column of the images (hub, parquet)")
    label: str = Field("label", description="column of the classes (hub, parquet)")
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = Field(
        None, description="names of the classes 0, 1, … of a source that has numbers; else they are the model's own"
    )
    part: tuple[Share, Share] = Field((0.0, 1.0), description="interval of the shuffled images, as shares")
    nsamples: int | None = Field(None, ge=1, le=10_000_000, description="number of images; by default all of the part")
    stride: int = Field(1, ge=1, description="use every stride-th image only, from the first")
    seed: int = Field(0, ge=0, description="of the draw of nsamples images from the part")

    @model_validator(mode="after")
    def _fetchable(self) -> Self:
        if self.kind not in KINDS or not self.place:
            raise ValueError(f'source: "{self.source}" is none of {FORMS}')
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part: [{self.part[0]}, {self.part[1]}] holds nothing")
        of_hub = ("config", "split", "revision") if self.kind != "hub" else ()
        if wrong := next((key for key in of_hub if getattr(self, key) is not None), None):
            raise ValueError(f"{wrong}: does not go with a {self.kind}: source; leave it out")
        if self.kind == "hub" and self.split is None:
            raise ValueError("split: a hub: source needs one, such as train, validation or test")
        return self

    @property
    def kind(self) -> str:
        """The kind of source, the part before the colon."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """What follows the colon."""
        return self.source.partition(":")[2]

    def overlaps(self, other: "ImageSet") -> bool:
        """Whether both sets have images of the same part of one source."""
        keys = ("kind", "config", "split", "revision")
        if any(getattr(self, key) != getattr(other, key) for key in keys):
            return False
        if posixpath.normpath(self.place) != posixpath.normpath(other.place):
            return False
        return self.part[0] < other.part[1] and other.part[0] < self.part[1]


class CalibrationImages(ImageSet):
    """The images on which pruners measure; their labels are used by prices only."""

    draws: int = Field(
        1,
        ge=1,
        description="number of draws for the final scores of best and uniform, for which a fitted plan is fitted anew; "
        "the study uses the first",
    )

    @model_validator(mode="after")
    def _repeatable(self) -> Self:
        if self.draws > 1 and self.nsamples is None:
            raise ValueError("draws: need a number of images to draw; give nsamples")
        return self

    @property
    def text(self) -> ImageSet:
        """The first draw, which the study uses."""
        return ImageSet.model_validate(self.model_dump(exclude={"draws"}))


class ImageSets(SettingsTable):
    """The images by role; the test images are used for the final numbers only."""

    calibration: CalibrationImages = Field(description="the images on which pruners measure")
    validation: ImageSet = Field(description="the images on which trials are measured and compared")
    test: ImageSet | None = Field(None, description='of the final numbers; left out with protocol = "paper"')
