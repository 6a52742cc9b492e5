"""Prunes the linears of a block one after the other in a single pass, each measured with all earlier ones pruned.

The block runs on all batches of windows at once, each in a greenlet, which can be suspended:

    stop      each batch runs until it is about to multiply by the next linear
    measure   X of that linear ← its inputs in all batches
    prune     its weight, in place
    go on     each batch multiplies by the pruned weight, and runs to the next linear

Each token goes through each block once; measuring the dense block first takes a second pass. The activations of all
suspended batches must fit in memory: about 2 (width + inner width) numbers per calibration token in a gated MLP.

Source: the order of `true-sequential` in GPTQ's code (Frantar et al., ICLR 2023), which takes one pass per group of
linears.
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
    """Results of all runs; calls `prune` for each linear when all runs have reached it.

    Errors: TrialError if a linear is never reached, if runs reach linears in different orders, or if the model changes
    a setting of torch around a linear.
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
    """Runs batches to the same linear and suspends them there, one greenlet each."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._before = thread_state()
        self._greenlets = [greenlet(run) for run in runs]
        for batch in self._greenlets:
            batch.gr_context = copy_context()
        self.results: list[Tensor] = []

    def __enter__(self) -> "_Lockstep":
        return self

    def __exit__(self, *_: object) -> None:
        for batch in self._greenlets:  # ends suspended batches after an error
            if batch:
                batch.throw(GreenletExit)

    def next(self) -> Sequence[Linear] | None:
        """Runs all batches to their next linears, which are returned; None when all batches have ended."""
        found = [self._go_on(batch) for batch in self._greenlets]
        if all(batch.dead for batch in self._greenlets):
            self.results = found
            return None
        first: Sequence[Linear] = found[0]
        if any(batch.dead or stop != first for batch, stop in zip(self._greenlets, found, strict=True)):
            raise TrialError('batches meet the linears of a block in different orders; set statistics = "block"')
        return first

    def _go_on(self, batch: greenlet) -> Any:
        """Runs one batch to its next stop; TrialError if it has changed a setting of torch there.

        Such settings belong to the thread, not to the greenlet, so they would affect the other batches.
        """
        stop = batch.switch()
        if thread_state() != self._before:
            raise TrialError(
                "the model changes settings of torch, such as autocast, around a linear, which batches that stop there "
                'would share; set statistics = "block"'
            )
        return stop


def thread_state() -> tuple[object, ...]:
    """Settings of torch per thread that a model may change temporarily."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu", *([] if accelerator is None else [accelerator.type])]
    autocast = [(name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices]
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return *autocast, *modes, torch.get_default_device()
