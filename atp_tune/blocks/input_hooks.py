"""Hooks that collect statistics of the inputs of a block's linears while the block runs.

`prune_sequentially` prunes the linears one after the other in a single pass, each measured with all earlier ones
pruned.

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any
from weakref import ref

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from atp_tune.checkpoints.blocks import Linear, expert_inputs, expert_name, expert_weights
from atp_tune.errors import TrialError
from atp_tune.pruners import Statistics

OnInputs = Callable[[Sequence[Linear]], None]


class AllInputsSeen(Exception):  # noqa: N818 - a signal, not an error
    """All linears have their inputs, so the block need not go on."""


class InputCollector:
    """Statistics by linear, collected by forward pre-hooks; linears with the same input tensor share one object.

    `on_inputs` is called with one linear, or with the experts of a mixture, after their inputs were added and before
    they are multiplied by the weight.
    """

    def __init__(self, linears: list[Linear], kind: type[Statistics], on_inputs: OnInputs) -> None:
        self._linears = linears
        self._kind = kind
        self._on_inputs = on_inputs
        self._by_name: dict[str, Statistics] = {}
        self._run: set[str] = set()
        self._by_tensor: dict[int, tuple[ref[Tensor], Statistics]] = {}  # by id of the input tensor

    @contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Collects inputs while the context is active."""
        handles = [
            block.get_submodule(linear.name).register_forward_pre_hook(partial(self._on_input, linear))
            for linear in self._linears
            if linear.expert is None
        ]
        for path, linears in self._mixtures().items():
            hook = partial(self._on_expert_input, path, linears)
            handles.append(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, linear: Linear) -> Statistics | None:
        """The statistics of a linear so far; None for an expert without tokens."""
        return self._by_name.get(linear.name)

    def result(self) -> dict[str, Statistics]:
        """Statistics by name, without those of experts without tokens; TrialError if a linear was not run."""
        never_run = [linear.name for linear in self._linears if linear.name not in self._run]
        if never_run:
            raise TrialError(f"linear {never_run[0]} was not run by its block, so its inputs are not known")
        return self._by_name

    def _mixtures(self) -> dict[str, dict[str, Linear]]:
        """The linears of experts by name, for the path of each experts module."""
        found: dict[str, dict[str, Linear]] = {}
        for linear in self._linears:
            if linear.expert is not None:
                found.setdefault(linear.module, {})[linear.name] = linear
        return found

    def _on_input(self, linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        tensor, statistics = self._by_tensor.get(id(x), (None, None))
        if statistics is None or tensor is None or tensor() is not x:
            statistics = self._take_in(linear, x)
            self._by_tensor[id(x)] = ref(x), statistics
        self._by_name[linear.name] = statistics
        self._ran([linear])

    def _on_expert_input(
        self, path: str, linears: dict[str, Linear], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        for weight in expert_weights(
            module
        ):  # in "sequential", W_up is pruned before the inputs of W_down are computed
            for expert, x in expert_inputs(module, weight, hidden, chosen):
                linear = linears[expert_name(path, weight, expert)]
                self._by_name[linear.name] = self._take_in(linear, x)
            self._ran([linear for linear in linears.values() if linear.key == f"{path}.{weight}"])

    def _take_in(self, linear: Linear, x: Tensor) -> Statistics:
        """Adds inputs to the statistics of a linear, and returns them."""
        statistics = self._by_name.get(linear.name) or self._kind(linear.in_features, x.device)
        statistics.add(x)
        return statistics

    def _ran(self, linears: Sequence[Linear]) -> None:
        self._run.update(linear.name for linear in linears)
        self._on_inputs(linears)


def stop_when_all_seen(linears: Sequence[Linear]) -> OnInputs:
    """A callback that raises `AllInputsSeen` when all linears have their inputs, in each run of a block."""
    missing = {linear.name for linear in linears}

    def on_inputs(found: Sequence[Linear]) -> None:
        missing.difference_update(linear.name for linear in found)
        if not missing:
            missing.update(linear.name for linear in linears)
            raise AllInputsSeen

    return on_inputs


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
