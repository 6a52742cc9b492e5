"""The memory of a study: peak bytes on host and device, and which of them do not fit. Needs no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from atp_tune.checkpoints.files import Free, ModelSizes, Offload, states
from atp_tune.frozen import FrozenModel

GIB = 1024**3


@dataclass(frozen=True)
class Tokens:
    """Number of tokens of each text, and of the error curve."""

    calibration: int
    validation: int
    test: int
    curve: int


class Memory(FrozenModel):
    """Peak and free bytes.

    `host`: while trials run. `loading`: while the model is loaded, including mapped files, which the system can evict.
    `device`: null if the device has no memory limit of its own.
    """

    host: int
    loading: int
    device: int | None
    host_free: int
    device_free: int | None


@dataclass(frozen=True)
class Bytes:
    """The parts of the peak, in bytes."""

    total: int  # all weights
    blocks: int  # weights of the blocks
    largest: int  # weights of the largest block
    files: int  # weights as stored in the files
    converts: bool  # loading converts the weights
    calibration: int  # hidden states of the calibration text
    validation: int  # hidden states of the validation or test text, whichever is larger
    dense: int  # states of the dense model, in host memory
    work: int
    process: int
    sequential: int = 0  # activations of all calibration windows within a block, where linears are pruned in order

    @property
    def states(self) -> int:
        """Peak of the hidden states."""
        return states(self.calibration, self.validation, self.sequential)


def peaks(held: Bytes, offload: Offload, free: Free, has_own_memory: bool) -> Memory:
    """The peaks on host and device; `has_own_memory`: the device's memory is not the host's."""
    weights = held.total if offload == "none" else held.total - held.blocks + min(held.blocks, 2 * held.largest)
    device = weights + held.states + held.work
    waiting = held.blocks if offload == "cpu" else 0
    return Memory(
        host=held.process + waiting + held.dense + (0 if has_own_memory else device),
        loading=held.process + (held.total if held.converts else 0) + held.files,
        device=device if free.bounded else None,
        host_free=free.host,
        device_free=free.device if free.bounded else None,
    )


def bytes_of(sizes: ModelSizes, itemsize: int, width: int, tokens: Tokens, work: int, process: int) -> Bytes:
    """The parts for a model with `itemsize` bytes per value and hidden states of `width` values."""
    state = width * itemsize
    return Bytes(
        total=sizes.total * itemsize,
        blocks=sum(sizes.blocks) * itemsize,
        largest=max(sizes.blocks) * itemsize,
        files=sizes.bytes,
        converts=sizes.bytes != sizes.total * itemsize,
        calibration=tokens.calibration * state,
        validation=max(tokens.validation, tokens.test) * state,
        dense=len(sizes.blocks) * tokens.curve * state,
        work=work,
        process=process,
    )


def problems(held: Bytes, needed: Memory, offload: Offload, windows: int) -> tuple[str, ...]:
    """A line for each peak that does not fit, with the key to change; `windows`: of the calibration text."""
    found = []

    def check(where: str, size: int, free: int | None, advice: Callable[[int], str]) -> None:
        if free is not None and size > free:
            sizes = f"{size / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free"
            found.append(f"{where} memory: {sizes}; {advice(size - free)}")

    def on_device(over: int) -> str:
        if offload == "none" and held.blocks - 2 * held.largest >= over:
            return 'set model.offload = "auto"'
        return _fewer(held, over, windows) or "take shorter windows or a larger device"

    def on_host(over: int) -> str:
        if offload == "cpu" and held.blocks >= over:
            return 'set model.offload = "disk"'
        return _fewer(held, over, windows) or "free some, or take a smaller model"

    converts = "give the model in the number format that it is computed in, or set model.dtype to its own"
    check("device", needed.device or 0, needed.device_free, on_device)
    check("host", needed.host - held.process, needed.host_free, on_host)  # the process holds its memory already
    if held.converts:
        check("host", held.total, needed.host_free, lambda _: f"loading converts the weights: {converts}")
    return tuple(found)


def _fewer(held: Bytes, over: int, windows: int) -> str:
    """The advice to take fewer calibration windows; "" if that is not enough."""
    each = (2 * held.calibration + held.sequential) / windows
    fitting = windows - math.ceil(over / each) if each else 0
    return f"set texts.calibration.nsamples = {fitting}" if fitting > 0 else ""
