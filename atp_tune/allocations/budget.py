"""The sparsity budget that an allocation shares out, and what allocations have in common."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from atp_tune.allocations.bits import Size
    from atp_tune.allocations.channels import BlockChannels
    from atp_tune.allocations.rows import RowSparsities

ROUNDING = 1e-9  # tolerance when a parameter is compared with its bounds
# Names of parameters in papers and error messages.
SYMBOLS = {
    "beta": "β",
    "gamma": "γ",
    "split": "δ",
    "ends": "φ",
    "value": "ν",
    "lam": "λ",
    "epsilon": "ε",
    "kappa": "κ",
    "zeros": "S",
    "omega": "ω",
}

HALVINGS = 60  # bisection steps for a shift, enough for the precision of a float

Measured = TypeVar("Measured")
Score = Literal["magnitude", "wanda"]
TailStart = Literal["peak", "middle"]  # of a spectrum: near its most frequent eigenvalues, or its upper half
Costs = Sequence[Sequence[Sequence[float]]]  # by block, linear, and width
Bounds = dict[str, tuple[float, float]]  # the interval of each parameter
Points = list[dict[str, float]]  # values of all parameters
LinearSparsities = tuple[tuple[float, ...], ...]  # one per linear of each block
Sparsities = tuple[float, ...] | LinearSparsities  # one per block if its linears do not differ


@dataclass(frozen=True)
class Shape:
    """Outputs and inputs of one linear; `attention`: it belongs to attention, not to the MLP; `value`: it is the
    value projection.
    """

    rows: int
    columns: int
    attention: bool
    value: bool = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


class DenseMetricsProtocol(Protocol):
    """Measurements of the dense model, made when an allocation needs them; each is made once."""

    def outlier_ratios(self, threshold: float) -> tuple[float, ...]:
        """For each block, the share of its Wanda scores above `threshold` times their mean."""

    def tail_exponents(self, start: TailStart = "peak") -> LinearSparsities:
        """For each linear of each block, the exponent α of the tail of its eigenvalue spectrum, from `start` on."""

    def global_sparsities(self, target: float, score: Score) -> LinearSparsities:
        """For each linear of each block, the share of its scores that are among the lowest `target` of the model."""

    def by_prices(self, target: float, pruner: str, rows: bool) -> "RowSparsities":
        """For each linear of each block, its sparsity by prices at this target; see `allocations.gradient`.

        `rows`: with offsets of rows, if the pruner takes the lowest scores of each row.
        """

    def width_costs(self) -> Costs:
        """For each linear of each block, what rounding it to each of the widths costs.

        Of types of ggml one of each that its rows can have; then one row more, of the matrices outside of the blocks.
        """

    def of_blocks(self, key: str, measure: Callable[[list[Any]], Measured], kind: Any = None) -> tuple[Measured, ...]:
        """Any other measurement: `measure` of each block, made once for each `key`.

        `measure` gets a list of the block's linears, each a pair of its weight [out, in] and its `kind` of statistics,
        such as `InputNorms` or `Hessian`; None where there are none: without `kind`, and for an expert without tokens.
        """


@dataclass(frozen=True)
class Budget:
    """Target S (share of zeros over all linears, in [0, 1]) and the number of prunable weights of each block.

    `linears` are the shapes of the linears of each block, `pruner` is the name of what prunes them,
    `channels` are those of each block where whole channels go; `widths` the bits that a block may have where bits are
    shared out: the target is then a share between the most and the fewest, see `allocations.bits`. `bits` are those
    of every block, where weights are pruned and then rounded; with a `size` those of each linear follow from it, and
    the target is the highest sparsity. `outer`: of types of ggml the matrices outside of the blocks, by name.
    """

    target: float
    sizes: tuple[int, ...]
    linears: tuple[tuple[Shape, ...], ...] = ()
    dense_metrics: DenseMetricsProtocol | None = field(default=None, compare=False)
    pruner: str = "wanda"
    channels: tuple["BlockChannels", ...] = ()
    widths: tuple[int, ...] = ()
    bits: int | None = None
    size: "Size | None" = None
    outer: "Mapping[str, Shape]" = field(default_factory=dict)

    @property
    def score(self) -> Score:
        """The score by which allocations rank weights for the pruner."""
        return ranked_by(self.pruner)

    @property
    def highest(self) -> float:
        """The highest sparsity that every block can have."""
        return min((block.highest for block in self.channels), default=1.0)

    @property
    def centre(self) -> float:
        """Mean block index weighted by size: (L-1)/2 if all blocks have the same size."""
        return sum(i * size for i, size in enumerate(self.sizes)) / sum(self.sizes)

    def check(self, bounds: Bounds, **values: float) -> None:
        """Raises ValueError if a value is outside its interval or NaN."""
        for name, value in values.items():
            low, high = bounds[name]
            if not low - ROUNDING <= value <= high + ROUNDING:
                raise ValueError(
                    f"{SYMBOLS.get(name, name)} = {value:g} is outside the admissible interval [{low:.6g}, {high:.6g}]"
                )

    def require_dense_metrics(self, allocation: str) -> DenseMetricsProtocol:
        """The measurements of the dense model; ValueError for a budget without a model."""
        if self.dense_metrics is None:
            raise ValueError(f"{allocation}: needs a model to measure, and the budget has none")
        return self.dense_metrics

    def mean(self, sparsities: tuple[float, ...]) -> float:
        """Mean of one sparsity per block weighted by size: the share of zeros in all blocks."""
        return weighted_mean(sparsities, self.sizes)

    @property
    def linear_sizes(self) -> list[list[int]]:
        """Number of weights of each linear of each block."""
        if self.channels:
            return [[size for _, size in block.linears] for block in self.channels]
        return [[shape.size for shape in shapes] for shapes in self.linears]


def weighted_mean(levels: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean of sparsities, or bits, weighted by the number of weights."""
    return sum(level * size for level, size in zip(levels, sizes, strict=True)) / sum(sizes)


def ranked_by(pruner: str) -> Score:
    """The score by which allocations rank weights for a pruner."""
    return "magnitude" if pruner == "magnitude" else "wanda"


class Formula:
    """An allocation of this package: without parameters, unless it says which.

    `contains`: the allocations that it equals where its other parameters are 0; `measures_inputs`: it needs the
    statistics of the dense model's inputs.
    """

    contains: tuple[str, ...] = ()
    measures_inputs = False

    def bounds(self, budget: Budget) -> Bounds:
        """The interval of each parameter."""
        return {}

    def initial_points(self, budget: Budget) -> Points:
        """The first points of a search."""
        return [{}]


def spread(values: Sequence[float]) -> tuple[float, ...]:
    """Maps values linearly to [0, 1], from the lowest to the highest; equal values become 0."""
    low, high = min(values), max(values)
    return tuple((value - low) / (high - low) if high > low else 0.0 for value in values)


def proportional(weights: Sequence[float], sizes: Sequence[int], mean: float) -> tuple[float, ...]:
    """Shares min(1, c w_i), with c > 0 such that their mean weighted by `sizes` is `mean`, in [0, 1].

    Shares above 1 are set to 1 and the others are scaled up, until no share exceeds 1. Weights must be positive.
    """
    scale, full = 0.0, frozenset[int]()
    while len(full) < len(sizes):
        free = [i for i in range(len(sizes)) if i not in full]
        scale = (mean * sum(sizes) - sum(sizes[i] for i in full)) / sum(weights[i] * sizes[i] for i in free)
        exceeding = {i for i in free if scale * weights[i] > 1}
        if not exceeding:
            break
        full |= exceeding
    return tuple(1.0 if i in full else min(1.0, max(0.0, scale * weight)) for i, weight in enumerate(weights))


def by_block(values: Sequence[float], linears: Sequence[Sequence[Shape]]) -> LinearSparsities:
    """Values of all linears, one after the other, as one row for each block."""
    flat = iter(values)
    return tuple(tuple(next(flat) for _ in row) for row in linears)


def level(
    wanted: Sequence[float], sizes: Sequence[int], target: float, low: float = 0.0, high: float = 1.0
) -> tuple[float, ...]:
    """Shifts values by one number and clips them to [low, high], such that their mean weighted by size is the target.

    The mean of `wanted` must be the target; values that lie within the limits stay as they are.
    """

    def clip(value: float) -> float:
        return min(high, max(low, value))

    if all(low - ROUNDING <= value <= high + ROUNDING for value in wanted):
        return tuple(map(clip, wanted))
    least, most = low - max(wanted), high - min(wanted)
    for _ in range(HALVINGS):
        shift = (least + most) / 2
        if sum(clip(value + shift) * size for value, size in zip(wanted, sizes, strict=True)) < target * sum(sizes):
            least = shift
        else:
            most = shift
    return tuple(clip(value + most) for value in wanted)
