"""One pass over the calibration text for each block: a linear is pruned when the whole text stands before it.

The block runs on all batches of windows at once, each in a greenlet, which is a call that can stop in its middle:

    stop      every batch runs until it is about to multiply by the next linear
    measure   X of that linear ← its inputs in all batches
    prune     its weight, in place
    go on     every batch multiplies by the pruned weight, and runs to the linear after it

So a linear is measured with all that comes before it pruned, within its block too, and a token goes through each block
once, where measuring the dense block first takes a second pass. What every batch holds in its middle must fit beside
the block: about 2 (width + inner width) numbers for each calibration token of a gated MLP.

Source: GPTQ's code measures in this order under `true-sequential` (Frantar et al., ICLR 2023), with a pass for each
group of linears.
"""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from atp_tune.blocks.input_hooks import InputCollector
from atp_tune.checkpoints.linears import Linear
from atp_tune.errors import TrialError
from atp_tune.pruners import Statistics

Run = Callable[[], Tensor]
Prune = Callable[[Linear, Statistics | None], None]


def prune_sequentially(
    block: nn.Module, linears: list[Linear], kind: type[Statistics], runs: Sequence[Run], prune: Prune
) -> list[Tensor]:
    """Results of the runs, batch by batch, with each linear pruned by `prune` while all of them stand before it.

    TrialError if a linear was never reached, if the batches do not meet the linears in one order, or if the model has
    changed a setting of torch for the time of a linear.
    """
    collector = InputCollector(linears, kind, getcurrent().switch)
    pruned: set[str] = set()
    with collector.attached(block), _Lockstep(runs) as batches:
        while (stop := batches.next()) is not None:
            for linear in stop:
                if linear.name not in pruned:
                    prune(linear, collector.of(linear))
                    pruned.add(linear.name)
    collector.result()
    return batches.results


class _Lockstep:
    """Batches that run to the same linear and stop there, one greenlet each."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._before = thread_state()
        self._greenlets = [greenlet(run) for run in runs]
        for batch in self._greenlets:
            batch.gr_context = copy_context()
        self.results: list[Tensor] = []

    def __enter__(self) -> "_Lockstep":
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._greenlets:  # where one failed, the others are left in their middle
            if batch:
                batch.throw(GreenletExit)

    def next(self) -> Sequence[Linear] | None:
        """The linears before which all batches stand now; None when all have ended."""
        found = [self._go_on(batch) for batch in self._greenlets]
        if all(batch.dead for batch in self._greenlets):
            self.results = found
            return None
        first: Sequence[Linear] = found[0]
        if any(batch.dead or stop != first for batch, stop in zip(self._greenlets, found, strict=True)):
            raise TrialError('batches meet the linears of a block in different orders; set statistics = "block"')
        return first

    def _go_on(self, batch: greenlet) -> Any:
        """Lets one batch run to where it stops; TrialError if it stops inside a setting of torch that it has changed.

        Such settings belong to the thread, not to the greenlet: the other batches would be computed with them too.
        """
        stop = batch.switch()
        if thread_state() != self._before:
            raise TrialError(
                "the model changes settings of torch, such as autocast, around a linear, which batches that stop there "
                'would share; set statistics = "block"'
            )
        return stop


def thread_state() -> tuple[object, ...]:
    """The settings of torch that a model's code can change for a while and that hold for all that the thread does."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu", *([] if accelerator is None else [accelerator.type])]
    autocast = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return *autocast, *modes, torch.get_default_device()
