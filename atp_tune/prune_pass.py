"""The pass over the blocks: measure inputs → prune → run on, one block at a time.

For block i = 0 … L-1, with H the hidden states that enter it (calibration windows):

    1. run the block dense on H and gather what the pruner wants to know of each linear's inputs
    2. prune each linear to the block's sparsity s_i
    3. H ← block_i(H) with the pruned weights

so that block i is measured with blocks 0 … i-1 already pruned (the papers' way). With statistics gathered once on the
dense model, step 1 is left out and only the few windows of the error curve are run on.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from atp_tune.batching import BatchSize
from atp_tune.checkpoint import Linear
from atp_tune.gathering import AllHeard, Gathering
from atp_tune.plan import Plan
from atp_tune.pruners import Pruner, Statistics, make_pruner
from atp_tune.replay import Replay

BlockStatistics = Mapping[str, Statistics]


@dataclass(frozen=True)
class PrunedBlock:
    """One block after pruning: all its tensors by name, zeros per linear, and what it cost."""

    index: int
    weights: dict[str, Tensor]
    zeros: dict[str, int]
    error: float  # ‖H - H_dense‖ / ‖H_dense‖ after this block, on the windows of the error curve
    seconds: dict[str, float]
    unheard: tuple[str, ...] = ()  # experts that got no token, and so were pruned by magnitude


@dataclass
class Pass:
    """The pass for one pruner: what it needs beside the plan and the hidden states that enter."""

    replay: Replay
    batch: BatchSize
    pruner: Pruner
    dense_states: list[Tensor]  # [L] hidden states [few, tokens, width] after each block of the dense model
    dense_statistics: list[BlockStatistics] | None = None

    def run(self, plan: Plan, hidden: Tensor) -> Iterator[PrunedBlock]:
        """Prunes block after block; `hidden` [windows, tokens, width] is overwritten as it moves on."""
        for index, linears in enumerate(self.replay.checkpoint.linears):
            timer = Timer()
            weights = self.replay.checkpoint.weights(index)
            statistics = self._statistics(index, weights, hidden)
            timer.lap("calibrate")
            sparsities = plan.of(index, len(linears))
            unheard = tuple(x.name for x in linears if is_unheard(x, statistics, self.pruner))
            weights, zeros = prune_block(linears, weights, statistics, self.pruner, sparsities)
            timer.lap("prune")
            advance(self.replay, self.batch, index, weights, hidden)
            error = relative_error(hidden, self.dense_states[index])
            timer.lap("calibrate")
            yield PrunedBlock(index, weights, zeros, error, timer.seconds, unheard)

    def _statistics(self, index: int, weights: dict[str, Tensor], hidden: Tensor) -> BlockStatistics:
        if self.dense_statistics is not None:
            return self.dense_statistics[index]
        if self.pruner.measures is None:
            return {}
        return measure(self.replay, self.batch, index, weights, hidden, self.pruner.measures)


class Timer:
    """Adds up the seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last lap for this phase."""
        now = perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def advance(replay: Replay, batch: BatchSize, index: int, weights: dict[str, Tensor], hidden: Tensor) -> None:
    """Replaces hidden states [windows, tokens, width] by those after block `index`, in place, batch by batch."""
    start = 0
    while start < len(hidden):

        def step(windows: int, start: int = start) -> int:
            hidden[start : start + windows] = replay.run(index, weights, hidden[start : start + windows])
            return windows

        start += batch.attempt(step)


def prune_block(
    linears: list[Linear],
    weights: dict[str, Tensor],
    statistics: BlockStatistics,
    pruner: Pruner,
    sparsities: tuple[float, ...],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A block's tensors with each linear pruned to its sparsity, and the number of zeros in each."""
    keys, zeros = {linear.key for linear in linears}, {}
    pruned = weights | {key: torch.empty_like(weights[key], memory_format=torch.contiguous_format) for key in keys}
    for linear, sparsity in zip(linears, sparsities, strict=True):
        dense, known = linear.matrix(weights[linear.key]), statistics.get(linear.name)
        rule = unmeasured(pruner) if is_unheard(linear, statistics, pruner) else pruner
        sparse = rule.prune(dense, sparsity, known)
        linear.matrix(pruned[linear.key]).copy_(sparse)
        zeros[linear.name] = int((sparse == 0).sum())
    return pruned, zeros


def is_unheard(linear: Linear, statistics: BlockStatistics, pruner: Pruner) -> bool:
    """Whether a pruner that measures has nothing of this linear: an expert that no token was sent to."""
    return pruner.measures is not None and linear.name not in statistics


def unmeasured(pruner: Pruner) -> Pruner:
    """What stands in for a pruner where there are no inputs: magnitude, in the same groups if the pruner has any."""
    group = getattr(pruner, "group", None)
    return make_pruner("magnitude", None if group is None else {"group": group})


def measure(
    replay: Replay,
    batch: BatchSize,
    index: int,
    weights: dict[str, Tensor],
    hidden: Tensor,
    kind: type[Statistics],
) -> BlockStatistics:
    """Statistics of the inputs of each linear of block `index`, by name, over all windows of hidden."""
    block = replay.checkpoint.blocks[index]

    def step(windows: int) -> BlockStatistics:
        gathering = Gathering(replay.checkpoint.linears[index], kind)
        with gathering.listening(block):
            for rows in torch.split(hidden, windows):
                gathering.start()
                with suppress(AllHeard):
                    replay.run(index, weights, rows)
        return gathering.result()

    return batch.attempt(step)


def relative_error(hidden: Tensor, dense: Tensor) -> float:
    """‖H - D‖ / ‖D‖ (Frobenius, float32) over the windows that dense [few, tokens, width] has."""
    reference = dense.to(hidden.device).float()
    difference = hidden[: len(dense)].float() - reference
    return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(reference))
