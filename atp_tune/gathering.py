"""Listening to the inputs of a block's linears while the block runs."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from atp_tune.checkpoint import Linear
from atp_tune.errors import TrialError
from atp_tune.experts import expert_name, routed_inputs
from atp_tune.pruners import Statistics


class AllHeard(Exception):  # noqa: N818 - a signal, not an error
    """Every linear has its input: what the block would still compute is not wanted."""


class Gathering:
    """Statistics by linear, fed by forward pre-hooks; linears that read the same tensor share one object."""

    def __init__(self, linears: list[Linear], kind: type[Statistics]) -> None:
        self._linears = linears
        self._kind = kind
        self._by_name: dict[str, Statistics] = {}
        self._run: set[str] = set()
        self._heard: list[tuple[Tensor, Statistics]] = []
        self._count = 0

    def start(self) -> None:
        """Begins a new batch."""
        self._heard.clear()
        self._count = 0

    @contextmanager
    def listening(self, block: nn.Module) -> Iterator[None]:
        """While the body runs, the linears' inputs are gathered; `AllHeard` ends each forward early."""
        handles = [
            block.get_submodule(linear.name).register_forward_pre_hook(partial(self._hear, linear))
            for linear in self._linears
            if linear.expert is None
        ]
        for path, linears in self._mixtures().items():
            hook = partial(self._hear_experts, path, linears)
            handles.append(block.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            self._heard.clear()
            for handle in handles:
                handle.remove()

    def result(self) -> dict[str, Statistics]:
        """Statistics of each linear by name, but for experts that got no token; TrialError if one was never run."""
        silent = [linear.name for linear in self._linears if linear.name not in self._run]
        if silent:
            raise TrialError(f"linear {silent[0]} was not run by its block, so its inputs are not known")
        return self._by_name

    def _mixtures(self) -> dict[str, dict[str, Linear]]:
        """The experts' linears by name, for each path of a module that holds them."""
        found: dict[str, dict[str, Linear]] = {}
        for linear in self._linears:
            if linear.expert is not None:
                found.setdefault(linear.key.rpartition(".")[0], {})[linear.name] = linear
        return found

    def _hear(self, linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        known = next((statistics for tensor, statistics in self._heard if tensor is x), None)
        if known is None:
            known = self._take_in(linear, x)
            self._heard.append((x, known))
        self._by_name[linear.name] = known
        self._ran({linear.name})

    def _hear_experts(
        self, path: str, linears: dict[str, Linear], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        for weight, expert, x in routed_inputs(module, hidden, chosen):
            linear = linears[expert_name(path, weight, expert)]
            self._by_name[linear.name] = self._take_in(linear, x)
        self._ran(linears.keys())

    def _take_in(self, linear: Linear, x: Tensor) -> Statistics:
        """The linear's own statistics, with these inputs added."""
        statistics = self._by_name.get(linear.name) or self._kind(linear.in_features, x.device)
        statistics.add(x)
        return statistics

    def _ran(self, names: Collection[str]) -> None:
        self._run.update(names)
        self._count += len(names)
        if self._count == len(self._linears):
            raise AllHeard
