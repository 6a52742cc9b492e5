"""Measurements of the dense model on the calibration text, made once for all trials of a process."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from atp_tune.blocks.dense_metrics import (
    Cache,
    CachedStatistics,
    DenseMetrics,
    Priced,
    Ranked,
    can_rank,
    is_room,
    save_all,
)
from atp_tune.blocks.prune_pass import BlockStatistics, advance, embed, entering, measure_and_advance
from atp_tune.blocks.replay import AutoBatch, Replay
from atp_tune.cache import cache_dir
from atp_tune.cache_keys import key
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import arithmetic
from atp_tune.events import EventHandler, Message, Step
from atp_tune.inputs import Batch
from atp_tune.inputs.items import Items
from atp_tune.plugins import code_of
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.statistics import Hessian, Several
from atp_tune.scores.evaluation import Block, Passing

CURVE_TOKENS = 4096  # of the calibration text, for the error curve


class Measuring:
    """Stands for a pruner that needs a kind of statistics as they are."""

    def __init__(self, measures: type[Statistics]) -> None:
        self.measures = measures

    def __repr__(self) -> str:
        return "unprepared"

    def prepare(self, statistics: Statistics) -> None:
        """Does nothing."""


class DenseMeasurements:
    """Statistics of the linears' inputs, dense metrics for allocations, and hidden states for the error curve."""

    def __init__(
        self, replay: Replay, items: Items, calibration: Batch, batch: AutoBatch, model: str, watch: EventHandler
    ) -> None:
        """`items`: calibration windows; `calibration`: the same on the device; `model`: SHA-256 of the checkpoint."""
        self._replay = replay
        self._items = items
        self._calibration = calibration
        self._batch = batch
        self._model = model
        self._watch = watch
        self._statistics: dict[str, Sequence[BlockStatistics]] = {}
        self._ranked: dict[tuple[str, int | None], Ranked] = {}  # by statistics, and by the pattern's group
        self._metrics: Cache = {}

    def clear(self) -> None:
        """Frees all measurements."""
        for kept in (self._statistics, self._ranked, self._metrics):
            kept.clear()
        vars(self).pop("states", None)
        self._calibration = None

    def evidence(
        self,
        priced: Priced,
        priced_by: Callable[[str], str],
        by_rows: Callable[[str], bool],
        path: Sequence[float] = (),
    ) -> DenseMetrics:
        """The metrics that allocations need; each is measured once for all budgets.

        `priced`, `priced_by`, `by_rows`, `path`: of sparsities by prices, see `DenseMetrics`.
        """

        def statistics(kind: type[Statistics]) -> Sequence[BlockStatistics]:
            return self.statistics(Measuring(kind))

        checkpoint, own = self._replay.checkpoint, (priced, priced_by, by_rows, path)
        return DenseMetrics(checkpoint, statistics, self._metrics, self._step, *own)

    @cached_property
    def curve_windows(self) -> int:
        """Number of windows of the error curve: the first ones of the calibration text."""
        return min(len(self._items), max(1, CURVE_TOKENS // self._items.positions))

    @cached_property
    def states(self) -> list[Tensor]:
        """Hidden states [`curve_windows`, tokens, width] after each dense block, in host memory."""
        items = self._calibration[: self.curve_windows]
        hidden, states = embed(self._replay, self._batch, items), []
        tower = self._replay.checkpoint.tower_weights()
        for index, weights in dense_blocks(self._replay.checkpoint):
            hidden = entering(self._replay, self._batch, index, hidden, items, tower)
            hidden = advance(self._replay, self._batch, index, weights, hidden)
            states.append(hidden.cpu().clone())
        return states

    def statistics(self, pruner: Pruner | Measuring) -> Sequence[BlockStatistics]:
        """Statistics of every linear's inputs in the dense model, measured once for each kind and cached on disk."""
        kind = pruner.measures
        assert kind is not None
        name = self.key_of(pruner, kind)
        if name not in self._statistics:
            self._statistics[name] = self._read_or_measure(cache_dir("statistics") / name, pruner, kind)
        return self._statistics[name]

    def fast_statistics(self, pruner: Pruner) -> Sequence[BlockStatistics]:
        """The statistics, as ranks if the pruner can use ranks, which are faster."""
        found, kind, checkpoint = self.statistics(pruner), pruner.measures, self._replay.checkpoint
        assert kind is not None
        group = getattr(pruner, "group", None)
        name = self.key_of(pruner, kind), group
        if name not in self._ranked and can_rank(pruner, checkpoint):
            self._ranked[name] = Ranked(found, checkpoint, group)
        return self._ranked.get(name, found)

    def key_of(self, pruner: Pruner | Measuring, kind: type[Statistics]) -> str:
        """SHA-256 of everything that determines a pruner's statistics."""
        checkpoint = self._replay.checkpoint
        is_own = kind.__module__.startswith("atp_tune.")
        prepares = issubclass(kind, Hessian | Several) or not is_own  # the others are the same for all pruners
        return key(
            "statistics",
            model=self._model,
            tower=str(checkpoint.in_tower),
            items=self._items.content,
            kind=[kind.__name__, None if is_own else code_of(kind)],
            pruner=repr(getattr(pruner, "prepares", pruner)) if prepares else None,
            batch=min(self._batch.windows, len(self._items)),
            arithmetic=arithmetic(checkpoint.device, checkpoint.dtype),
        )

    def _read_or_measure(
        self, folder: Path, pruner: Pruner | Measuring, kind: type[Statistics]
    ) -> Sequence[BlockStatistics]:
        checkpoint = self._replay.checkpoint
        if not folder.is_dir():
            needed = sum(kind.bytes_for(x.in_features) for linears in checkpoint.linears for x in linears)
            if not is_room(folder.parent, needed):
                self._watch(Message(f"cache folder {folder.parent}: no room; dense statistics are kept in memory"))
                return list(self._measured(pruner, kind))
            try:
                save_all(folder, self._measured(pruner, kind))
            except OSError as error:
                self._watch(Message(f"cache folder {folder.parent}: {error}; dense statistics are kept in memory"))
                return list(self._measured(pruner, kind))
        return CachedStatistics(folder, kind, len(checkpoint.blocks), checkpoint.device)

    def _measured(self, pruner: Pruner | Measuring, kind: type[Statistics]) -> Iterator[BlockStatistics]:
        hidden = embed(self._replay, self._batch, self._calibration)
        tower = self._replay.checkpoint.tower_weights()
        for index, weights in dense_blocks(self._replay.checkpoint):
            hidden = entering(self._replay, self._batch, index, hidden, self._calibration, tower)
            found, hidden = measure_and_advance(self._replay, self._batch, index, weights, hidden, kind)
            for statistics in set(found.values()):
                pruner.prepare(statistics)
            yield found
            self._step(index + 1)

    def _step(self, done: int) -> None:
        self._watch(Step("measure", done, len(self._replay.checkpoint.blocks)))


def dense_blocks(checkpoint: Checkpoint) -> Iterator[Block]:
    """The dense model as blocks, in order."""
    return ((index, checkpoint.weights(index)) for index in range(len(checkpoint.blocks)))


def dense_final_states(
    replay: Replay, batch: AutoBatch, parts: Sequence[Batch], watch: EventHandler, phase: str = "evaluate"
) -> list[Tensor]:
    """Final hidden states [items, positions, width] of the dense model for each part, in host memory."""
    checkpoint, passing = replay.checkpoint, Passing(replay, batch, parts)
    for index, weights in dense_blocks(checkpoint):
        passing.block(index, weights)
        watch(Step(phase, index + 1, len(checkpoint.blocks)))
    return [states.cpu() for states in passing.states]
