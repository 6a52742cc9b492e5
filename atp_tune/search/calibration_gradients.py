"""Gradients of the loss on calibration items, and results by them that are kept in the cache."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.gradients import ACTIVATIONS, BlockGradients, Sample
from atp_tune.cache import cache_dir, made_once, sha256_of_json, write_atomically
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.events import EventHandler, Message
from atp_tune.inputs import Batch, InputKind, Items
from atp_tune.scores import Score
from atp_tune.search.scoring import dense_final_states
from atp_tune.storage.process_identity import versions


class CalibrationGradients:
    """Gradients for one checkpoint and calibration text; `pool`: the items that are drawn from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        inputs: InputKind[Items],
        score: Score,
        pool: Items,
        heads: AutoBatch,
        watch: EventHandler,
    ) -> None:
        self.checkpoint = checkpoint
        self.pool = pool
        self.watch = watch
        self._inputs = inputs
        self._score = score
        self._heads = heads
        needed = ACTIVATIONS * block_bytes(checkpoint)
        self._batch = AutoBatch(checkpoint.device, pool.positions, needed, lambda text: watch(Message(text)))

    @cached_property
    def of_blocks(self) -> BlockGradients:
        """The gradients; made when they are first asked for, which runs the model."""
        return BlockGradients(self.checkpoint, self._inputs, self._score.gradient, self._batch, self._heads)

    def drawing(self, many: int, with_dense: bool = False) -> Callable[[], Sample]:
        """A function that draws so many items of the pool at each call; all if it has fewer.

        `with_dense`: and their final hidden states in the dense model.
        """
        items, draw = self._items, torch.Generator().manual_seed(0)

        def drawn() -> Sample:
            chosen = torch.randperm(len(items), generator=draw)[: min(len(items), many)]
            dense = self._dense_states[chosen] if with_dense else None
            return Sample(items[chosen.to(self.checkpoint.device)], dense)

        return drawn

    @cached_property
    def _items(self) -> Batch:
        """The items of the pool, on the compute device."""
        return self.pool.batch(self.checkpoint.device)

    @cached_property
    def _dense_states(self) -> Tensor:
        """Final hidden states [items, positions, width] of the pool in the dense model, in host memory."""
        with torch.inference_mode(False), torch.no_grad():
            replay = self.of_blocks.replay
            [states] = dense_final_states(replay, self._batch, [self._items], self.watch, "dense model")
            return states

    def kept(self, measured: str, own: Sequence[Any], constants: Sequence[Any], measure: Callable[[Path], Any]) -> Any:
        """What `measure` finds, lists or tuples of numbers, from the cache if it was kept there.

        `measured`: SHA-256 of all that determines the dense model and the calibration windows; `own`, `constants`: what
        else the result depends on. `measure` gets a file for what it has found so far, which is removed at its end.
        """
        file = cache_dir("prices") / f"{self._key(measured, own, constants)}.json"

        def wait(lock: Path) -> None:
            self.watch(Message(f"waiting for the prices of another process; if none is running, remove {lock}"))

        with made_once(file, wait):
            if file.is_file():
                return json.loads(file.read_text(encoding="utf-8"))
            found = measure(begun := file.with_suffix(".part"))
            try:
                write_atomically(file, json.dumps(found).encode())
                begun.unlink(missing_ok=True)
            except OSError as error:
                self.watch(Message(f"cache folder {file.parent}: {error}; prices are kept in memory"))
        return found

    def _key(self, measured: str, own: Sequence[Any], constants: Sequence[Any]) -> str:
        score = getattr(self._score, "content", type(self._score).__name__)
        facts = [measured, self.pool.content, score, *own, self._batch.windows, self._heads.windows, *constants]
        return sha256_of_json([*facts, versions()])
