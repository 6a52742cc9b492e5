"""The plan of a trial: pruner, allocation and sparsities, enough for `apply` to prune again."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from atp_tune.allocations import ALLOCATIONS, Budget, LinearSparsities, Sparsities
from atp_tune.allocations import bits as of_bits
from atp_tune.allocations.budget import SYMBOLS
from atp_tune.allocations.channels import means, rounded
from atp_tune.allocations.rows import RowOffsets
from atp_tune.errors import UserError
from atp_tune.spec.patterns import Pattern

METHODS = ("pruner", "quantizer")  # a trial's parameters that say what is done to weights; it has one of them
LinearBits = tuple[tuple[int, ...], ...]  # one per linear of each block


@dataclass(frozen=True)
class Plan:
    """A pruner and one sparsity per block (share of zeros), with the allocation and parameters that they come from.

    `linear_sparsities`: one per linear of each block, if they differ within blocks. `target`: the sparsity, where the
    study searches for it. `bits`: one number per block, where weights are rounded (by `pruner`, then a quantizer);
    `linear_bits`: one per linear of each block, if they differ within blocks, and `bits` are then means. `row_offsets`:
    of the rows of each linear, if they differ within linears.
    """

    pruner: str
    allocation: str
    sparsities: tuple[float, ...]
    parameters: dict[str, float] = field(default_factory=dict)
    linear_sparsities: LinearSparsities | None = None
    target: float | None = None
    bits: tuple[float, ...] | None = None
    linear_bits: LinearBits | None = None
    row_offsets: RowOffsets | None = None

    @property
    def levels(self) -> tuple[object, ...]:
        """What it does to each block, whatever it comes from."""
        return self.sparsities, self.linear_sparsities, self.bits, self.linear_bits, self.row_offsets

    @property
    def is_uniform(self) -> bool:
        """Whether all linears have the same sparsity, except for the pattern's rounding."""
        if self.allocation == "uniform" or is_zero(self.allocation, self.parameters.values()):
            return True
        levels = self.bits if self.bits is not None and not self.prunes else self.sparsities
        return self.linear_sparsities is None and self.linear_bits is None and len(set(levels)) == 1

    @property
    def prunes(self) -> bool:
        """Whether it zeros weights."""
        return self.linear_sparsities is not None or any(self.sparsities)

    def of(self, index: int, linears: int) -> tuple[float, ...]:
        """The sparsity of each linear of block `index`."""
        return self.linear_sparsities[index] if self.linear_sparsities else (self.sparsities[index],) * linears

    def offsets_of(self, index: int) -> tuple[bytes, ...]:
        """The offsets of the rows of each linear of block `index`; none where they do not differ within linears."""
        return () if self.row_offsets is None else self.row_offsets.blocks[index]

    def bits_of(self, index: int, linears: int) -> tuple[int, ...]:
        """The bits of each linear of block `index`, where weights are rounded."""
        if self.linear_bits is not None:
            return self.linear_bits[index]
        return () if self.bits is None else (int(self.bits[index]),) * linears

    def __str__(self) -> str:
        level = "" if self.target is None else f"{percent(self.target)} "
        if self.is_uniform:
            return f"{level}{self.pruner} uniform"
        return f"{level}{self.pruner} {self.allocation} {shown(self.parameters)}".rstrip()

    def __repr__(self) -> str:
        return f"<Plan {self}, {len(self.sparsities)} blocks>"  # its numbers fill pages


def method_in(params: Mapping[str, Any]) -> str:
    """The pruner that a trial's parameters name, or where weights are rounded alone the quantizer; "" without any.

    Studies of bits that are older than the name `quantizer` call theirs `pruner`.
    """
    return str(next((params[name] for name in METHODS if name in params), ""))


def is_zero(allocation: str, values: Iterable[float]) -> bool:
    """Whether a built-in allocation is uniform because its parameters are 0; of a plug-in, its sparsities decide."""
    found = list(values)
    return bool(found) and not any(found) and ALLOCATIONS.is_built_in(allocation)


def percent(sparsity: float | tuple[float, float]) -> str:
    """A sparsity, or an interval of sparsities, in percent without needless digits: 60%, 52.5%, 20% to 70%."""
    if isinstance(sparsity, tuple):
        return " to ".join(map(percent, sparsity))
    return f"{100 * sparsity:.4g}%"


def shown(parameters: dict[str, float]) -> str:
    """Parameters as text: β=0.00569 γ=-0.12."""
    formats = {"beta": ".5f"}
    return " ".join(
        f"{SYMBOLS.get(name, name)}={value:{formats.get(name, '.3g')}}" for name, value in parameters.items()
    )


def make_plan(
    pruner: str, allocation: str, budget: Budget, parameters: dict[str, float], pattern: Pattern | None = None
) -> Plan:
    """The plan of one allocation at given parameters, rounded to the pattern; ValueError if inadmissible."""
    plan = _made(pruner, allocation, budget, parameters, pattern or Pattern())
    return plan if budget.bits is None else replace(plan, bits=(budget.bits,) * len(budget.sizes))


def _made(pruner: str, allocation: str, budget: Budget, parameters: dict[str, float], pattern: Pattern) -> Plan:
    budget = replace(budget, pruner=pruner)
    shared = ALLOCATIONS[allocation].sparsities(budget, **parameters)
    blocks = tuple(s for s in shared if not isinstance(s, tuple))
    if pattern.channels:
        linears = rounded(_one_per_block(allocation, blocks, budget), budget.channels, budget.target)
        return Plan(pruner, allocation, means(linears, budget.channels), parameters, linears)
    if budget.widths:
        return _rounding(Plan(pruner, allocation, (0.0,) * len(budget.sizes), parameters), shared, budget)
    if blocks:
        return Plan(pruner, allocation, pattern.round(blocks, budget.sizes), parameters)
    linears = _rounded(tuple(s for s in shared if isinstance(s, tuple)), budget, pattern)
    offsets = getattr(ALLOCATIONS[allocation], "row_offsets", None)  # no plug-in has it: they are checked
    rows = None if offsets is None else offsets(budget, **parameters)
    return Plan(pruner, allocation, budget.block_means(linears), parameters, linears, row_offsets=rows)


def _rounding(plan: Plan, shared: Sparsities, budget: Budget) -> Plan:
    """A plan with the bits of its blocks, or of their linears."""
    blocks = tuple(s for s in shared if not isinstance(s, tuple))
    if blocks:
        wanted = [of_bits.bits_of(s, budget.widths) for s in blocks]
        return replace(plan, bits=of_bits.rounded(wanted, budget.sizes, budget.widths))
    rows = [[of_bits.bits_of(s, budget.widths) for s in row] for row in shared if isinstance(row, tuple)]
    sizes = [shape.size for shapes in budget.linears for shape in shapes]
    found = iter(of_bits.rounded([b for row in rows for b in row], sizes, budget.widths))
    linears = tuple(tuple(next(found) for _ in row) for row in rows)
    return replace(plan, bits=budget.block_means(linears), linear_bits=linears)


def _one_per_block(allocation: str, blocks: tuple[float, ...], budget: Budget) -> tuple[float, ...]:
    if len(blocks) != len(budget.sizes):
        raise UserError(
            f"allocation: {allocation} gives the linears of a block different sparsities, and channels go from all of "
            "them at once; take uniform, atp, curve, owl or alphapruning"
        )
    return blocks


def _rounded(linears: LinearSparsities, budget: Budget, pattern: Pattern) -> LinearSparsities:
    """The sparsities of all linears of all blocks, rounded together."""
    sizes = [shape.size for shapes in budget.linears for shape in shapes]
    rounded = iter(pattern.round([s for block in linears for s in block], sizes))
    return tuple(tuple(next(rounded) for _ in block) for block in linears)
