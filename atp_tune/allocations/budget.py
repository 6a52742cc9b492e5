"""The budget that an allocation shares out, all that it may know of the dense model, and sharing out by weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

ROUNDING = 1e-9  # by which a parameter may miss its interval
# As the papers and the docstrings write them.
SYMBOLS = {"beta": "β", "gamma": "γ", "split": "δ", "ends": "φ", "value": "ν", "lam": "λ", "epsilon": "ε"}

Score = Literal["magnitude", "wanda"]
LinearSparsities = tuple[tuple[float, ...], ...]  # one per linear of each block
Sparsities = tuple[float, ...] | LinearSparsities  # one per block, where its linears do not differ


@dataclass(frozen=True)
class Shape:
    """One linear: outputs, inputs, whether it belongs to the block's attention (else to its MLP), and whether it is
    the value projection there.
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
    """What can be measured on the dense model, when an allocation asks for it; each is measured once."""

    def outlier_ratios(self, threshold: float) -> tuple[float, ...]:
        """For each block the share of its Wanda scores above `threshold` times their mean."""

    def tail_exponents(self) -> tuple[tuple[float, ...], ...]:
        """For each linear of each block the exponent α of the tail of its eigenvalue spectrum."""

    def global_sparsities(self, target: float, score: Score) -> LinearSparsities:
        """For each linear of each block the share of its scores among the model's `target` lowest."""


@dataclass(frozen=True)
class Budget:
    """Target S (share of zeros over all linears, in [0, 1]) and the number of prunable weights of each block.

    `linears` are the shapes behind the sizes, `evidence` what can be measured, `score` what the pruner ranks by.
    """

    target: float
    sizes: tuple[int, ...]
    linears: tuple[tuple[Shape, ...], ...] = ()
    evidence: DenseMetricsProtocol | None = field(default=None, compare=False)
    score: Score = "wanda"

    @property
    def centre(self) -> float:
        """Mean block index, weighted by size: (L-1)/2 where all blocks are alike."""
        return sum(i * size for i, size in enumerate(self.sizes)) / sum(self.sizes)

    def check(self, bounds: dict[str, tuple[float, float]], **values: float) -> None:
        """ValueError if a value is outside its interval, or not a number."""
        for name, value in values.items():
            low, high = bounds[name]
            if not low - ROUNDING <= value <= high + ROUNDING:
                symbol = SYMBOLS.get(name, name)
                raise ValueError(f"{symbol} = {value:g} is outside the admissible interval [{low:.6g}, {high:.6g}]")

    def require_evidence(self, allocation: str) -> DenseMetricsProtocol:
        """What can be measured on the dense model; ValueError for a budget that comes without a model."""
        if self.evidence is None:
            raise ValueError(f"{allocation}: needs a model to measure, and the budget has none")
        return self.evidence

    def mean(self, sparsities: tuple[float, ...]) -> float:
        """Weighted mean of one sparsity per block: the share of zeros that they make."""
        return sum(s * size for s, size in zip(sparsities, self.sizes, strict=True)) / sum(self.sizes)

    def block_means(self, sparsities: LinearSparsities) -> tuple[float, ...]:
        """Sparsity of each block, from those of its linears."""
        return tuple(
            sum(s * shape.size for s, shape in zip(row, shapes, strict=True)) / sum(shape.size for shape in shapes)
            for row, shapes in zip(sparsities, self.linears, strict=True)
        )


def spread(values: Sequence[float]) -> tuple[float, ...]:
    """Values mapped linearly so that the lowest is 0 and the highest 1; all 0 where they are equal."""
    low, high = min(values), max(values)
    return tuple((value - low) / (high - low) if high > low else 0.0 for value in values)


def proportional(weights: Sequence[float], sizes: Sequence[int], mean: float) -> tuple[float, ...]:
    """Shares min(1, c w_i) of parts of these sizes, with the c > 0 that makes their weighted mean `mean`, in [0, 1].

    Shares that would exceed 1 are 1, and the rest is scaled up, until none does. Weights must be positive.
    """
    wanted = mean * sum(sizes)
    scale, full = 0.0, frozenset[int]()
    while len(full) < len(sizes):
        free = [i for i in range(len(sizes)) if i not in full]
        scale = (wanted - sum(sizes[i] for i in full)) / sum(weights[i] * sizes[i] for i in free)
        exceeding = {i for i in free if scale * weights[i] > 1}
        if not exceeding:
            break
        full |= exceeding
    return tuple(1.0 if i in full else min(1.0, max(0.0, scale * weight)) for i, weight in enumerate(weights))
