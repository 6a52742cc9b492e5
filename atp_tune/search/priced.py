"""Sparsities by prices: the descent of `allocations.prices` on the calibration text, once per path and score.

The result is kept in the cache by everything that determines it, so that later runs and other studies need no descent.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.allocations import LinearSparsities
from atp_tune.allocations.budget import Score as RankedBy
from atp_tune.allocations.prices import (
    AT_LOWEST,
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
from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.gradients import ACTIVATIONS, BlockGradients
from atp_tune.blocks.pricing import BAND, Pricing
from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.cache import cache_dir, made_once, sha256_of_json, write_atomically
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.linears import Linear
from atp_tune.events import EventHandler, Message, Step, TrialStarted
from atp_tune.inputs import InputKind, Items
from atp_tune.pruners.selection import ranks
from atp_tune.pruners.wanda import Ranks, Wanda
from atp_tune.scores import Score
from atp_tune.storage.process_identity import versions

POOL = 32768  # tokens of the calibration text that the windows of all steps are drawn from
TOKENS, WINDOWS = 2048, 4  # of a step: so many tokens, but at least so many windows
ALONG = 2  # times as few of both along a path of several targets, whose steps are twice as many
PASSES = 4  # forward passes that a gradient costs: one to keep the states, one again in each block, two backward
CONSTANTS = (STEPS, AT_LOWEST, FURTHER, KEPT, LARGEST, FIRST, LAST, LIMITS, BAND, POOL, TOKENS, ALONG, WINDOWS)

Ends = tuple[LinearSparsities, ...]


class Descent:
    """Descends by prices for one checkpoint and calibration text.

    `pool`: the items that steps draw from; `statistics`: of a block's inputs in the dense model, as norms or ranks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: InputKind[Items],
        score: Score,
        pool: Items,
        statistics: Callable[[int], BlockStatistics],
        heads: AutoBatch,
        watch: EventHandler,
    ) -> None:
        self._checkpoint = checkpoint
        self._inputs = inputs
        self._score = score
        self._pool = pool
        self._statistics = statistics
        self._watch = watch
        needed = ACTIVATIONS * block_bytes(checkpoint)
        self._batch = AutoBatch(checkpoint.device, pool.positions, needed, lambda text: watch(Message(text)))
        self._heads = heads

    def ends(self, targets: Sequence[float], score: RankedBy, measured: str) -> Ends:
        """The end of the descent at each of these ascending targets, from the cache if possible.

        `measured`: SHA-256 of all that determines the statistics, such as model and calibration windows.
        """
        found = kept(self._key(targets, score, measured), lambda: self._descend(targets, score), self._watch)
        return tuple(tuple(tuple(row) for row in end) for end in found)

    def _descend(self, targets: Sequence[float], score: RankedBy) -> Ends:
        places = self._by_wanda if score == "wanda" else by_magnitude
        gradients = (self._checkpoint, self._inputs, self._score.gradient, self._batch, self._heads)
        pricing = Pricing(BlockGradients(*gradients), places)
        items = self._pool.batch(self._checkpoint.device)
        many = min(len(items), windows_of_step(self._pool.positions, targets))
        draw = torch.Generator().manual_seed(0)
        self._watch(TrialStarted("prices", None))

        def prices_at(step: int, sparsities: LinearSparsities) -> Prices:
            self._watch(Step("step", step + 1, steps_along(targets)))
            chosen = torch.randperm(len(items), generator=draw)[:many].to(self._checkpoint.device)
            return pricing.prices(sparsities, items[chosen])

        return descend(self._checkpoint.shapes, targets, prices_at)

    def _by_wanda(self, index: int, linear: Linear, weight: Tensor) -> Tensor:
        known = self._statistics(index).get(linear.name)
        if isinstance(known, Ranks):
            return known.places
        return by_magnitude(index, linear, weight) if known is None else ranks(Wanda.scores(weight, known))

    def _key(self, targets: Sequence[float], score: RankedBy, measured: str) -> str:
        batches = self._batch.windows, self._heads.windows
        facts = [
            measured,
            self._pool.content,
            getattr(self._score, "content", type(self._score).__name__),
            list(targets),
            score,
            *batches,
        ]
        return sha256_of_json([*facts, list(CONSTANTS), versions()])


def kept(key: str, measure: Callable[[], Any], watch: EventHandler) -> Any:
    """What `measure` finds, lists or tuples of numbers, from the cache if it was kept there under this key."""
    file = cache_dir("prices") / f"{key}.json"

    def wait(lock: Path) -> None:
        watch(Message(f"waiting for the prices of another process; if none is running, remove {lock}"))

    with made_once(file, wait):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        found = measure()
        try:
            write_atomically(file, json.dumps(found).encode())
        except OSError as error:
            watch(Message(f"cache folder {file.parent}: {error}; prices are kept in memory"))
    return found


def windows_of_step(positions: int, targets: Sequence[float]) -> int:
    """Number of items of a step, of so many positions each."""
    share = ALONG if len(targets) > 1 else 1
    return max(WINDOWS // share, TOKENS // share // positions)


def by_magnitude(index: int, linear: Linear, weight: Tensor) -> Tensor:
    """Places [out, in] of the magnitudes of a weight in its rows."""
    return ranks(weight.abs().float())
