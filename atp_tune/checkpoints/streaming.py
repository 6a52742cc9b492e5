"""Blocks on their way to the compute device: the next one is copied while the current one computes.

One thread copies, on CUDA on a stream of its own. The blocks are asked for in order, 0 … L-1 and again from 0; after
block i was handed out the thread copies i+1 as soon as there is room. At most two copies exist: a copy counts until
most of its bytes are freed (what a consumer keeps of it, norms say, is the consumer's), and where two are held already
nothing is copied ahead. What is handed out is never written to again.

On CUDA memory is freed when Python lets go of it, while kernels that were started may still read it. So the moment is
marked in the consumer's stream, and the thread waits for it before it takes memory for another block.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Mark = Any  # a torch.cuda.Event, or None where copies and kernels end before they return
AHEAD = ("cuda", "cpu")  # devices on which a second thread may copy while the first computes


@dataclass(frozen=True)
class Wanted:
    """The consumer asks for a block, which it will use in `stream` (None but on CUDA)."""

    index: int
    stream: Any
    answer: "Future[Tensors]" = field(default_factory=Future)


@dataclass(frozen=True)
class Freed:
    """The consumer let go of one tensor of a copy; kernels that read it are done when `mark` is."""

    copy: int
    bytes: int
    mark: Mark


@dataclass(frozen=True)
class Copied:
    """A copy on the device, whole when `ready` is; or the error that came in its place."""

    index: int
    tensors: Tensors
    ready: Mark = None
    error: BaseException | None = None


Requests = SimpleQueue[Wanted | Freed | None]  # its `put` may interrupt itself, as a callback of a weak reference does


class Stream:
    """Hands out blocks as copies on a device; `ahead` = False copies each only when it is asked for."""

    def __init__(self, blocks: Sequence[Tensors], device: torch.device, ahead: bool = True) -> None:
        self._device = device
        self._requests: Requests = SimpleQueue()
        copier = Copier(blocks, device, ahead and device.type in AHEAD, self._requests)
        thread = Thread(target=copier.run, name="atp_tune blocks", daemon=True)  # it knows nothing of this object
        thread.start()
        weakref.finalize(self, _end, self._requests, thread)

    def get(self, index: int) -> Tensors:
        """The tensors of a block on the device, by name; what went wrong in the thread is raised here as it was."""
        is_cuda = self._device.type == "cuda"
        wanted = Wanted(index, torch.cuda.current_stream(self._device) if is_cuda else None)
        self._requests.put(wanted)
        return wanted.answer.result()


def _end(requests: Requests, thread: Thread) -> None:
    requests.put(None)
    if thread is not current_thread():  # the collector of garbage may run in it
        thread.join()


class Copier:
    """The thread that copies: all that it knows is its own, others talk to it by the queue."""

    def __init__(self, blocks: Sequence[Tensors], device: torch.device, ahead: bool, requests: Requests) -> None:
        self._blocks = blocks
        self._device = device
        self._ahead = ahead
        self._requests = requests
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: int | None = None
        self._waiting: Copied | None = None
        self._held: dict[int, tuple[int, int]] = {}  # bytes that are alive, and that were, of copies handed out
        self._marks: list[Mark] = []
        self._copies = 0

    def run(self) -> None:
        """Serves until it is told to end."""
        while self._serve(self._requests.get()):  # no name here holds a message: it would keep a block alive
            self._copy_ahead()

    def _serve(self, message: Wanted | Freed | None) -> bool:
        if message is None:
            return False
        if isinstance(message, Freed):
            self._forget(message)
        else:
            self._answer(message)
        return True

    def _answer(self, wanted: Wanted) -> None:
        """Hands out the copy that waits, if it is the one that is wanted, or one that is made now."""
        ready, self._waiting, self._next = self._waiting, None, None
        if ready is None or ready.index != wanted.index:
            ready = None  # a copy that nobody wants is freed before another is made
            ready = self._copy(wanted.index)
        if ready.error is not None:
            wanted.answer.set_exception(ready.error)
            return
        self._hand_over(ready, wanted.stream)
        self._next = (wanted.index + 1) % len(self._blocks)
        wanted.answer.set_result(ready.tensors)

    def _hand_over(self, copied: Copied, stream: Any) -> None:
        if stream is not None:
            stream.wait_event(copied.ready)
        self._copies += 1
        for tensor in copied.tensors.values():
            if stream is not None:
                tensor.record_stream(stream)
            gone = weakref.finalize(
                tensor.untyped_storage(), _freed, self._requests, self._copies, _size(tensor), stream
            )
            gone.atexit = False
        whole = sum(map(_size, copied.tensors.values()))
        self._held[self._copies] = whole, whole

    def _forget(self, freed: Freed) -> None:
        if freed.mark is not None:
            self._marks.append(freed.mark)
        if freed.copy in self._held:
            alive, whole = self._held.pop(freed.copy)
            if 2 * (alive - freed.bytes) > whole:
                self._held[freed.copy] = alive - freed.bytes, whole

    def _copy_ahead(self) -> None:
        if self._ahead and self._next is not None and len(self._held) <= 1:
            self._waiting, self._next = self._copy(self._next), None

    def _copy(self, index: int) -> Copied:
        try:
            while self._marks:
                self._marks.pop().synchronize()
            with nullcontext() if self._side is None else torch.cuda.stream(self._side):
                tensors = {name: copy_to(self._device, tensor) for name, tensor in self._blocks[index].items()}
            return Copied(index, tensors, None if self._side is None else self._side.record_event())
        except BaseException as error:  # it is the consumer's, whatever it is: this thread goes on
            return Copied(index, {}, error=error)


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy with the same strides in new memory of the device; from pinned memory on CUDA the call returns at once."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=device.type == "cuda")


def _freed(requests: Requests, copy: int, size: int, stream: Any) -> None:
    requests.put(Freed(copy, size, None if stream is None else stream.record_event()))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
