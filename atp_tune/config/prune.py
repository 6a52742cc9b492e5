"""Tables of a study that say what is done to weights: `[prune]`, `[quantize]` and `[recover]`.

The table of a pruner that is a plug-in is kept as it is written: `config.plugged` checks it once the code may run.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    ValidationError,
    ValidationInfo,
    create_model,
    model_validator,
)
from pydantic_core import InitErrorDetails

from atp_tune.allocations import ALLOCATIONS, Budget, bits, channels
from atp_tune.allocations.bits import SCALE, stored_bits
from atp_tune.allocations.budget import ranked_by, weighted_mean
from atp_tune.allocations.rows import RowOffsets, offsets_to_text
from atp_tune.allocations.types import cheapest_types, fitting, type_bits
from atp_tune.errors import UserError
from atp_tune.measures import Change, Perplexity
from atp_tune.plan import Level, Plan
from atp_tune.plugins import IN_SCHEMA, short_name
from atp_tune.pruners import PRUNERS, QUANTIZERS, SETTINGS, Pruner, Quantizer, make_pruner
from atp_tune.pruners.settings import ChannelSettings
from atp_tune.utils.registry import STORED, FrozenModel, OneOf, Registry, SettingsTable, Table, check_once, relocated

# --- Training of kept weights, and of the scales of rounded ones, by `finetune` or by the table `[recover]` of a study,
# after its search and under guard.
#
#     recover = {}            with the defaults below
#     [recover]
#     steps = 128
#
# `recovered`, in the configuration of the best trial, holds the same settings and what they came to. See
# docs/finetune.md.

FEWEST, MOST = 8, 32  # windows that are held out
SHARE = 10  # one of so many windows is held out
Loss = Literal["both", "kl", "next-token"]
NLL_SHARES: dict[Loss, float] = {"both": 0.5, "kl": 0.0, "next-token": 1.0}  # the rest is KL from the dense model
RATES = {"lora": 1e-3, "scales": 3e-3}  # default learning rates
RANK = 8  # of LoRA, by default


class Training(SettingsTable):
    """How kept weights are trained; all zeros stay."""

    train: Literal["scales", "lora"] = "scales"
    """scales: one for each row and column of each linear, of rounded weights for each group; lora: masked LoRA"""
    loss: Loss = "both"
    """kl: KL divergence from the dense model's predictions; next-token: NLL of the text; both: the mean"""
    steps: int = Field(64, ge=1)
    """training steps, each on one batch"""
    batch: int = Field(2, ge=1)
    """windows per step; of an image classifier, images"""
    seqlen: int | None = Field(None, ge=2)
    """tokens per window; default: those of the validation text's windows"""
    learning_rate: float | None = Field(None, gt=0)
    """the highest, after warm-up; default: 0.003, of lora 0.001"""
    rank: int | None = Field(None, ge=1)
    """of lora alone; default: 8"""
    alpha: int | None = Field(None, ge=1)
    """of lora alone: adapters are scaled by alpha / rank; default: twice the rank"""
    eval_every: int = Field(8, ge=1)
    """steps between two measurements of the loss on held-out windows"""
    patience: int = Field(3, ge=0)
    """measurements without a lower held-out loss after which training ends; 0: nothing is held out"""
    seed: int = Field(0, ge=0)
    """of adapters and of the order of the windows"""

    @model_validator(mode="after")
    def _of_lora(self) -> Self:
        for key in ("rank", "alpha"):
            if getattr(self, key) is not None and self.train != "lora":
                raise ValueError(f'{key}: is a setting of train = "lora"; leave it out')
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model's predictions take part in the loss."""
        return NLL_SHARES[self.loss] < 1

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        return RATES[self.train] if self.learning_rate is None else self.learning_rate

    def filled(self, seqlen: int | None) -> "Training":
        """The settings with a value for each; `seqlen`: tokens per window, if they have none."""
        rank = (self.rank or RANK) if self.train == "lora" else None
        return Training(**{
            **self.model_dump(include={*Training.model_fields}), "rank": rank,
            "alpha": rank and (self.alpha or 2 * rank), "learning_rate": self.rate, "seqlen": self.seqlen or seqlen,
        })  # fmt: skip


class RecoverConfig(Training):
    """How the kept weights of the best plan are trained; training text: the calibration text's."""

    min_increase: float = Field(0.0, ge=0)
    """train only if pruning raises the perplexity on the validation text by this share: 0.2 is 20 %"""


class RecoveredScores(FrozenModel):
    """Perplexity on one text after training, and its change from the same plan before, paired by windows."""

    perplexity: Perplexity
    change: Change


class Recovered(FrozenModel):
    """The result of training by `settings`.

    `kept`: whether the loss on held-out windows and the perplexity on the validation text fell, so that `apply` trains
    the model; else `reason` says what did not, or why there was no training (`skipped`), in one line. `step` is the
    step whose weights were best, of `steps` that were done. `test` is None with the paper's protocol, `against_uniform`
    (on the test text) if uniform was not measured. `kinds`: perplexity by kind of a mixed test text.
    """

    settings: RecoverConfig
    kept: bool
    skipped: bool = False
    reason: str = ""
    step: int = 0
    steps: int = 0
    seconds: FiniteFloat = 0.0
    validation: RecoveredScores | None = None
    test: RecoveredScores | None = None
    against_uniform: Change | None = None
    kinds: dict[str, Perplexity] = Field({})


UPDATING = ("sparsegpt", "alps")  # pruners that change weights that they keep
OF_CHANNELS = ("wanda", "magnitude")  # pruners that score channels
PrunerName = Annotated[str, OneOf(PRUNERS, IN_SCHEMA)]


def with_tables(model: type[SettingsTable]) -> type[SettingsTable]:
    """Adds to the model one table for each pruner that has settings."""
    tables: Table = {name: (settings, settings()) for name, settings in SETTINGS.items()}
    return create_model(model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **tables)


_WITHOUT_TABLES: list[JsonValue] = [{"required": [name]} for name in PRUNERS.data if name not in SETTINGS]


@with_tables
class PruneConfig(SettingsTable):
    """How weights are chosen: the pruners to compare, the source of their statistics, and the pattern of zeros."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"not": {"anyOf": _WITHOUT_TABLES}})
    __pydantic_extra__: dict[str, dict[str, JsonValue]]  # tables of plug-ins, by short name

    pruners: tuple[PrunerName, ...] = Field(("wanda",), min_length=1)
    """Optuna chooses, if there are several"""
    statistics: Literal["block", "sequential", "dense"] = "block"
    """source: inputs with earlier blocks pruned, with all earlier linears pruned, or of the dense model"""
    sparsegpt: Any = None  # keeps its place in the order of keys; `with_tables` sets the type
    pattern: str = "unstructured"
    """unstructured, N:M (N zeros in every M inputs) or mixed:M"""
    refine: int = Field(0, ge=0)
    """steps of conjugate gradients that update the kept weights, after any pruner; 0: none"""
    gradient_at: Literal["wanda", "own"] = "wanda"
    (
        "weights at which allocations by the gradient take it: masks of Wanda (magnitude of itself), or what the "
        "pruner itself makes of them, refinement included"
    )
    loss: Loss = "both"
    (
        "of the descent of gradient-rows. kl: KL divergence from the dense model's predictions; next-token: NLL "
        "of the text; both: the mean"
    )
    channels: ChannelSettings = ChannelSettings()
    """of pattern = "channels": whole channels go"""

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, data: Any, inner: Callable[[Any], Self], info: ValidationInfo) -> Self:
        """Refuses keys that are neither of this table nor tables of plug-ins, beside what else is wrong."""
        if not isinstance(data, dict) or info.context == STORED:
            return inner(data)
        names = data.get("pruners", ())
        short = {short_name(name) for name in names if isinstance(name, str)} if isinstance(names, list | tuple) else ()
        unknown = [key for key in data if key not in cls.model_fields and not _has_table(key, short)]
        wrong = [InitErrorDetails(type="extra_forbidden", loc=(key,), input=data[key]) for key in unknown]
        try:
            config = inner({key: value for key, value in data.items() if key not in unknown})
        except ValidationError as error:
            raise ValidationError.from_exception_data(cls.__name__, [*wrong, *relocated(error)]) from None
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return config

    @model_validator(mode="after")
    def _patterned(self) -> Self:
        check_names(self.pruners, "pruners", PRUNERS)
        try:
            whole = self.layout.channels
        except ValueError as error:
            raise ValueError(f"pattern: {error}") from None
        if not whole:
            if self.channels != ChannelSettings():
                raise ValueError(f'channels: belongs to pattern = "channels", and the pattern is {self.pattern}')
            return self
        other = [name for name in self.pruners if name not in OF_CHANNELS]
        compare: str = self.settings("wanda")["compare"]
        for key, is_given, reason in (
            ("pruners", other, f"{(*other, '')[0]} scores no channels; take {' or '.join(OF_CHANNELS)}"),
            ("statistics", self.statistics != "block", f'must be "block", not "{self.statistics}"'),
            ("refine", self.refine, "updates single weights; leave it out for prune.channels.refit"),
            ("wanda.compare", compare != "row", f"{compare} compares single weights; leave it out"),
        ):
            if is_given:
                raise ValueError(f'{key}: {reason} where pattern = "channels"')
        return self

    @property
    def layout(self) -> "Pattern":
        """Where zeros may stand; ValueError for no pattern."""
        return parse(self.pattern)

    def settings(self, pruner: str) -> Table:
        """Arguments of a pruner: the keys of its table, if it has one, and the pattern's group."""
        table = getattr(self, pruner).model_dump() if pruner in SETTINGS else self.tables.get(pruner, {})
        return {**table, "group": self.layout.group}

    def told(self, pruner: str) -> Table:
        """The settings that determine what a pruner removes, for people and other programs.

        Of whole channels those of `channels`; magnitude measures no `score`.
        """
        if not self.layout.channels:
            return self.settings(pruner)
        return self.channels.model_dump(exclude={"score"} if pruner == "magnitude" else None)

    def pruner(self, name: str, quantizer: Quantizer | None = None) -> Pruner:
        """Makes a pruner of the study, with what follows it: refinement, and rounding by a quantizer.

        UserError if it is a plug-in without groups and the pattern has some.
        """
        return make_pruner(name, self.settings(name), self.refine, quantizer)

    def has_own_prices(self, name: str) -> bool:
        """Whether the gradient is taken at what a pruner makes of the weights: masks of scores do not tell it."""
        in_groups = name == "wanda" and self.layout.group is not None
        is_masked = self._takes_lowest_of_rows(name) or in_groups or name == "magnitude"
        return self.gradient_at == "own" and (self.refine > 0 or not is_masked)

    def by_rows(self, name: str) -> bool:
        """Whether the allocation `gradient-rows` gives rows offsets: the pruner takes the lowest scores of each."""
        is_whole = self.layout.group is None and not self.layout.channels
        return is_whole and self._takes_lowest_of_rows(name) and not self.has_own_prices(name)

    def _takes_lowest_of_rows(self, name: str) -> bool:
        return name == "wanda" and bool(self.settings(name)["compare"] == "row")

    def priced_by(self, name: str) -> str:
        """The levels that `gradient` descends by for a pruner: the places of a score, or its own weights."""
        return f"weights of {name}" if self.has_own_prices(name) else ranked_by(name)

    @property
    def short_names(self) -> tuple[str, ...]:
        """The short names of the pruners."""
        return tuple(map(short_name, self.pruners))

    @property
    def tables(self) -> dict[str, dict[str, JsonValue]]:
        """The tables of plug-ins, as they are written, by short name."""
        return self.__pydantic_extra__ or {}


def _has_table(name: Any, short_names: Any) -> bool:
    """Whether a name is that of a plug-in, which may have a table."""
    return isinstance(name, str) and not PRUNERS.is_built_in(name) and (name in short_names or name in PRUNERS)


def check_names(names: tuple[str, ...], key: str, registry: Registry[Any]) -> None:
    """ValueError if a name occurs twice under `key`, two plug-ins have one, or one has that of a built-in object."""
    check_once(names, key)
    by_short = dict[str, str]()
    for name in names:
        short = short_name(name)
        if short != name and registry.is_built_in(short):
            raise ValueError(f"{key}: {name} has the name of the built-in {registry.kind} {short}; rename the plug-in")
        if short in by_short:
            raise ValueError(f"{key}: {by_short[short]} and {name} are both called {short}; rename one of the plug-ins")
        by_short[short] = name


# --- The table `[quantize]` of a study with `bits`: how weights are rounded, and the bits that blocks may have.

QuantizerName = Literal["rtn", "gptq", "ggml"]
Engine = Literal["compressed-tensors", "mlx"]
Width = Annotated[int, Field(ge=2, le=8)]
WIDTHS = (2, 3, 4, 5, 6, 8)
OF_ZEROS = ("er", "erk", "global", "gradient-rows")  # allocations that no number of bits follows from
PER_LINEAR = ("gradient", "alphapruning-linear", *OF_ZEROS)  # those that differ within blocks


class QuantizeConfig(SettingsTable):
    """How weights are rounded to fewer bits: the quantizers to compare, the groups that share a scale, the bits."""

    quantizers: tuple[QuantizerName, ...] = Field(("gptq",), min_length=1)
    """rtn: round to nearest, gptq; Optuna chooses, if there are several; ggml, alone: types of .gguf files"""
    group_size: int = Field(128, ge=-1)
    """consecutive inputs of a row that share a scale; -1: the whole row"""
    symmetric: bool = False
    """values from -max to max, without a zero point"""
    damping: float = Field(0.01, gt=0)
    """of gptq, added to the diagonal of the Hessian, as a share of its mean"""
    act_order: bool = False
    """of gptq: columns in the order of their inputs' size, not as they stand"""
    widths: tuple[Width, ...] = Field(WIDTHS, min_length=1)
    """the bits that a block, or a linear, may have"""
    format: Engine | None = Field(None, exclude_if=lambda engine: not engine)
    """in which `apply` writes the folder"""

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        check_once(self.quantizers, "quantizers")
        if self.by_types and len(self.quantizers) > 1:
            raise ValueError("quantizers: ggml stands alone")
        others = self.model_dump(exclude={"quantizers"}, exclude_defaults=True)
        if self.by_types and others:
            raise ValueError(f"{next(iter(others))}: is not of ggml; leave it out")
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError("widths: must ascend, each once")
        if self.group_size == 0:
            raise ValueError("group_size: must be at least 1, or -1 for the whole row, got 0")
        return self

    @property
    def by_types(self) -> bool:
        """Whether weights are rounded to types of ggml, embedding and head too."""
        return "ggml" in self.quantizers

    def told(self, method: str) -> Table:
        """The settings that determine what a quantizer does; rtn has no `damping`."""
        if method == "ggml":
            return {}
        of_gptq = ["damping", *(["act_order"] if self.act_order else [])] if method == "gptq" else []
        return self.model_dump(include={"group_size", "symmetric", *of_gptq})

    def columns_of_group(self, columns: int) -> int:
        """How many columns, of so many, share a scale."""
        return columns if self.group_size == -1 else self.group_size

    def stored_bits(self, rows: int, columns: int, bits: int | str, zeros: int = 0) -> int:
        """Bits of a quantized matrix with scales and zero points; without its zeros, if that is less.

        `bits`: of a weight, or the type of ggml.
        """
        if isinstance(bits, str):
            return round(rows * columns * type_bits(bits))
        zero_point = SCALE if self.format == "mlx" else 0 if self.symmetric else bits
        return stored_bits(rows, columns, bits, self.group_size, zero_point, zeros)


@dataclass(frozen=True)
class Treatments:
    """The treatments of weights, in order: zeros by a pruner, if it `prunes`, then rounding, if there is `quantize`."""

    prune: PruneConfig
    quantize: QuantizeConfig | None = None
    prunes: bool = True

    @property
    def short_names(self) -> tuple[str, ...]:
        """The methods to compare, by their short names: pruners, or quantizers where weights are only rounded."""
        return self.prune.short_names if self.prunes or self.quantize is None else self.quantize.quantizers

    @property
    def unused(self) -> tuple[str, ...]:
        """Starts of the keys of a study that decide nothing."""
        if self.quantize is None:
            return ("quantize.",)
        return () if self.prunes else ("prune.pruners", "prune.pattern", "prune.sparsegpt.")

    def pruner(self, name: str) -> Pruner:
        """A method as the pass over the blocks uses it: zeros stay where kept weights are rounded."""
        own = self.quantize
        if own is None:
            return self.prune.pruner(name)
        rounds_by = own.quantizers[0] if self.prunes else name
        quantizer = QUANTIZERS[rounds_by](own.group_size, own.symmetric, own.damping, own.act_order)
        if self.prunes:
            return self.prune.pruner(name, quantizer)
        from atp_tune.pruners.refinement import Treatment

        return Treatment(None, quantizer=quantizer)

    def measures(self, name: str) -> bool:
        """Whether statistics of inputs are needed; in whole channels, the refit needs them."""
        refits = self.prune.layout.channels and self.prune.channels.refit
        return refits or self.pruner(name).measures is not None


class Bits(FrozenModel):
    """Bits per weight over all linears of all blocks, weighted by size: the target, what blocks have (`nominal`), and
    with the scales and zero points of groups (`effective`, counted).

    `size`: in the place of a target, as in the study.
    """

    target: float | None = Field(None, ge=2, le=8)
    size: str | None = None

    @model_validator(mode="after")
    def _asked(self) -> Self:
        """Checks that either a target or a size was asked for."""
        if (self.target is None) == (self.size is None):
            raise ValueError("target: must be given, or a size, and not both")
        return self

    nominal: float = Field(ge=2, le=16)
    effective: float | None = Field(None, ge=0, le=64)


SIZE = re.compile(r"(\d+(?:\.\d+)?)(bpw|%|[kMG]?B|[KMG]iB)")
BYTES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def bits_of_size(text: str, weights: int, others: int, dense: int) -> float:
    """The bits that a size as typed leaves for so many weights of linears; ValueError if it is none.

    `others`, `dense`: bytes of the weights that are not rounded, and of all weights of the dense model.
    """
    match = SIZE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"must be bits a weight of the blocks, bytes of all weights, or a share of the dense model's, such as "
            f"3.3bpw, 100MB or 40%, got {text}"
        )
    number, unit = float(match[1]), match[2]
    if unit == "bpw":
        return number * weights
    return 8 * ((number / 100 * dense if unit == "%" else number * BYTES[unit]) - others)


# --- Patterns: where zeros may stand, and which sparsities are possible; and the plan of an allocation, rounded to one.
#
# unstructured    anywhere
# N:M             N zeros in every M consecutive inputs of a row: one sparsity, N/M
# mixed:M         each block has its own N (Table 13 of ATP, ICML 2025): multiples of 1/M
# channels        whole MLP channels and heads, see `allocations.channels`

CHANNELS = "channels"


@dataclass(frozen=True)
class Pattern:
    """M inputs in a group (None: no groups) and N zeros in each group (None: any number), or whole channels."""

    group: int | None = None
    zeros: int | None = None
    channels: bool = False

    @property
    def sparsity(self) -> float | None:
        """The sparsity N/M, or None where the pattern allows several."""
        return self.zeros / self.group if self.zeros and self.group else None

    def round(self, sparsities: Sequence[float], sizes: Sequence[int]) -> tuple[float, ...]:
        """Rounds sparsities, one per part, to values that the pattern allows; keeps the mean weighted by size.

        By largest remainder: each is rounded down to a multiple of 1/M. Then each, the largest remainder first and the
        last of equal ones first, is raised by 1/M if that brings the total number of zeros closer to the original.
        """
        if self.group is None:
            return tuple(sparsities)
        if self.sparsity is not None:
            return (self.sparsity,) * len(sparsities)
        exact = [s * self.group for s in sparsities]
        counts = [int(n) for n in exact]
        rests = [n - count for n, count in zip(exact, counts, strict=True)]
        bits.raise_largest(counts, sum(rest * size for rest, size in zip(rests, sizes, strict=True)), rests, sizes)
        return tuple(count / self.group for count in counts)


def parse(text: str) -> Pattern:
    """Parses the name of a pattern; ValueError if it is invalid."""
    if text == "unstructured":
        return Pattern()
    if text == CHANNELS:
        return Pattern(channels=True)
    match = re.fullmatch(r"(mixed|[1-9]\d{0,3}):([1-9]\d{0,3})", text)
    if match:
        zeros, group = None if match[1] == "mixed" else int(match[1]), int(match[2])
        if group > (zeros or 1):
            return Pattern(group, zeros)
    forms = "unstructured, N:M with N < M as in 2:4, or mixed:M as in mixed:8"
    raise ValueError(f'must be {forms}, got "{text}"; "channels" removes whole channels')


def make_plan(
    method: str, allocation: str, budget: Budget, parameters: dict[str, float], pattern: Pattern | None = None
) -> Plan:
    """The plan of one allocation at given parameters, rounded to the pattern; ValueError if inadmissible."""
    if budget.size is not None:
        return _within_size(method, allocation, budget, parameters)
    if budget.outer:
        return _of_types(method, allocation, budget, parameters)
    budget, pattern, module = replace(budget, pruner=method), pattern or Pattern(), ALLOCATIONS[allocation]
    shared = module.sparsities(budget, **parameters)
    by_linear = isinstance(shared[0], tuple)

    # All numbers, one for each block or linear, are rounded together.
    flat = [s for row in shared for s in (row if isinstance(row, tuple) else (row,))]
    sizes = [size for row in budget.linear_sizes for size in row] if by_linear else budget.sizes
    rows: Sequence[Sequence[float]] = ()
    amount_of = "sparsity"
    if pattern.channels:
        if by_linear:
            raise UserError(
                f"allocation: {allocation} gives the linears of a block different sparsities, and channels go from all "
                "of them at once; take uniform, atp, curve, owl or alphapruning"
            )
        rows = channels.rounded(flat, budget.channels, budget.target)
    elif budget.widths:
        amount_of, flat = "bits", [*bits.rounded([bits.bits_at(s, budget.widths) for s in flat], sizes, budget.widths)]
    else:
        flat = [*pattern.round(flat, sizes)]

    def level(amount: float, offsets: bytes | None = None, linears: tuple[Level, ...] = ()) -> Level:
        amounts: Table = {"bits": budget.bits, amount_of: amount}
        return Level(**amounts, rows=None if offsets is None else offsets_to_text(offsets), linears=linears)

    # A level for each block, with those of its linears if they differ, or if whole channels go.
    levels = map(level, flat)
    if by_linear:
        numbers = iter(flat)
        rows = [[next(numbers) for _ in row] for row in budget.linear_sizes]
    if rows:
        find_offsets = getattr(module, "row_offsets", None)  # no plug-in has it: they are checked
        shifts: RowOffsets | None = find_offsets and find_offsets(budget, **parameters)
        offsets = shifts.blocks if shifts else [[None] * len(row) for row in rows]
        of_linears = [tuple(map(level, *each)) for each in zip(rows, offsets, strict=True)]
        levels = map(level, map(weighted_mean, rows, budget.linear_sizes), [None] * len(rows), of_linears)
    return Plan(method=method, allocation=allocation, parameters=parameters, levels=tuple(levels))


def _of_types(method: str, allocation: str, budget: Budget, parameters: dict[str, float]) -> Plan:
    """The plan of the types of ggml that cost least, within the budget's bits a weight of all matrices.

        even^(1 - κ) price^κ        even: 4^-bits for each weight; the price of embedding and head 2^ω times

    so that κ = 0 is uniform, whatever the model.
    """
    kappa, omega = parameters.get("kappa", 0.0), parameters.get("omega", 0.0)
    if allocation != "uniform":
        budget.check(ALLOCATIONS[allocation].bounds(budget), **parameters)
    # Blocks come in an order that spreads the first ones evenly: of equal steps in `cheapest` the first is taken.
    order = bits.evenly(len(budget.linears))
    shapes = [*(shape for index in order for shape in budget.linears[index]), *budget.outer.values()]
    costs = [{name: shape.size * 0.25 ** type_bits(name) for name in fitting(shape.columns)} for shape in shapes]
    if kappa:
        *blocks, outer = budget.require_dense_metrics(allocation).width_costs()
        prices = [*(row for index in order for row in blocks[index]), *([2**omega * x for x in row] for row in outer)]
        costs = [
            {name: even ** (1 - kappa) * price**kappa for (name, even), price in zip(row.items(), own, strict=True)}
            for row, own in zip(costs, prices, strict=True)
        ]
    most = bits.bits_at(budget.target, budget.widths) * sum(shape.size for shape in shapes)
    chosen = iter(cheapest_types(costs, [shape.size for shape in shapes], most))
    linears = {index: [next(chosen) for _ in budget.linears[index]] for index in order}
    levels = list[Level]()
    for index, sizes in enumerate(budget.linear_sizes):
        own = tuple(Level(bits=type_bits(name), type=name) for name in linears[index])
        levels.append(Level(bits=weighted_mean([x.bits or 0 for x in own], sizes), linears=own))
    return Plan(
        method=method,
        allocation=allocation,
        parameters=parameters,
        levels=tuple(levels),
        outer=dict(zip(budget.outer, chosen, strict=True)),
    )


def _within_size(method: str, allocation: str, budget: Budget, parameters: dict[str, float]) -> Plan:
    """The plan within the budget's size: linears sparse by the allocation, then rounded to the widths that cost least.

    `zeros`, a parameter, is the target. By prices, if κ > 0, a linear costs what it does in the dense model, times the
    share of weights that are kept; else all weights cost alike, 4^-bits.
    """
    zeros, size, widths = parameters.get("zeros", 0.0), budget.size, budget.widths
    assert size is not None
    budget.check({"zeros": (0.0, budget.target)}, zeros=zeros)
    here = replace(budget, target=zeros, pruner=method, size=None, widths=())
    own = {name: value for name, value in parameters.items() if name != "zeros"}
    plan = make_plan(method, allocation, here, own) if zeros else make_plan(method, "uniform", here, {})

    # Bits of each linear at each width as they are stored, and what the width costs.
    # Blocks come in an order that spreads the first ones evenly: of equal steps in `cheapest` the first is taken.
    order = bits.evenly(len(plan.levels))
    levels = {index: plan.of(index, len(budget.linears[index])) for index in order}
    pairs = [pair for index in order for pair in zip(budget.linears[index], levels[index], strict=True)]
    zeros_of = [  # at least so many: without offsets each row of a linear may have as many as the others
        int(shape.size * (level.sparsity or 0))
        if level.rows
        else shape.rows * int(shape.columns * (level.sparsity or 0))
        for shape, level in pairs
    ]
    stored = [
        [size.stored(shape.rows, shape.columns, width, count) for width in widths]
        for (shape, _), count in zip(pairs, zeros_of, strict=True)
    ]
    costs = [[(row[-1] - row[0]) * 0.25**width for width in widths] for row in stored]
    if parameters.get("kappa"):
        measured = budget.require_dense_metrics(allocation).width_costs()
        flat = [row for index in order for row in measured[index]]
        costs = [[cost * (1 - (x.sparsity or 0)) for cost in row] for row, (_, x) in zip(flat, pairs, strict=True)]

    # A block's bits are the mean of those of its linears.
    chosen, blocks = iter(bits.cheapest(costs, stored, size.most)), []
    of_blocks = {index: [widths[next(chosen)] for _ in levels[index]] for index in order}
    for index, (block, sizes) in enumerate(zip(plan.levels, budget.linear_sizes, strict=True)):
        linears = tuple(replace(x, bits=width) for x, width in zip(levels[index], of_blocks[index], strict=True))
        mean = weighted_mean(of_blocks[index], sizes)
        blocks.append(replace(block, bits=mean, linears=linears))
    return plan.model_copy(update={"allocation": allocation, "levels": tuple(blocks), "parameters": parameters})
