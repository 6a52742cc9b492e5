"""The tables `[texts.*]` of a study of a language model."""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, StrictBool, model_serializer, model_validator

from atp_tune.frozen import SettingsTable
from atp_tune.plan import Share

MANUAL = "package:pydoc_data.topics:topics"  # in every Python: a part of its manual
MIXED = "mixed"
KINDS = ("manual", "news", "tales", "debates", "code")  # of `mixed`, of which windows are taken in turn
MEMORY = "memory:"  # before the SHA-256 of a model or a text that lies in the memory of a Python process


class Text(SettingsTable):
    """One text and how its windows are drawn."""

    source: str = Field(
        min_length=1,
        description="c4, wikitext2, mixed[:KIND], hub:ORG/NAME, file:PATH, package:MODULE[:ATTRIBUTE] or a plug-in",
    )
    config: str | None = Field(None, description="configuration of a hub dataset")
    split: str | None = Field(None, description="split of a hub dataset")
    column: str = Field("text", description="column of the text (hub, .jsonl, .parquet)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    part: tuple[Share, Share] = Field((0.0, 1.0), description="interval of the text, as shares of its whole documents")
    shuffle: bool = Field(
        False, description="shuffle the documents before the part is cut, in all three texts: parts are of one kind"
    )
    sampling: Literal["consecutive", "random"] = Field(
        "consecutive",
        description="consecutive: documents are joined and cut without overlap; random: windows from random documents",
    )
    nsamples: int | None = Field(
        None, ge=1, le=1_000_000, description="number of windows; by default all of a text with consecutive sampling"
    )
    stride: int = Field(1, ge=1, description="use every stride-th window only, from the first")
    seqlen: int = Field(2048, ge=2, description="tokens per window")
    seed: int = Field(0, ge=0, description="seed of random sampling")
    images: str | None = Field(
        None,
        min_length=1,
        description="of calibration: column of an image beside each text (file:X.parquet, hub:), for models that read "
        "images too",
    )

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        if self.sampling == "random" and self.nsamples is None:
            raise ValueError("nsamples: a random draw needs their number")
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part: [{self.part[0]}, {self.part[1]}] holds nothing")
        if self.source == MIXED and self.stride % len(KINDS) == 0:
            raise ValueError(f"stride: every {self.stride}th window is of one kind; take no multiple of {len(KINDS)}")
        return self

    @property
    def kinds(self) -> tuple[Self, ...]:
        """The texts of which windows are taken in turn: of `mixed` one of each kind, else the text itself."""
        if self.source != MIXED:
            return (self,)
        sizes = [self.nsamples and -(-(self.nsamples - place) // len(KINDS)) for place in range(len(KINDS))]
        named = zip(KINDS, sizes, strict=True)
        return tuple(
            self.model_copy(update={"source": f"{MIXED}:{kind}", "nsamples": size}) for kind, size in named if size != 0
        )

    @property
    def turns(self) -> tuple[str, ...]:
        """The kinds of the first windows, after which they begin again; () for a text of one kind."""
        count = len(KINDS)
        return tuple(KINDS[turn * self.stride % count] for turn in range(count)) if self.source == MIXED else ()

    @property
    def _within(self) -> set[str]:
        """The sources of one kind that this one is of, also where its windows are fewer than the kinds."""
        kinds = {MIXED: KINDS, MANUAL: ("manual",)}.get(self.source)
        return {f"{MIXED}:{kind}" for kind in kinds} if kinds else {self.source}

    @model_serializer(mode="wrap")
    def _without_none(self, inner: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves `images` out where there are none, so that files and keys of the cache stay as they were."""
        found: dict[str, Any] = inner(self)
        return found if self.images is not None else {key: value for key, value in found.items() if key != "images"}

    def overlaps(self, other: "Text") -> bool:
        """Whether both texts share documents of the same source, or of the same kind of `mixed`."""
        keys = ("config", "split", "column", "revision")
        if not self._within & other._within or any(getattr(self, key) != getattr(other, key) for key in keys):
            return False
        if self.shuffle != other.shuffle:  # a shuffled part has documents of everywhere
            return True
        if (self.source == MANUAL) != (other.source == MANUAL):  # `mixed` leaves some of it out: parts end elsewhere
            return True
        return self.part[0] < other.part[1] and other.part[0] < self.part[1]


class Calibration(Text):
    """The calibration text, and the number of its draws."""

    draws: int = Field(
        1,
        ge=1,
        description="number of draws for the final scores of best and uniform, for which a fitted plan is fitted anew; "
        "the study uses the first",
    )

    @model_validator(mode="after")
    def _repeatable(self) -> Self:
        if self.draws > 1 and self.nsamples is None:
            raise ValueError("draws: need a number of windows, which the next draw follows; give nsamples")
        return self

    @property
    def text(self) -> Text:
        """The first draw, which the study uses."""
        return Text.model_validate(self.model_dump(exclude={"draws"}))


class Texts(SettingsTable):
    """The texts by role; the test text is used for the final numbers only."""

    calibration: Calibration = Field(description="the text on which pruners measure")
    validation: Text = Field(description="the text on which trials are measured and compared")
    test: Text | None = Field(None, description='of the final numbers; left out with protocol = "paper"')
    bos: Literal["auto"] | StrictBool = Field(
        "auto",
        description="every window begins with BOS, and the prediction of the token after it counts; auto: if the dense "
        'model is much better with BOS (measured once per study), but never with protocol = "paper"',
    )


def short_source(source: str) -> str:
    """The source of a model or a text for people: of one in memory, the first digits of its content."""
    return source[: len(MEMORY) + 12] if source.startswith(MEMORY) else source
