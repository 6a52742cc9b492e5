"""Measurements of the dense model on the calibration text, made once for all trials of a process."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.allocations import LinearSparsities
from atp_tune.allocations.budget import Costs, Score
from atp_tune.allocations.gradient import (
    AT_LOWEST,
    DISTANCE,
    FIRST,
    FURTHER,
    KEPT,
    LARGEST,
    LAST,
    LIMITS,
    STEPS,
    Prices,
    descend,
    steps_along,
)
from atp_tune.allocations.rows import RowOffsets, RowSparsities
from atp_tune.blocks.dense_metrics import (
    Cache,
    DenseMetrics,
    PerBlock,
    cached_statistics,
    can_rank,
    is_room,
    ranked,
    save_all,
)
from atp_tune.blocks.gradients import (
    ACTIVATIONS,
    BAND,
    GRID,
    BitPricing,
    BlockGradients,
    ByPlaces,
    ByPruner,
    Places,
    Pricing,
    Rounded,
    RowPricing,
    Sample,
)
from atp_tune.blocks.prune_pass import BlockStatistics, advance, embed, entering, measure_and_advance
from atp_tune.blocks.replay import AutoBatch, Replay, block_bytes
from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import Tensors, arithmetic, host_memory
from atp_tune.config.prune import NLL_SHARES, Loss
from atp_tune.events import EventHandler, Message, Step, TrialStarted
from atp_tune.inputs import Batch, InputKind
from atp_tune.inputs.items import Items
from atp_tune.plugins import code_digest
from atp_tune.pruners import Pruner, Statistics, Unprepared
from atp_tune.pruners.selection import order_in_rows
from atp_tune.pruners.statistics import Hessian, Several
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.scores import Score as ModelScore
from atp_tune.scores.next_token import Block, Passing
from atp_tune.utils.cache import cache_dir, file_atomically, key, made_once, write_atomically

CURVE_TOKENS = 512  # of the calibration text, for the error curve, which statistics of the dense model pay for


@dataclass(eq=False, repr=False)
class Measuring(Unprepared):
    """Stands for a pruner that needs a kind of statistics as they are."""

    measures: type[Statistics]

    def __repr__(self) -> str:
        return "unprepared"


@dataclass(eq=False)
class DenseMeasurements:
    """Statistics of the linears' inputs, dense metrics for allocations, and hidden states for the error curve.

    `items`: calibration windows; `calibration`: the same on the device; `model`: SHA-256 of the checkpoint.
    """

    replay: Replay
    items: Items
    calibration: Batch
    batch: AutoBatch
    model: str
    watch: EventHandler
    _statistics: dict[str, Sequence[BlockStatistics]] = field(default_factory=dict)
    _ranked: dict[tuple[str, int | None], PerBlock] = field(default_factory=dict)  # by statistics, and pattern's group
    _metrics: Cache = field(default_factory=dict)

    def clear(self) -> None:
        """Frees all measurements."""
        for cache in (self._statistics, self._ranked, self._metrics):
            cache.clear()
        vars(self).pop("states", None)
        self.calibration = None

    def evidence(self, *prices: Any) -> DenseMetrics:
        """The metrics that allocations need, each measured once for all; `prices`: what plans by prices need."""
        return DenseMetrics(
            self.replay.checkpoint, lambda kind: self.statistics(Measuring(kind)), self._metrics, self._step, *prices
        )

    @cached_property
    def curve_windows(self) -> int:
        """Number of windows of the error curve: the first ones of the calibration text."""
        return min(len(self.items), max(1, CURVE_TOKENS // self.items.positions))

    @cached_property
    def states(self) -> list[Tensor]:
        """Hidden states [`curve_windows`, tokens, width] after each dense block, in host memory."""
        items = self.calibration[: self.curve_windows]
        return [after.cpu() for _, after in dense_states(self.replay, self.batch, items)]

    def statistics(self, pruner: Pruner | Measuring) -> Sequence[BlockStatistics]:
        """Statistics of every linear's inputs in the dense model, measured once for each kind and cached on disk."""
        name = self.statistics_key(pruner)
        if name not in self._statistics:
            self._statistics[name] = self._read_or_measure(cache_dir("statistics") / name, pruner)
        return self._statistics[name]

    def fast_statistics(self, pruner: Pruner) -> Sequence[BlockStatistics]:
        """The statistics, as ranks if the pruner can use ranks, which are faster."""
        statistics, checkpoint, group = self.statistics(pruner), self.replay.checkpoint, getattr(pruner, "group", None)
        name = self.statistics_key(pruner), group
        if name not in self._ranked and can_rank(pruner, checkpoint):
            self._ranked[name] = ranked(statistics, checkpoint, group)
        return self._ranked.get(name, statistics)

    def statistics_key(self, pruner: Pruner | Measuring) -> str:
        """SHA-256 of everything that determines a pruner's statistics."""
        checkpoint, kind = self.replay.checkpoint, pruner.measures
        assert kind is not None
        is_own = kind.__module__.startswith("atp_tune.")
        prepares = issubclass(kind, Hessian | Several) or not is_own  # the others are the same for all pruners
        return key(
            "statistics",
            model=self.model,
            tower=str(checkpoint.in_tower),
            items=self.items.content,
            kind=[kind.__name__, None if is_own else code_digest(kind)],
            pruner=repr(getattr(pruner, "prepares", pruner)) if prepares else None,
            batch=min(self.batch.windows, len(self.items)),
            arithmetic=arithmetic(checkpoint.device, checkpoint.dtype),
        )

    def _read_or_measure(self, folder: Path, pruner: Pruner | Measuring) -> Sequence[BlockStatistics]:
        checkpoint, kind = self.replay.checkpoint, pruner.measures
        assert kind is not None
        if not folder.is_dir():
            needed = sum(kind.bytes_for(x.in_features) for linears in checkpoint.linears for x in linears)
            try:
                if not is_room(folder.parent, needed):
                    raise OSError("no room")
                save_all(folder, self._measured(pruner, kind))
            except OSError as error:
                self.watch(Message(f"cache folder {folder.parent}: {error}; dense statistics are kept in memory"))
                return list(self._measured(pruner, kind))
        return cached_statistics(folder, kind, len(checkpoint.blocks), checkpoint.device)

    def _measured(self, pruner: Pruner | Measuring, kind: type[Statistics]) -> Iterator[BlockStatistics]:
        hidden = embed(self.replay, self.batch, self.calibration)
        tower = self.replay.checkpoint.tower_weights()
        for index, weights in dense_blocks(self.replay.checkpoint):
            hidden = entering(self.replay, self.batch, index, hidden, self.calibration, tower)
            by_name, hidden = measure_and_advance(self.replay, self.batch, index, weights, hidden, kind)
            for statistics in set(by_name.values()):
                pruner.prepare(statistics)
            yield by_name
            self._step(index + 1)

    def _step(self, done: int) -> None:
        self.watch(Step("measure", done, len(self.replay.checkpoint.blocks)))


def dense_blocks(checkpoint: Checkpoint) -> Iterator[Block]:
    """The dense model as blocks, in order."""
    return ((index, checkpoint.weights(index)) for index in range(len(checkpoint.blocks)))


def dense_states(replay: Replay, batch: AutoBatch, items: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields hidden states [items, positions, width] of the dense model before and after each block."""
    hidden, tower = embed(replay, batch, items), replay.checkpoint.tower_weights()
    for index, weights in dense_blocks(replay.checkpoint):
        before = entering(replay, batch, index, hidden, items, tower)
        hidden = advance(replay, batch, index, weights, before.clone())
        yield before, hidden


def dense_final_states(
    replay: Replay, batch: AutoBatch, parts: Sequence[Batch], watch: EventHandler, phase: str = "evaluate"
) -> list[Tensor]:
    """Final hidden states [items, positions, width] of the dense model for each part, in host memory."""
    checkpoint, passing = replay.checkpoint, Passing(replay, batch, parts)
    for index, weights in dense_blocks(checkpoint):
        passing.block(index, weights)
        watch(Step(phase, index + 1, len(checkpoint.blocks)))
    return [states.cpu() for states in passing.states]


# --- Sparsities and bits by prices: the descent of `allocations.gradient`, and the costs of widths.
#
# The result is kept in the cache by everything that determines it, so that later runs and other studies need no
# descent; so are the steps of a descent until its end, so that an interrupted one goes on.

POOL = 32768  # tokens of the calibration text that the windows of all steps are drawn from
TOKENS, WINDOWS = 2048, 4  # of a step: so many tokens, but at least so many windows
FEWER = 2  # times as few of both along a path of several targets, whose steps are twice as many, and below
FEW_ZEROS = 0.45  # zeros, of which half the tokens find nearly the same plan (docs/log.md)
LEVEL_SHARE = 0.3  # maximum share of the free host memory for what a pruner made of the weights
OF_STEPS = STEPS, AT_LOWEST, FURTHER, KEPT, LARGEST, FIRST, LAST, LIMITS
CONSTANTS = (*OF_STEPS, BAND, POOL, TOKENS, FEWER, FEW_ZEROS, WINDOWS)

COST_TOKENS, COST_ITEMS = 12288, 16  # that costs of bits are measured on: so many tokens, but at least so many items

Ends = tuple[RowSparsities, ...]


@dataclass(eq=False)
class CalibrationGradients:
    """Gradients for one checkpoint and calibration text; `pool`: the items that are drawn from."""

    checkpoint: Checkpoint
    inputs: InputKind
    score: ModelScore
    pool: Items
    heads: AutoBatch
    watch: EventHandler

    def __post_init__(self) -> None:
        self._batch = AutoBatch(
            self.checkpoint.device, self.pool.positions, ACTIVATIONS * block_bytes(self.checkpoint), self.watch
        )

    @cached_property
    def of_blocks(self) -> BlockGradients:
        """The gradients; made when they are first asked for, which runs the model."""
        return BlockGradients(self.checkpoint, self.inputs, self.score.gradient, self._batch, self.heads)

    def samples(self, many: int, steps: int, share: float = 1.0) -> Iterator[Sample]:
        """A sample of so many items of the pool for each step, all if it has fewer.

        `share`: of the NLL in the loss. Below 1 they have their final hidden states in the dense model, in which the
        items of all steps are run first.
        """
        items, draw = self.pool.batch(self.checkpoint.device), torch.Generator().manual_seed(0)
        drawn = [torch.randperm(len(items), generator=draw)[:many] for _ in range(steps)]
        met = torch.cat(drawn).unique()  # type: ignore[no-untyped-call]
        dense = None
        if share < 1:
            with torch.inference_mode(False), torch.no_grad():
                parts = [items[met.to(self.checkpoint.device)]]
                [dense] = dense_final_states(self.of_blocks.replay, self._batch, parts, self.watch, "dense model")
        for chosen in drawn:
            states = None if dense is None else dense[torch.searchsorted(met, chosen)]
            yield Sample(items[chosen.to(self.checkpoint.device)], states, share)

    def cached(self, measure: Callable[[Path], Any], **own: Any) -> Any:
        """The numbers that `measure` finds, lists or tuples, from the cache if they were kept there.

        `own`: ingredients of its key: `dense`, SHA-256 of all that determines the dense model and the calibration
        windows, `targets`, the `levels` of the weights, and `constants`. `measure` gets a file for what it has found so
        far, which is removed at its end.
        """
        file = cache_dir("gradient") / f"{self._key(**own)}.json"

        said = "waiting for the descent of another process; if none is running, remove"
        with made_once(file, lambda lock: self.watch(Message(f"{said} {lock}"))):
            if file.is_file():
                return json.loads(file.read_text(encoding="utf-8"))
            numbers = measure(begun := file.with_suffix(".part"))
            try:
                write_atomically(file, json.dumps(numbers).encode())
                begun.unlink(missing_ok=True)
            except OSError as error:
                self.watch(Message(f"cache folder {file.parent}: {error}; the descent is kept in memory"))
        return numbers

    def _key(self, **own: Any) -> str:
        return key(
            "gradient",
            pool=self.pool.content,
            score=getattr(self.score, "content", type(self.score).__name__),
            batches=[self._batch.windows, self.heads.windows],
            **own,
        )


class DescentSteps:
    """The prices of each step so far, the ends reached by them as JSON, and the state of what measured the last prices.

    `file`: where they are kept. One that cannot be read counts as none.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.prices = list[Prices]()
        self.ends = list[Any]()
        self.state: Tensors = {}
        with suppress(OSError, SafetensorError, ValueError, TypeError, KeyError), safe_open(file, "pt") as stored:
            table = json.loads(stored.metadata()["steps"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            self.prices, self.ends, self.state = table["prices"], table["ends"], state

    def add(self, prices: Prices, state: Tensors) -> None:
        """Keeps one more step; without room on the disk it is not kept."""
        self.prices.append(prices)
        with suppress(OSError, SafetensorError), file_atomically(self._file) as temporary:
            save_file(state, temporary, {"steps": json.dumps({"prices": self.prices, "ends": self.ends})})


@dataclass(eq=False)
class Descent:
    """Descends by prices, whose steps draw their items from the pool of the gradients.

    `pricing`: makes what measures them; `levels`: what its weights are pruned by, as JSON.
    """

    gradients: CalibrationGradients
    pricing: Callable[[], Pricing]
    levels: Sequence[Any]
    share: float = 1.0  # of the NLL in the loss; the rest is KL from the dense model

    def ends(self, targets: Sequence[float], measured: str) -> Ends:
        """The end of the descent at each of these ascending targets, from the cache if possible.

        `measured`: SHA-256 of all that determines the statistics, such as model and calibration windows.
        """
        ends = self.gradients.cached(
            lambda file: self._descend(targets, file),
            dense=measured,
            targets=list(targets),
            levels=self.levels,
            constants=list(CONSTANTS),
        )
        return tuple(map(self._read, ends))

    def _read(self, end: Any) -> RowSparsities:
        """An end as `_descend` returns it, read from JSON."""
        return RowSparsities(tuple(map(tuple, end)))

    def _end(self, pricing: Pricing, end: LinearSparsities) -> Any:
        """An end that was just reached, as JSON."""
        return end

    def _descend(self, targets: Sequence[float], file: Path) -> list[Any]:
        """The ends, by way of the steps that an interrupted run has left in `file`."""
        gradients, watch = self.gradients, self.gradients.watch
        pricing, steps = self.pricing(), DescentSteps(file)
        total = steps_along(targets)
        samples = gradients.samples(windows_of_step(gradients.pool.positions, targets), total, self.share)
        watch(TrialStarted("gradient", None))
        if before := len(steps.prices):
            watch(Message(f"gradient: goes on after step {before} of {total}"))
            pricing.resume(steps.state)

        def prices_at(step: int, sparsities: LinearSparsities) -> Prices:
            sample = next(samples)
            if step >= before:
                watch(Step("step", step + 1, total))
                steps.add(pricing.prices(sparsities, sample), pricing.state())
            return steps.prices[step]

        for number, end in enumerate(descend(gradients.checkpoint.shapes, targets, prices_at)):
            if number == len(steps.ends):
                steps.ends.append(self._end(pricing, end))
        return steps.ends


class RowDescent(Descent):
    """The descent whose rows move too, by masks `places` of the lowest scores of each row."""

    def __init__(self, gradients: CalibrationGradients, places: Places, score: Score, loss: Loss) -> None:
        super().__init__(
            gradients,
            lambda: RowPricing(gradients.of_blocks, places),
            [score, "rows", DISTANCE, loss],
            NLL_SHARES[loss],
        )

    def _read(self, end: Any) -> RowSparsities:
        linears, offsets = end
        return RowSparsities(tuple(map(tuple, linears)), RowOffsets.read(offsets, self.gradients.checkpoint.shapes))

    def _end(self, pricing: Pricing, end: LinearSparsities) -> Any:
        assert isinstance(pricing, RowPricing)
        return end, pricing.offsets().stored()


def by_score(
    gradients: CalibrationGradients,
    score: Score,
    statistics: Sequence[BlockStatistics],
    group: int | None,
    rows: Loss | None,
) -> Descent:
    """The descent by masks of the lowest scores of each row, or group.

    `statistics`: of the blocks' inputs in the dense model, as norms or ranks; `rows`: rows move too, by this loss.
    """

    def places(index: int, linear: Linear, weight: Tensor) -> Tensor:
        own = statistics[index].get(linear.name) if score == "wanda" else None
        if isinstance(own, Ranks):
            return own.places
        if own is None:
            return by_magnitude(weight, group)
        return order_in_rows(Wanda.scores(weight, own), group)

    if rows:
        return RowDescent(gradients, places, score, rows)
    own = [score, *([] if group is None else [group])]
    return Descent(gradients, lambda: Pricing(gradients.of_blocks, ByPlaces(places)), own)


def by_pruner(gradients: CalibrationGradients, pruner: Pruner, statistics: Sequence[BlockStatistics]) -> Descent:
    """The descent by what a pruner makes of the weights; `statistics`: as it has prepared them."""
    levels = ByPruner(pruner, statistics.__getitem__, int(LEVEL_SHARE * host_memory()))
    return Descent(gradients, lambda: Pricing(gradients.of_blocks, levels), [repr(pruner), GRID])


def windows_of_step(positions: int, targets: Sequence[float]) -> int:
    """Number of items of a step, of so many positions each."""
    share = FEWER if len(targets) > 1 or targets[-1] < FEW_ZEROS else 1
    return max(WINDOWS // share, TOKENS // share // positions)


def by_magnitude(weight: Tensor, group: int | None) -> Tensor:
    """Places [out, in] of the magnitudes of a weight in the order in which its rows lose weights."""
    return order_in_rows(weight.abs().float(), group)


def bit_costs(
    gradients: CalibrationGradients,
    rounded: Rounded,
    measured: str,
    levels: Sequence[Any],
    of_outer: Callable[[], Sequence[Sequence[float]]] | None = None,
) -> Costs:
    """The costs of each linear at each width to which `rounded` rounds it, from the cache if possible.

    `measured`: SHA-256 of all that determines the dense model and the calibration windows, `levels`: what determines
    `rounded`. `of_outer`: one row more, of the matrices outside of the blocks.
    """

    def measure(_: Path) -> Costs:
        sample, watch = next(gradients.samples(items_of_costs(gradients.pool.positions), 1)), gradients.watch
        watch(TrialStarted("gradient", None))
        blocks, pricing = len(gradients.checkpoint.blocks), BitPricing(gradients.of_blocks, rounded)
        costs = pricing.costs(sample.items, lambda done: watch(Step("block", done, blocks)))
        return costs if of_outer is None else (*costs, of_outer())

    costs: Costs = gradients.cached(
        measure, dense=measured, targets=[], levels=levels, constants=[COST_TOKENS, COST_ITEMS]
    )
    return costs


def items_of_costs(positions: int) -> int:
    """Number of items that costs are measured on, of so many positions each."""
    return max(COST_ITEMS, COST_TOKENS // positions)
