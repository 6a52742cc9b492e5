"""Hooks that collect statistics of the inputs of a block's linears while the block runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import ref

from torch import Tensor, nn

from atp_tune.checkpoints.experts import expert_inputs, expert_name, expert_weights
from atp_tune.checkpoints.linears import Linear
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
