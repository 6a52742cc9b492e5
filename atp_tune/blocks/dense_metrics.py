"""Measurements of the dense model for allocations.

W weight [out, in] of a linear; X its inputs [tokens, in] over the calibration text in the dense model.

    scores      |W_ij| (magnitude) or |W_ij| ‖X_j‖₂ (wanda), float32, as in the pruners
    outliers    share of a block's scores above `threshold` times their mean, which is float64
    exponents   α of a power law λ^-α fitted to the tail, or to the upper half, of the eigenvalues λ of WᵀW
    global      share of a linear's scores among the lowest of the model
    priced      the plan of `allocations.gradient`, whose gradients `blocks.gradients` measures
    of_blocks   what a plug-in computes from the weights and the statistics of each block

Blocks are used one at a time and nothing of their size is kept, so no more memory is needed than for pruning.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.allocations import LinearSparsities
from atp_tune.allocations.budget import Costs, Score, TailStart, ranked_by
from atp_tune.allocations.gradient import between
from atp_tune.allocations.rows import RowSparsities
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.errors import TrialError
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.statistics import InputNorms, precise
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.utils.cache import folder_atomically

# --- Statistics of the dense model, on disk and as ranks.
#
# On disk they are kept in the cache per model, text and pruner, with one safetensors file per block. The file of a
# block is read when the block is pruned, so that Hessians, which are larger than the weights, are in memory for one
# block only.
#
# With statistics of the dense model, Wanda's scores are the same in all trials; only the number of zeros changes. So
# weights are ranked once, and a mask is a comparison, which saves half the time of a screening trial.

DISK_SHARE = 0.5  # maximum share of the free disk space for statistics
SMALL = 1 << 20  # bytes of a file up to which its statistics stay in memory
RANK_SHARE = 0.3  # maximum share of the free memory for ranks
RANK_BYTES = 2  # bytes of a rank, in rows of up to 32,768 weights (longer rows: 4)


@dataclass(eq=False)
class PerBlock(Sequence[BlockStatistics]):
    """A sequence of the statistics of each block, computed on access by `of`."""

    blocks: int
    of: Callable[[int], BlockStatistics]

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: Any) -> Any:
        indices = range(self.blocks)[index]  # raises IndexError
        return self.of(indices) if isinstance(indices, int) else [self.of(each) for each in indices]


def cached_statistics(folder: Path, kind: type[Statistics], blocks: int, device: torch.device) -> PerBlock:
    """Statistics that are read from disk, each block's from its file."""
    small = dict[int, BlockStatistics]()

    def of(index: int) -> BlockStatistics:
        if index in small:
            return small[index]
        file = block_file(folder, index)
        parts = dict[int, dict[str, torch.Tensor]]()
        with safe_open(file, "pt", device=str(device)) as stored:
            for key in stored.keys():  # noqa: SIM118 - it is no mapping
                number, _, name = key.partition(" ")
                parts.setdefault(int(number), {})[name] = stored.get_tensor(key)
            linears = json.loads(stored.metadata()["linears"])
        restored = {number: kind.restored(tensors) for number, tensors in parts.items()}
        by_name = {name: restored[number] for name, number in linears.items()}
        if file.stat().st_size <= SMALL:
            small[index] = by_name
        return by_name

    return PerBlock(blocks, of)


def ranked(statistics: Sequence[BlockStatistics], checkpoint: Checkpoint, group: int | None = None) -> PerBlock:
    """Statistics of all blocks: plain on the first access of a block, ranks of its weights from then on.

    Ranking takes as long as two or three masks, so it is not worthwhile for a single plan.
    """
    accessed, weight_ranks = set[int](), dict[int, BlockStatistics]()

    def of(index: int) -> BlockStatistics:
        if index not in weight_ranks:
            plain = statistics[index]
            if index not in accessed:
                accessed.add(index)
                return plain
            weights = checkpoint.weights(index)
            linears = [linear for linear in checkpoint.linears[index] if linear.name in plain]
            weight_ranks[index] = {x.name: Ranks.of(x.matrix(weights[x.key]), plain[x.name], group) for x in linears}
        return weight_ranks[index]

    return PerBlock(len(statistics), of)


def save_all(folder: Path, measured: Iterable[BlockStatistics]) -> None:
    """Writes statistics block by block as they are measured; the folder appears when complete. May raise OSError."""
    with folder_atomically(folder, shared=True) as temporary:
        for index, statistics in enumerate(measured):
            # Writes statistics; linears that share an object share its tensors.
            distinct = {id(each): each for each in statistics.values()}
            numbers = {identity: number for number, identity in enumerate(distinct)}
            tensors = {
                f"{numbers[identity]} {name}": tensor.cpu().contiguous()
                for identity, each in distinct.items()
                for name, tensor in each.tensors().items()
            }
            linears = {name: numbers[id(each)] for name, each in statistics.items()}
            try:
                save_file(tensors, block_file(temporary, index), {"linears": json.dumps(linears)})
            except SafetensorError as error:  # such as a full disk
                raise OSError(str(error)) from error


def is_room(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes are at most the share `DISK_SHARE` of the free disk space of a folder."""
    return needed <= DISK_SHARE * shutil.disk_usage(folder).free


def block_file(folder: Path, index: int) -> Path:
    """The file of block `index`."""
    return folder / f"{index}.safetensors"


def can_rank(pruner: Pruner, checkpoint: Checkpoint) -> bool:
    """Whether ranks are sufficient for a pruner, and fit in memory beside the weights."""
    is_possible = isinstance(pruner, Wanda) and pruner.goes_by_row and checkpoint.offload == "none"
    return is_possible and RANK_BYTES * sum(checkpoint.sizes) < RANK_SHARE * free_memory(checkpoint.device)


BINS = 100  # in the histogram of ln λ
NEAR = 0.95, 1.5  # the tail may begin between these multiples of the peak
CHUNK = 256  # candidates that are compared at a time
HALF = 16  # bits of a float32 that one sweep over the scores resolves

T = TypeVar("T")
StatisticsOf = Callable[[type[Statistics]], Sequence[Mapping[str, Statistics]]]
Cache = dict[tuple[object, ...], Any]
# By ascending targets, pruner, and whether rows move too: the ends.
Priced = Callable[[Sequence[float], str, bool], Sequence[RowSparsities]]
Sweep = Callable[[], Iterator[list[Tensor]]]


@dataclass(eq=False)
class DenseMetrics:
    """Measurements of a dense checkpoint; `statistics` measures its inputs, `cache` keeps all results.

    `priced` finds sparsities by prices, `priced_by` names what they depend on for a pruner, `by_rows` says whether its
    rows may differ; `path`: the targets of the one descent for all budgets, else each has its own. `costs` measures
    those of widths.
    """

    checkpoint: Checkpoint
    statistics: StatisticsOf
    cache: Cache
    step: Callable[[int], None]
    priced: Priced
    priced_by: Callable[[str], str] = ranked_by
    by_rows: Callable[[str], bool] = lambda pruner: False
    path: Sequence[float] = ()
    costs: Callable[[], Costs] = tuple

    def outlier_ratios(self, threshold: float) -> tuple[float, ...]:
        """For each block, the share of its Wanda scores above `threshold` times their mean, in one sweep."""
        return self._once(
            ("outliers", threshold), lambda: tuple(outlier_ratio(block, threshold) for block in self._scores("wanda"))
        )

    def tail_exponents(self, start: TailStart = "peak") -> LinearSparsities:
        """For each linear of each block, the exponent α; TrialError if a spectrum has no tail."""
        fit = {"peak": tail_exponent, "middle": middle_exponent}[start]

        def exponent(index: int, linear: Linear, weight: Tensor) -> float:
            fitted = fit(eigenvalues(weight))
            if not math.isfinite(fitted):
                raise TrialError(
                    f"linear {linear.name} of block {index}: its spectrum has no tail to fit an exponent to"
                )
            return fitted

        return self._once(
            ("exponents", start),
            lambda: tuple(tuple(exponent(index, *each) for each in block) for index, block in self._blocks()),
        )

    def global_sparsities(self, target: float, score: Score) -> LinearSparsities:
        """For each linear of each block, the share of its scores among the ⌊target · N⌋ lowest; three sweeps."""
        sizes = [[linear.size for linear in linears] for linears in self.checkpoint.linears]

        def measure() -> LinearSparsities:
            counts = lowest_counts(lambda: self._scores(score), int(target * sum(map(sum, sizes))))
            return tuple(tuple(map(share, *pair)) for pair in zip(counts, sizes, strict=True))

        return self._once(("global", target, score), measure)

    def by_prices(self, target: float, pruner: str, rows: bool) -> RowSparsities:
        """Sparsities by prices; with offsets of `rows`, if the pruner takes the lowest scores of each row."""
        targets, rows = tuple(self.path) or (target,), rows and self.by_rows(pruner)
        key = "priced", targets, self.priced_by(pruner), rows
        return between(targets, self._once(key, lambda: self.priced(targets, pruner, rows)), target)

    def width_costs(self) -> Costs:
        """For each linear of each block, what rounding it to each of the widths costs."""
        return self._once(("costs",), self.costs)

    def of_blocks(
        self, key: str, measure: Callable[[list[Any]], T], kind: type[Statistics] | None = None
    ) -> tuple[T, ...]:
        """`measure` of the linears of each block: pairs of a copy of the weight [out, in] and its statistics."""

        def measured() -> Iterator[T]:
            statistics = None if kind is None else self.statistics(kind)
            for index, linears in enumerate(self.checkpoint.linears):
                weights, by_name = self.checkpoint.weights(index), statistics[index] if statistics else {}
                self.step(index + 1)
                yield measure([(x.matrix(weights[x.key]).clone(), by_name.get(x.name)) for x in linears])

        return self._once(("blocks", key, kind), lambda: tuple(measured()))

    @torch.inference_mode()
    def _once(self, key: tuple[object, ...], measure: Callable[[], T]) -> T:
        if key not in self.cache:
            self.cache[key] = measure()
        value: T = self.cache[key]
        return value

    def _blocks(self) -> Iterator[tuple[int, list[tuple[Linear, Tensor]]]]:
        """Index of each block, and its linears with matrices [out, in] in the dtype of the model."""
        for index, linears in enumerate(self.checkpoint.linears):
            weights = self.checkpoint.weights(index)
            device = precise(self.checkpoint.device)
            yield index, [(linear, linear.matrix(weights[linear.key]).to(device)) for linear in linears]
            self.step(index + 1)

    def _scores(self, score: Score) -> Iterator[list[Tensor]]:
        """Scores [out, in] of each linear of a block, block by block."""
        norms = self.statistics(InputNorms) if score == "wanda" else None
        for index, block in self._blocks():
            by_name = norms[index] if norms else {}
            scores = []
            for linear, weight in block:
                scores.append(weight.float().abs())
                if isinstance(statistics := by_name.get(linear.name), InputNorms):
                    scores[-1] = scores[-1] * statistics.norms().to(weight.device)
            yield scores


def outlier_ratio(scores: list[Tensor], threshold: float) -> float:
    """Share of all scores above `threshold` times their mean."""
    size = sum(part.numel() for part in scores)
    exact = threshold * (math.fsum(float(part.sum(dtype=torch.float64)) for part in scores) / size)
    # The largest float32 not above this float64; float32 scores exceed both or neither.
    least = torch.tensor(exact, dtype=torch.float32)
    if float(least) > exact:
        least = torch.nextafter(least, torch.tensor(-math.inf))
    return sum(int((part > float(least)).sum()) for part in scores) / size


def share(count: int, size: int) -> float:
    """Count / size, rounded such that ⌊size · share⌋ is the count."""
    ratio = count / size
    return ratio if int(size * ratio) == count else math.nextafter(ratio, 1)


def lowest_counts(sweep: Sweep, count: int) -> list[list[int]]:
    """Number in each linear of the `count` lowest scores of all blocks, the first of equal scores first."""
    if count == 0:
        return [[0] * len(block) for block in sweep()]
    # Bit pattern of the score of this rank (from 1) in all blocks, found by its high half, then its low half.
    high, before = bin_at((bits >> HALF for block in patterns(sweep) for bits in block), count)
    inside = (bits[bits >> HALF == high] & (1 << HALF) - 1 for block in patterns(sweep) for bits in block)
    limit = (high << HALF) + bin_at(inside, count - before)[0]
    counts = [[(int((bits < limit).sum()), int((bits == limit).sum())) for bits in block] for block in patterns(sweep)]
    spare = count - sum(below for block in counts for below, _ in block)
    for block in counts:
        for k, (below, equal) in enumerate(block):
            taken = min(equal, spare)
            block[k] = below + taken, equal - taken
            spare -= taken
    return [[number for number, _ in block] for block in counts]


def patterns(sweep: Sweep) -> Iterator[list[Tensor]]:
    """Bit patterns of float32 scores, in the same order as the scores, since none is negative."""
    return ([part.view(torch.int32) for part in block] for block in sweep())


def bin_at(halves: Iterable[Tensor], rank: int) -> tuple[int, int]:
    """The value of this rank (from 1) among 16-bit integers, and the number of lower integers."""
    counts = sum(torch.bincount(part.flatten(), minlength=1 << HALF) for part in halves)
    assert isinstance(counts, Tensor)
    upto = counts.cumsum(0)
    value = int((upto < rank).sum())
    return value, int(upto[value] - counts[value])


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of WᵀW for a matrix [out, in], ascending, float64 [min(out, in)], without numerical zeros.

    They are computed from the smaller of WᵀW and WWᵀ.
    """
    wide = matrix.double()
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    values: Tensor = torch.linalg.eigvalsh(tall.T @ tall)
    return values[values > len(values) * torch.finfo(torch.float64).eps * values[-1]]


def tail_exponent(spectrum: Tensor) -> float:
    """α of the power law that best fits the tail of eigenvalues (ascending, positive, float64); NaN without a tail.

    Hill's estimator over the n eigenvalues from λ_i on, for the i near the peak of the histogram of ln λ that minimises
    the distance D_i:

        α_i = 1 + n / Σ_k ln(λ_k / λ_i)                                     k = i … N-1, n = N-i
        D_i = max_k |1 - (λ_k / λ_i)^(1-α_i) - (k-i) / n|                   Kolmogorov-Smirnov

    "Near" is log₁₀(0.95 x) <= λ_i <= 1.5 x for a peak bin that begins at x, as in AlphaPruning's `net_esd_estimator`
    and in WeightWatcher. The logarithm may be an error, but the authors' exponents are computed with it; for small
    eigenvalues it removes the lower limit.

    The peak of a short spectrum is often a near-tie of two bins: with bf16 instead of float32 weights, 50 of the 210
    exponents of SmolLM2-135M change by more than 0.1 %.
    """
    total = len(spectrum)
    if total < 2:
        return math.nan
    logs = spectrum.log()
    # Interval of eigenvalues in which the tail may begin, from the peak of the histogram of their logarithms.
    low, high = float(logs[0]), float(logs[-1])
    edge = math.exp(low + int(torch.histc(logs, BINS, min=low, max=high).argmax()) * (high - low) / BINS)
    low, high = math.log10(NEAR[0] * edge), NEAR[1] * edge
    starts = ((spectrum >= low) & (spectrum <= high)).nonzero().flatten()
    excess = logs.flip(0).cumsum(0).flip(0)[starts] - (total - starts) * logs[starts]
    starts, excess = starts[excess > 0], excess[excess > 0]
    if not len(starts):
        return math.nan
    exponents = 1 + (total - starts) / excess
    return float(exponents[distances(logs, starts, exponents).argmin()])


def middle_exponent(spectrum: Tensor) -> float:
    """α of the power law of the upper half of eigenvalues (ascending, positive, float64); NaN without a tail.

    Hill's estimator from the middle on: `tail_exponent`'s α_i at i = ⌊N / 2⌋, AlphaPruning's `alpha_mid`.
    """
    tail = spectrum[len(spectrum) // 2 :].log()
    excess = float((tail - tail[0]).sum()) if len(tail) else 0.0
    return 1 + len(tail) / excess if excess > 0 else math.nan


def distances(logs: Tensor, starts: Tensor, exponents: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distance between the power law of each candidate and the eigenvalues from it on."""
    positions, gaps = torch.arange(len(logs), device=logs.device), []
    for start, exponent in zip(torch.split(starts, CHUNK), torch.split(exponents, CHUNK), strict=True):
        rank = positions - start[:, None]
        law = 1 - torch.exp((1 - exponent[:, None]) * (logs - logs[start][:, None]))
        gap = (law - rank / (len(logs) - start[:, None])).abs()
        gaps.append(gap.masked_fill(rank < 0, 0).amax(1))
    return torch.cat(gaps)
