"""The plan of a trial: a method, an allocation and a level for each linear, enough for `apply` to prune again.

It is stored whole, as a trial's attribute `plan` and as the key `plan` of a configuration. There a level is a number,
its sparsity, or a table of what it has; a block whose linears do not differ has one level:

    {"method": "wanda", "allocation": "atp", "parameters": {"beta": 0.004}, "levels": [0.588, 0.592, …]}

    where linears differ        {"sparsity": 0.6, "linears": [0.55, 0.62, …]}
    where rows differ           {"sparsity": 0.6, "linears": [{"sparsity": 0.55, "rows": "eNpj…"}, …]}
    where weights are rounded   {"bits": 4}; after pruning {"sparsity": 0.5, "bits": 4}
    where ggml rounds them      {"bits": 4.5, "type": "Q4_K"}
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, PlainSerializer, model_validator

from atp_tune.allocations import ALLOCATIONS, Budget
from atp_tune.allocations.budget import SYMBOLS, weighted_mean
from atp_tune.allocations.channels import check_whole
from atp_tune.allocations.rows import read_offsets
from atp_tune.allocations.types import BLOCKS
from atp_tune.utils.registry import FrozenModel

METHODS = ("pruner", "quantizer")  # a trial's parameters that say what is done to weights; it has one of them
SAID = 1e-6  # difference between the level of a block and the mean of its linears that rounding may make
Share = Annotated[float, Field(ge=0, le=1)]
Bits = Annotated[float, Field(ge=2, le=8)]
TypeName = Literal[*BLOCKS]  # type: ignore[valid-type]


@dataclass(frozen=True, slots=True)
class Level:
    """The treatment of one linear, or to each linear of a block.

    `sparsity`: its share of zeros; None where nothing is pruned. `bits` of its weights; None where nothing is rounded.
    `type`: of ggml, by which it is rounded; the bits are then with scales.
    `rows`: how much sparser than the linear its rows are, as text of `allocations.rows`, if they differ. `linears`: of
    a block, if they differ; the block's own numbers are then their means, weighted by size.
    """

    sparsity: Share | None = None
    bits: Annotated[int | float, Field(ge=2, le=16)] | None = None
    rows: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$")] | None = None
    linears: tuple["StoredLevel", ...] = ()
    type: TypeName | None = None

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    @property
    def amount(self) -> float:
        """The bits where weights are rounded and not pruned, else the sparsity."""
        return (self.bits or 0) if self.sparsity is None else self.sparsity

    @property
    def width(self) -> int | str:
        """What rounds its weights: the type of ggml, or the bits."""
        return self.type or int(self.bits or 0)

    def stored(self) -> Any:
        """The level as JSON has it."""
        values = {each.name: value for each in fields(self) if (value := getattr(self, each.name)) not in (None, ())}
        if self.linears:
            values["linears"] = [linear.stored() for linear in self.linears]
        return self.sparsity if [*values] == ["sparsity"] else values


StoredLevel = Annotated[
    Level,
    BeforeValidator(lambda value: {"sparsity": value} if isinstance(value, int | float) else value),
    PlainSerializer(Level.stored),
]


class Plan(FrozenModel):
    """A method, which is a pruner, or a quantizer where weights are only rounded, and a level for each block.

    The levels come from an allocation with these parameters. `target`: see `target_in`, where a study searches for it.
    `outer`: the types of ggml of embedding and head, by name; one of a matrix that is both.
    """

    method: str
    allocation: str
    parameters: dict[str, FiniteFloat] = Field({})
    target: Annotated[float, Field(ge=-16, le=1)] | None = None
    levels: tuple[StoredLevel, ...] = Field(min_length=1)
    outer: dict[str, TypeName] = Field({}, exclude_if=lambda outer: not outer)

    @model_validator(mode="after")
    def _alike(self) -> Self:
        """All levels have a sparsity or none has, and so their bits, which are whole numbers of a linear."""
        every = [level for block in self.levels for level in (block, *block.linears)]
        kinds = {(level.sparsity is None, level.bits is None) for level in every}
        types = {level.type is None for level in self.each_linear()}
        if len(kinds) > 1 or (True, True) in kinds:
            raise ValueError("levels: must all have a sparsity, or bits, or both")
        if len(types) > 1 or bool(self.outer) in types:
            raise ValueError("levels: all linears, embedding and head have a type of ggml, or none has")
        if any((isinstance(level.bits, float) and not level.type) or level.linears for level in self.each_linear()):
            raise ValueError("levels: a linear has a whole number of bits, and no linears of its own")
        if any(block.rows is not None for block in self.levels):
            raise ValueError("levels: rows are those of a linear, and a block has several")
        return self

    @classmethod
    def stored_in(cls, attributes: Mapping[str, Any]) -> Self | None:
        """The plan that a trial with these attributes has; None without one."""
        return cls.model_validate(attributes["plan"]) if "plan" in attributes else None

    @property
    def by_bits(self) -> bool:
        """Whether weights are rounded and nothing is pruned: the method is a quantizer."""
        return self.levels[0].sparsity is None

    @property
    def fixed_bits(self) -> int | None:
        """The bits of every linear, where weights are pruned and then rounded to as many."""
        different = {level.bits for level in self.each_linear()}
        only = next(iter(different))
        return int(only) if only is not None and len(different) == 1 and not self.by_bits else None

    @property
    def amounts(self) -> tuple[float, ...]:
        """The sparsity of each block, or its bits where weights are only rounded; means where linears differ."""
        return tuple(level.amount for level in self.levels)

    @property
    def does(self) -> tuple[object, ...]:
        """Its effect on weights, wherever its levels come from."""
        return self.method, self.levels, self.outer

    @property
    def by_linear(self) -> bool:
        """Whether the linears of a block differ."""
        return any(level.linears for level in self.levels)

    @property
    def tells_linears(self) -> bool:
        """Whether a configuration names the linears: they differ, or have bits, which recipes give to names."""
        return self.by_linear or self.by_bits

    @property
    def by_row(self) -> bool:
        """Whether the rows of a linear differ."""
        return any(level.rows is not None for level in self.each_linear())

    @property
    def is_uniform(self) -> bool:
        """Whether all linears have the same level, except for the pattern's rounding."""
        is_even = not self.by_linear and len(set(self.amounts)) == 1
        return self.allocation == "uniform" or is_zero(self.allocation, self.parameters.values()) or is_even

    def each_linear(self) -> Iterable[Level]:
        """The levels of all linears; one for each block whose linears do not differ."""
        return (level for block in self.levels for level in block.linears or (block,))

    def mean_bits(self, sizes: Sequence[int]) -> float:
        """The bits per weight, without scales, of blocks of these sizes."""
        return weighted_mean([level.bits or 0 for level in self.levels], sizes)

    def of(self, index: int, linears: int) -> tuple[Level, ...]:
        """The level of each linear of block `index`."""
        return self.levels[index].linears or (self.levels[index],) * linears

    def check_fits(self, budget: Budget) -> None:
        """ValueError unless the levels can be those of a plan for this budget's blocks, linears, channels and bits."""
        sizes = budget.linear_sizes
        if len(self.levels) != len(budget.sizes):
            raise ValueError(f"levels: {len(self.levels)} for a model of {len(budget.sizes)} blocks")
        of_bits = bool(budget.widths) and budget.size is None
        known: set[object] = {*BLOCKS} if budget.outer else {*budget.widths, budget.bits}
        wrong = {x.type or x.bits for x in self.each_linear()} - known
        if self.by_bits != of_bits or wrong or self.outer.keys() != budget.outer.keys():
            raise ValueError("levels: are not of what is done to weights here")
        check_whole([[linear.amount for linear in block.linears] for block in self.levels], budget.channels)
        for index, block in enumerate(self.levels):
            if not block.linears:
                continue
            if len(block.linears) != len(sizes[index]):
                raise ValueError(f"levels: not one for each of the {len(sizes[index])} linears of block {index}")
            mean = weighted_mean([linear.amount for linear in block.linears], sizes[index])
            if abs(mean - block.amount) > SAID:
                raise ValueError(f"levels: block {index} has {block.amount:g}, by its linears {mean:g}")
            for linear, shape in zip(block.linears, budget.linears[index] if budget.linears else (), strict=False):
                if linear.rows is not None:
                    read_offsets(linear.rows, shape.rows)

    def __str__(self) -> str:
        level = "" if self.target is None else f"{target_words(self.target)} "
        if self.is_uniform:
            return f"{level}{self.method} uniform"
        return f"{level}{self.method} {self.allocation} {shown(self.parameters)}".rstrip()

    def __repr__(self) -> str:
        return f"<Plan {self}, {len(self.levels)} blocks>"  # its numbers fill pages


def method_in(params: Mapping[str, Any]) -> str:
    """The pruner that a trial's parameters name, or where weights are rounded alone the quantizer; "" without any."""
    return str(next((params[name] for name in METHODS if name in params), ""))


@dataclass(frozen=True)
class Searched:
    """An amount that a study may search for over an interval; a target is the amount times its sign.

    So the higher a target, the smaller the model.

    name    of the study's key and the trial's parameter; `step` of the targets that are tried
    growth  of the log of the increase in loss, per unit of the target
    left    what is minimised beside the loss; `stored`: bytes of the model, an attribute of trials
    most    what the plan of the highest target is; `option` names a target
    axis    of the figure over amounts times `unit`, with which they are told: 60%, 4.5 bits
    typed   what a person may type; amounts lie within `bounds`
    """

    name: str
    sign: int
    step: float
    growth: float
    left: str
    stored: str
    most: str
    option: str
    axis: str
    unit: tuple[int, str]
    typed: str
    bounds: tuple[int, int]


# SmolLM2's increase grows by 9 from 27 to 48 % zeros, by 7 from there to 63 %; a bit more halves errors, of which
# squares count: ln 4.
SEARCHED = (
    Searched(
        "sparsity", 1, 0.005, 8.0, "density", "packed_bytes", "sparsest", "--sparsity", "sparsity (%)", (100, "%"),
        "a share of zeros, such as 0.6 or 60%, or an interval, such as 0.3..0.8", (0, 1),
    ),
    Searched(
        "bits", -1, 0.05, 1.386, "bits", "quantized_bytes", "smallest", "--bpw", "bits per weight", (1, " bits"),
        "bits a weight, such as 4.8, or an interval, such as 4.5..8", (1, 16),
    ),
)  # fmt: skip


def searched_by(target: float) -> Searched:
    """The amount of a target."""
    return SEARCHED[target < 0]


def are_steps(*targets: float) -> bool:
    """Whether targets are multiples of their step."""
    return all(abs(part - round(part)) <= 1e-6 for part in (end / searched_by(end).step for end in targets))


def target_in(params: Mapping[str, Any]) -> float | None:
    """The target of a trial with these parameters; None where nothing is searched for."""
    return next(iter(targets_in(params)), None)


def amount_of(target: float | None) -> dict[str, float]:
    """The parameter of a trial with a target."""
    return {} if target is None else {searched_by(target).name: abs(target)}


def targets_in(values: Mapping[str, Any]) -> tuple[float, ...]:
    """The target, or the ends of the interval of targets, in the keys of a study; () with a size."""
    amounts = ((one.sign, values[one.name]) for one in SEARCHED if values.get(one.name) is not None)
    sign, amount = next(amounts, (1, ()))
    ends = amount if isinstance(amount, tuple | list) else (amount,)
    return tuple(sign * end for end in ends[::sign])


def target_words(targets: float | tuple[float, ...]) -> str:
    """A target, or the ends of an interval: 60%, 20% to 70%, 3 bits to 6 bits."""
    ends = targets if isinstance(targets, tuple) else (targets,)
    units = ((target, *searched_by(target).unit) for target in sorted(ends, key=abs))
    return " to ".join(f"{factor * abs(target):.4g}{unit}" for target, factor, unit in units)


def is_zero(allocation: str, values: Iterable[float]) -> bool:
    """Whether a built-in allocation is uniform because its parameters are 0; of a plug-in, its sparsities decide."""
    numbers = list(values)
    return bool(numbers) and not any(numbers) and ALLOCATIONS.is_built_in(allocation)


def percent(sparsity: float) -> str:
    """A share in percent without needless digits: 60%, 52.5%."""
    return f"{100 * sparsity:.4g}%"


def shown(parameters: dict[str, float]) -> str:
    """Parameters as text: β=0.00569 γ=-0.12."""
    formats = {"beta": ".5f"}
    return " ".join(
        f"{SYMBOLS.get(name, name)}={value:{formats.get(name, '.3g')}}" for name, value in parameters.items()
    )
