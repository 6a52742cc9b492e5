"""Batch size in windows: chosen from free memory, halved when memory runs out.

The batch size affects rounding of the hidden states, and so near-ties between scores, which at high sparsity change the
perplexity by about 1 % (docs/log.md). So sizes are powers of two, which rarely change with free memory.

For the same reason the size is stored in the study: all trials start with the size of the first trial, on any machine.
A trial that runs out of memory goes on with half the size, and its record tells so; the next trial starts with the size
of the study again, since the shortage may be temporary. If it is not, each trial has one failed step.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory, is_out_of_memory, release_memory
from atp_tune.errors import TrialError
from atp_tune.events import Notify

T = TypeVar("T")
SHARE = 0.3  # share of free memory for the activations of a batch
TOKENS = {"cpu": 2048}  # per batch; more is not faster
ELSEWHERE = 32768  # the same on other devices


class AutoBatch:
    """Windows per batch, from free memory; a step that runs out of memory is repeated with half as many.

    `notify` gets a line the first time in each trial.
    """

    def __init__(self, device: torch.device, tokens: int, bytes_per_token: int, notify: Notify) -> None:
        self._device = device
        self._bytes = tokens * bytes_per_token
        fast = TOKENS.get(device.type, ELSEWHERE) // tokens
        most = max(1, min(self._fitting(SHARE), fast))
        self.windows = 1 << (most.bit_length() - 1)
        self._notify = notify
        self._is_notified = False

    def begin(self, windows: int) -> None:
        """Starts a trial with the size of its study; on a CPU the size is first halved until it fits.

        A GPU reports that memory ran out, but on a CPU the system kills the process or swaps.
        """
        self.windows, self._is_notified = windows, False
        while self._device.type == "cpu" and self.windows > max(1, self._fitting(1)):
            self._halve()

    def _fitting(self, share: float) -> int:
        return int(share * free_memory(self._device) / self._bytes)

    def run(self, step: Callable[[int], T]) -> T:
        """Result of `step(windows)`; TrialError if a single window does not fit."""
        while True:
            try:
                return step(self.windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve()

    def over(self, count: int, step: Callable[[slice], T]) -> list[T]:
        """Results of `step(rows)` for consecutive slices of `count` windows, each slice a batch of `run`."""
        results: list[T] = []
        start = 0
        while start < count:

            def run_batch(windows: int, start: int = start) -> T:
                return step(slice(start, start + windows))

            results.append(self.run(run_batch))
            start += self.windows
        return results

    def _halve(self) -> None:
        if self.windows == 1:
            way = ", or set PYTORCH_ALLOC_CONF=expandable_segments:True" * (self._device.type == "cuda")
            raise TrialError(f"out of memory with one window at a time; use shorter windows or a larger device{way}")
        self.windows //= 2
        release_memory()
        if not self._is_notified:
            self._notify(f"memory ran out: going on with {self.windows} windows at a time")
            self._is_notified = True


def once_more(work: Callable[[], T]) -> T:
    """Result of some work, which is done again with memory released if it runs out."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()  # outside of the handler, whose error keeps tensors alive
    return work()


def block_bytes(checkpoint: Checkpoint) -> int:
    """Estimated bytes per token in a block: twice the inputs and outputs of all its linears."""
    met = max(sum(_widths(checkpoint, linears).values()) for linears in checkpoint.linears)
    return 2 * met * checkpoint.dtype.itemsize


def held_bytes(checkpoint: Checkpoint) -> int:
    """Estimated bytes per token of a suspended block: twice the input and output of its widest linear."""
    widest = max(max(_widths(checkpoint, linears).values()) for linears in checkpoint.linears)
    return 2 * widest * checkpoint.dtype.itemsize


def _widths(checkpoint: Checkpoint, linears: list[Linear]) -> dict[str, int]:
    """Inputs plus outputs per token of each weight tensor; experts count as often as a token chooses them."""
    chosen = int(getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None) or 1)
    return {x.key: (x.in_features + x.out_features) * (1 if x.expert is None else chosen) for x in linears}
