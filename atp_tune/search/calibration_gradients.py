"""Gradients of the loss on calibration items, and results by them that are kept in the cache."""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.blocks.batching import AutoBatch, block_bytes
from atp_tune.blocks.gradients import ACTIVATIONS, BlockGradients, Sample
from atp_tune.cache import cache_dir, made_once, write_atomically
from atp_tune.cache_keys import key
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.events import EventHandler, Message
from atp_tune.inputs import Batch, InputKind, Items
from atp_tune.scores import Score
from atp_tune.search.scoring import dense_final_states


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

    def samples(self, many: int, steps: int, share: float = 1.0) -> Iterator[Sample]:
        """A sample of so many items of the pool for each step, all if it has fewer.

        `share`: of the NLL in the loss. Below 1 they have their final hidden states in the dense model, in which the
        items of all steps are run first.
        """
        items, draw = self.pool.batch(self.checkpoint.device), torch.Generator().manual_seed(0)
        drawn = [torch.randperm(len(items), generator=draw)[:many] for _ in range(steps)]
        met = torch.cat(drawn).unique()  # type: ignore[no-untyped-call]
        dense = self._dense_states(items[met.to(self.checkpoint.device)]) if share < 1 else None
        for chosen in drawn:
            states = None if dense is None else dense[torch.searchsorted(met, chosen)]
            yield Sample(items[chosen.to(self.checkpoint.device)], states, share)

    def _dense_states(self, items: Batch) -> Tensor:
        """Final hidden states [items, positions, width] in the dense model, in host memory."""
        with torch.inference_mode(False), torch.no_grad():
            [states] = dense_final_states(self.of_blocks.replay, self._batch, [items], self.watch, "dense model")
            return states

    def kept(self, measure: Callable[[Path], Any], **own: Any) -> Any:
        """What `measure` finds, lists or tuples of numbers, from the cache if it was kept there.

        `own`: ingredients of its key: `dense`, SHA-256 of all that determines the dense model and the calibration
        windows, `targets`, the `levels` of the weights, and `constants`. `measure` gets a file for what it has found so
        far, which is removed at its end.
        """
        file = cache_dir("prices") / f"{self._key(**own)}.json"

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

    def _key(self, **own: Any) -> str:
        score = getattr(self._score, "content", type(self._score).__name__)
        batches = [self._batch.windows, self._heads.windows]
        return key("prices", pool=self.pool.content, score=score, batches=batches, **own)
