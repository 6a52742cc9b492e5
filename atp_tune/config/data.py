"""The data of a study, by role: the tables `[texts.*]` of a language model, or `[images.*]` of an image classifier."""

import posixpath
from math import gcd
from pathlib import PureWindowsPath
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, StrictBool, model_serializer, model_validator

from atp_tune.plan import Share
from atp_tune.utils.registry import SettingsTable, check_once

MANUAL = "package:pydoc_data.topics:topics"  # in every Python: a part of its manual
MIXED = "mixed"
KINDS = ("manual", "news", "tales", "debates", "code")  # of `mixed`, of which windows are taken in turn
MEMORY = "memory:"  # before the SHA-256 of a model or a text that lies in the memory of a Python process
FORMS = {  # of sources of images → the form of what follows the colon, for people
    "folder": "folder:PATH",
    "idx": "idx:PATH",
    "parquet": "parquet:PATH",
    "hub": "hub:ORG/NAME",
    "package": "package:MODULE/PATH",
}
KNOWN = ", ".join(FORMS.values())
TEXT_SOURCES = ("c4", "wikitext2", "mixed", "hub", "file", "package", "memory")  # `inputs.sources` reads them
LOCAL = ("file", "folder", "idx", "parquet")  # sources of texts and images that are files of this machine
IMAGES, CLASSES = "images", "classes"  # the kind of input, and the score, of an image classifier


class Words(NamedTuple):
    """The data that plans are measured on, in words: `one` or `several` in `unit`; `rate` counts what runs `how`."""

    data: str = "text"
    unit: str = "windows"
    rate: str = "tokens"
    how: str = "decoded one at a time"
    one: str = "text"
    several: str = "texts"
    task: str = "text-generation"  # as the hub calls it
    note: str = ""


class Source(SettingsTable):
    """The data of one role: a part of a source, and how many items are drawn from it; `data`: text or images."""

    data: ClassVar[str]
    words: ClassVar[Words]
    items: ClassVar[Any] = "images"
    source: str
    config: str | None = None
    """configuration of a hub dataset"""
    split: str | None = None
    """split of a hub dataset"""
    revision: str | None = None
    """branch, tag or commit of a hub dataset"""
    column: str
    part: tuple[Share, Share]
    nsamples: int | None
    stride: int
    seed: int

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part: [{self.part[0]}, {self.part[1]}] holds nothing")
        return self

    @property
    def place(self) -> str:
        """The part after the colon."""
        return self.source.partition(":")[2]

    @property
    def told(self) -> str:
        """Source, split, part and items in a few words, without folders; what has no key `shuffle` always is."""
        split = f" {self.split}" if self.split else ""
        shuffled = " shuffled" * getattr(self, "shuffle", True)
        part = "" if self.part == (0, 1) else f", part {self.part[0]:g} to {self.part[1]:g}{shuffled}"
        return f"{text_name(self.source)}{split}{part}, {self.nsamples or 'all'} {self.items}"

    def overlaps(self, other: "Source") -> bool:
        """Whether both have items of the same part of one source."""
        keys = ("data", "config", "split", "revision")
        is_like = all(getattr(self, key) == getattr(other, key) for key in keys) and self._has_same_source(other)
        is_met = self.part[0] < other.part[1] and other.part[0] < self.part[1]
        return is_like and (is_met or self._is_cut_unlike(other))

    def of_length(self, nsamples: int) -> Self:
        """The data with so many items, and none left out between them."""
        return self.model_copy(update={"nsamples": nsamples, "stride": 1})

    def _has_same_source(self, other: Any) -> bool:
        """Whether the other, which is alike, reads the same source."""
        raise NotImplementedError

    def _is_cut_unlike(self, other: Any) -> bool:
        """Whether parts of both, which read the same source, cannot be compared."""
        return False


class Text(Source):
    """One text and how its windows are drawn."""

    data, words = "text", Words()
    source: str = Field(min_length=1)
    """c4, wikitext2, mixed[:KIND,…], hub:ORG/NAME, file:PATH, package:MODULE[:ATTRIBUTE] or a plug-in"""
    column: str = "text"
    """column of the text (hub, .jsonl, .parquet)"""
    part: tuple[Share, Share] = (0.0, 1.0)
    """interval of the text, as shares of its whole documents"""
    shuffle: bool = False
    """shuffle the documents before the part is cut, in all three texts: parts are of one kind"""
    sampling: Literal["consecutive", "random"] = "consecutive"
    """consecutive: documents are joined and cut without overlap; random: windows from random documents"""
    nsamples: int | None = Field(None, ge=1, le=1_000_000)
    """number of windows; by default all of a text with consecutive sampling"""
    stride: int = Field(1, ge=1)
    """use every stride-th window only, from the first"""
    seqlen: int = Field(2048, ge=2)
    """tokens per window"""
    seed: int = Field(0, ge=0)
    """seed of random sampling"""
    images: str | None = Field(None, min_length=1)
    """of calibration: column of an image beside each text (file:X.parquet, hub:), for models that read images too"""

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        if self.sampling == "random" and self.nsamples is None:
            raise ValueError("nsamples: a random draw needs their number")
        if (count := len(self.mixed)) and gcd(count, self.stride) > 1:
            raise ValueError(f"stride: every {self.stride}th window leaves kinds out; share no divisor with {count}")
        check_once(self.mixed, "source")
        return self

    @property
    def items(self) -> str:
        """Windows, or pairs, and their length."""
        return f"{'pairs of image and text' if self.images else 'windows'} of {self.seqlen} tokens"

    @property
    def mixed(self) -> tuple[str, ...]:
        """The kinds of which windows are taken in turn; () for a text of one kind."""
        name, _, kinds = self.source.partition(":")
        own = kinds.split(",") if kinds else KINDS
        return tuple(own) if name == MIXED and len(own) > 1 else ()

    @property
    def kinds(self) -> tuple[Self, ...]:
        """The texts of which windows are taken in turn: of `mixed` one of each kind, else the text itself."""
        if not (kinds := self.mixed):
            return (self,)
        sizes = [self.nsamples and -(-(self.nsamples - index) // len(kinds)) for index in range(len(kinds))]
        return tuple(
            self.model_copy(update={"source": f"{MIXED}:{kind}", "nsamples": size})
            for kind, size in zip(kinds, sizes, strict=True)
            if size != 0
        )

    @property
    def turns(self) -> tuple[str, ...]:
        """The kinds of the first windows, after which they begin again; () for a text of one kind."""
        count = len(self.mixed)
        return tuple(self.mixed[turn * self.stride % count] for turn in range(count))

    @model_serializer(mode="wrap")
    def _without_none(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what a text alone may have and has not, so that files and keys of the cache stay as they were."""
        return {key: value for key, value in inner(self).items() if value is not None or key in Source.model_fields}

    def _has_same_source(self, other: Any) -> bool:
        """Whether both are of one source, or of the same kind of `mixed`."""
        mine, others = (
            {f"{MIXED}:manual"}
            if each.source == MANUAL
            else {f"{MIXED}:{kind}" for kind in each.mixed} or {each.source}
            for each in (self, other)
        )
        return self.column == other.column and not mine.isdisjoint(others)

    def _is_cut_unlike(self, other: Any) -> bool:
        """A shuffled part has documents of everywhere, and `mixed` leaves some of the manual out."""
        return bool(self.shuffle != other.shuffle or (self.source == MANUAL) != (other.source == MANUAL))


class ImageSet(Source):
    """Labelled images of one role: which, and how many. They are shuffled once, alike for all roles of a source."""

    data, words = "images", Words(
        "images", "images", "images", "one image at a time", "image", "images", "image-classification",
        "perplexity: over classes, the exponential of the mean cross-entropy; accuracy: top-1",
    )  # fmt: skip
    source: str = Field(min_length=1, description=f"{KNOWN}; folder: PATH/CLASS/FILE, idx: a file of MNIST's format")
    column: str = "image"
    """column of the images (hub, parquet)"""
    label: str = "label"
    """column of the classes (hub, parquet)"""
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """names of the classes 0, 1, … of a source that has numbers; else they are the model's own"""
    part: tuple[Share, Share] = (0.0, 1.0)
    """interval of the shuffled images, as shares"""
    nsamples: int | None = Field(None, ge=1, le=10_000_000)
    """number of images; by default all of the part"""
    stride: int = Field(1, ge=1)
    """use every stride-th image only, from the first"""
    seed: int = Field(0, ge=0)
    """of the draw of nsamples images from the part"""

    @model_validator(mode="after")
    def _fetchable(self) -> Self:
        if self.kind not in FORMS or not self.place:
            raise ValueError(f'source: "{self.source}" is none of {KNOWN}')
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

    def _has_same_source(self, other: Any) -> bool:
        return bool(self.kind == other.kind and posixpath.normpath(self.place) == posixpath.normpath(other.place))


class Drawn(Source):
    """The data on which pruners measure, and the number of its draws."""

    kind_of_one: ClassVar[type[Text | ImageSet]]
    draws: int = Field(1, ge=1)
    (
        "number of draws for the final scores of best and uniform, for which a fitted plan is fitted anew; the "
        "study uses the first"
    )

    @model_validator(mode="after")
    def _repeatable(self) -> Self:
        if self.draws > 1 and self.nsamples is None:
            raise ValueError("draws: need a number of items, which the next draw follows; give nsamples")
        return self

    @property
    def text(self) -> Text | ImageSet:
        """The first draw, which the study uses."""
        return self.kind_of_one.model_validate(self.model_dump(exclude={"draws"}))


class Calibration(Text, Drawn):
    """The calibration text, and the number of its draws."""

    kind_of_one = Text


class CalibrationImages(ImageSet, Drawn):
    """The images on which pruners measure; their labels are used by prices only."""

    kind_of_one = ImageSet


class Roles(SettingsTable):
    """The data by role: `table` is its key in a study file, `items` a role reads, `shown` what models make of it."""

    table: ClassVar[str]
    items: ClassVar[str]
    shown: ClassVar[str]

    @property
    def sources(self) -> dict[str, Source]:
        """The data of each role that has some, by the dotted key of its table."""
        return {f"{self.table}.{role}": source for role, source in self if isinstance(source, Source)}


class Texts(Roles):
    """The texts by role; the test text is used for the final numbers only."""

    table, items, shown = "texts", "documents", "continuations"
    calibration: Calibration
    """the text on which pruners measure"""
    validation: Text
    """the text on which trials are measured and compared"""
    test: Text | None = Field(None, description='of the final numbers; left out with protocol = "paper"')
    bos: Literal["auto"] | StrictBool = Field(
        "auto",
        description="every window begins with BOS, and the prediction of the token after it counts; auto: if the dense "
        'model is much better with BOS (measured once per study), but never with protocol = "paper"',
    )


class ImageSets(Roles):
    """The images by role; the test images are used for the final numbers only."""

    table, items, shown = "images", "images", "answers"
    calibration: CalibrationImages
    """the images on which pruners measure"""
    validation: ImageSet
    """the images on which trials are measured and compared"""
    test: ImageSet | None = Field(None, description='of the final numbers; left out with protocol = "paper"')


def is_local_text(source: str) -> bool:
    """Whether the source of a text or of images is a local file or folder, whose place is never published."""
    return source.partition(":")[0] in LOCAL


def text_name(source: str) -> str:
    """The source of a text or of images for people: of local ones without the folders above."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{PureWindowsPath(rest).name or '.'}" if is_local_text(source) else short_source(source)


def short_source(source: str) -> str:
    """The source of a model or a text for people: of one in memory, the first digits of its content."""
    return source[: len(MEMORY) + 12] if source.startswith(MEMORY) else source
