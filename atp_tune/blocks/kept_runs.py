"""Runs of batches through blocks whose graphs are kept for their gradients, so that these are not run again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Run:
    """A batch that has gone through a block: leaves of a graph, states and weights by key, and the states after it."""

    entering: Tensor
    weights: dict[str, Tensor]
    leaving: Tensor


class KeptRuns:
    """Runs that wait for their gradients: the first batches of the first blocks, as many as `room` bytes hold."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._last = 0
        self._of_blocks: dict[int, dict[tuple[int, int], Run]] = {}

    @property
    def has_room(self) -> bool:
        """Whether there is room for one more, if it is as large as the last."""
        return self._room > self._last

    def add(self, index: int, start: int, run: Run) -> None:
        """Keeps the run of a batch through a block, whose first item is `start`; if it is too large, it is the last."""
        self._last = graph_bytes(run.leaving)
        if self._last <= self._room:
            self._of_blocks.setdefault(index, {})[start, len(run.entering)] = run
        self._room -= self._last

    def pop(self, index: int, start: int, items: int) -> Run | None:
        """The run of a batch; None if it is not kept. When batches have become smaller all are dropped."""
        runs = self._of_blocks.get(index, {})
        found = runs.pop((start, items), None)
        if found is None and runs:
            self._of_blocks.clear()
        return found


def graph_bytes(result: Tensor) -> int:
    """Bytes of the tensors that the graph of a result keeps for its gradients."""
    found, met, left = dict[int, int](), set[Any](), [result.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in met:
            continue
        met.add(node)
        storages = [tensor.untyped_storage() for tensor in _saved_by(node)]
        found |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        left += [after for after, _ in node.next_functions]
    return sum(found.values())


def _saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that a node of a graph keeps: `_saved_NAME` of PyTorch's own, `saved_tensors` of a model's."""
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            value = getattr(node, name)
            yield from (x for x in (value if isinstance(value, tuple | list) else (value,)) if isinstance(x, Tensor))
