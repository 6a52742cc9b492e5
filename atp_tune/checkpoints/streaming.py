"""Streams blocks to the compute device: the next block is copied while the current block computes.

A thread copies the blocks; on CUDA it uses its own stream. Trials request blocks in the order 0 … L-1, 0, …, gradients
in the order 0 … L-1, L-1, L-1, L-2, L-2, … 0, 0: after block i was delivered the thread copies block i+1, or i-1 if i+1
came before it, if at most one copy is in use. A copy counts until most of its bytes are freed, since a consumer may
keep some tensors; the last one is kept until another block is requested. Delivered tensors are never written to again.

On CUDA, memory is freed when Python deletes the tensor, while kernels may still read it. So an event is recorded in the
consumer's stream, and the thread waits for the event before it allocates memory for another block.
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

from atp_tune.checkpoints.devices import make_current

Tensors = dict[str, Tensor]
Mark = Any  # a torch.cuda.Event; None on devices where calls are synchronous
AHEAD = ("cuda", "cpu")  # devices on which a second thread may copy while the first computes


@dataclass(frozen=True)
class Wanted:
    """A request for a block, to be used in `stream` (None except on CUDA)."""

    index: int
    stream: Any
    answer: "Future[Tensors]" = field(default_factory=Future)


@dataclass(frozen=True)
class Freed:
    """A tensor of a copy was deleted; kernels that read it have finished when `mark` has."""

    copy: int
    bytes: int
    mark: Mark


@dataclass(frozen=True)
class Copied:
    """A copy on the device, complete when `ready` is; or the error of copying."""

    index: int
    tensors: Tensors
    ready: Mark = None
    error: BaseException | None = None


Requests = SimpleQueue[Wanted | Freed | None]  # its `put` is reentrant, as needed in finalizers


class Stream:
    """Delivers blocks as copies on a device; with `ahead` = False each is copied on request only."""

    def __init__(self, blocks: Sequence[Tensors], device: torch.device, ahead: bool = True) -> None:
        self._device = device
        self._requests: Requests = SimpleQueue()
        copier = Copier(blocks, device, ahead and device.type in AHEAD, self._requests)
        thread = Thread(target=copier.run, name="atp_tune blocks", daemon=True)  # holds no reference to self
        thread.start()
        weakref.finalize(self, _end, self._requests, thread)

    def get(self, index: int) -> Tensors:
        """The tensors of a block on the device, by name; raises the errors of the thread."""
        is_cuda = self._device.type == "cuda"
        wanted = Wanted(index, torch.cuda.current_stream(self._device) if is_cuda else None)
        self._requests.put(wanted)
        return wanted.answer.result()


def _end(requests: Requests, thread: Thread) -> None:
    requests.put(None)
    if thread is not current_thread():  # the garbage collector may run in the thread itself
        thread.join()


class Copier:
    """The copying thread; it shares no state, and gets messages by the queue."""

    def __init__(self, blocks: Sequence[Tensors], device: torch.device, ahead: bool, requests: Requests) -> None:
        self._blocks = blocks
        self._device = device
        self._ahead = ahead
        self._requests = requests
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: int | None = None
        self._waiting: Copied | None = None
        self._last: tuple[Copied, Any] | None = None  # what was delivered, and to be used in which stream
        self._held: dict[int, tuple[int, int]] = {}  # live and total bytes of each delivered copy
        self._marks: list[Mark] = []
        self._copies = 0

    def run(self) -> None:
        """Handles messages until None arrives."""
        make_current(self._device)  # of a new thread it is the first, on which a context would be opened
        while self._serve(self._requests.get()):  # no variable for messages, which would keep a block alive
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
        """Delivers the last or the waiting copy if it is the requested block, else makes a copy now."""
        before = -1 if self._last is None else self._last[0].index
        if self._last is not None and (before, self._last[1]) == (wanted.index, wanted.stream):
            wanted.answer.set_result(self._last[0].tensors)
            return
        self._last = None
        ready, self._waiting, self._next = self._waiting, None, None
        if ready is None or ready.index != wanted.index:
            ready = None  # frees the unused copy before the next is made
            ready = self._copy(wanted.index)
        if ready.error is not None:
            wanted.answer.set_exception(ready.error)
            return
        self._hand_over(ready, wanted.stream)
        self._last = ready, wanted.stream
        step = -1 if 0 < wanted.index == before - 1 else 1
        self._next = (wanted.index + step) % len(self._blocks)
        wanted.answer.set_result(ready.tensors)

    def _hand_over(self, copied: Copied, stream: Any) -> None:
        if stream is not None:
            stream.wait_event(copied.ready)
        self._copies += 1
        for tensor in copied.tensors.values():
            if stream is not None:
                tensor.record_stream(stream)
            gone = weakref.finalize(
                tensor.untyped_storage(), _freed, self._requests, self._copies, tensor.nbytes, stream
            )
            gone.atexit = False
        whole = sum(tensor.nbytes for tensor in copied.tensors.values())
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
        except BaseException as error:  # raised in the consumer; this thread goes on
            return Copied(index, {}, error=error)


def copy_to(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides; asynchronous from pinned memory to CUDA."""
    return torch.empty_like(tensor, device=device).copy_(tensor, non_blocking=device.type == "cuda")


def _freed(requests: Requests, copy: int, size: int, stream: Any) -> None:
    requests.put(Freed(copy, size, None if stream is None else stream.record_event()))
