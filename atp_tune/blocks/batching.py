"""How many windows go through the model at a time: sized from free memory, halved when memory runs out.

Sizes are powers of two, so that a little more or less free memory changes nothing: the order of sums in a batch
decides the last bits of the hidden states, and at high sparsity those decide near-ties between scores and so, block
after block, about 1 % of perplexity (docs/log.md).

For the same reason the sizes are a fact of the study: all its trials begin with those of its first one, wherever they
run. A trial that runs out of memory goes on with half, and its record says so; the next one begins with the study's
size again, since memory that another program took for a moment must not change all later trials. Where memory is short
for good each trial pays for that with a step that fails.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory, is_out_of_memory, release_memory
from atp_tune.checkpoints.linears import Linear
from atp_tune.errors import TrialError

T = TypeVar("T")
Note = Callable[[str], None]
SHARE = 0.3  # of free memory for one batch's activations
TOKENS = {"cpu": 2048}  # per batch: more does not run faster (elsewhere ELSEWHERE)
ELSEWHERE = 32768


class AutoBatch:
    """Windows per batch, found from free memory; a step that runs out of memory is run again with half as many.

    The first time in a trial a note says so.
    """

    def __init__(self, device: torch.device, tokens: int, bytes_per_token: int, note: Note) -> None:
        self._device = device
        self._bytes = tokens * bytes_per_token
        fast = TOKENS.get(device.type, ELSEWHERE) // tokens
        most = max(1, min(self._fitting(SHARE), fast))
        self.windows = 1 << (most.bit_length() - 1)
        self._note = note
        self._said = False

    def begin(self, windows: int) -> None:
        """Starts a trial with the size that its study has, halved until it fits where too much ends the process.

        A GPU says that memory ran out; a CPU's system ends whoever asked for too much, or swaps.
        """
        self.windows, self._said = windows, False
        while self._device.type == "cpu" and self.windows > max(1, self._fitting(1)):
            self._halve()

    def _fitting(self, share: float) -> int:
        return int(share * free_memory(self._device) / self._bytes)

    def run(self, step: Callable[[int], T]) -> T:
        """Result of `step(windows)`; TrialError where not even one window fits."""
        while True:
            try:
                return step(self.windows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve()

    def _halve(self) -> None:
        if self.windows == 1:
            raise TrialError("out of memory with one window at a time; use shorter windows or a larger device")
        self.windows //= 2
        release_memory()
        if not self._said:
            self._note(f"memory ran out: going on with {self.windows} windows at a time")
            self._said = True


def block_bytes(checkpoint: Checkpoint) -> int:
    """Rough bytes of a token in a block: input and output of every linear that it meets, twice over."""
    met = max(sum(_widths(checkpoint, linears).values()) for linears in checkpoint.linears)
    return 2 * met * checkpoint.dtype.itemsize


def held_bytes(checkpoint: Checkpoint) -> int:
    """Rough bytes of a token held in the middle of a block: input and output of the widest linear, twice over."""
    widest = max(max(_widths(checkpoint, linears).values()) for linears in checkpoint.linears)
    return 2 * widest * checkpoint.dtype.itemsize


def _widths(checkpoint: Checkpoint, linears: list[Linear]) -> dict[str, int]:
    """Inputs and outputs of each tensor of linears that a token meets."""
    chosen = int(getattr(checkpoint.config.get_text_config(), "num_experts_per_tok", None) or 1)
    return {x.key: (x.in_features + x.out_features) * (1 if x.expert is None else chosen) for x in linears}
