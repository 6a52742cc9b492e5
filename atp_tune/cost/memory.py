"""What a study needs of memory: bytes at the peak on host and device, and what does not fit. Needs no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from atp_tune.checkpoints.headers import ModelSizes
from atp_tune.checkpoints.offload import Free, Offload
from atp_tune.frozen import FrozenModel

GIB = 1024**3


@dataclass(frozen=True)
class Tokens:
    """Tokens of each text, and those of the error curve."""

    calibration: int
    validation: int
    test: int
    curve: int


class Memory(FrozenModel):
    """Bytes at the peak, and bytes that can be had. `host`: while trials run; `loading`: while the model is loaded,
    with mapped files, which the system can drop; `device` is null where it is the host's own.
    """

    host: int
    loading: int
    device: int | None
    host_free: int
    device_free: int | None


@dataclass(frozen=True)
class Bytes:
    """What lies in memory: weights in all, of the blocks, of the largest block, and as the files hold them; whether
    loading converts them; hidden states of calibration and search; dense states; work; the process itself; what all
    calibration windows hold in the middle of a block, where they stand before each linear.
    """

    total: int
    blocks: int
    largest: int
    files: int
    converts: bool
    calibration: int
    validation: int
    dense: int
    work: int
    process: int
    standing: int = 0

    @property
    def states(self) -> int:
        """Hidden states at their peak: those of calibration exist twice for a moment, beside those of the search."""
        return max(self.validation + 2 * self.calibration + self.standing, 2 * self.validation)


def peaks(held: Bytes, offload: Offload, free: Free, apart: bool) -> Memory:
    """The peaks; `apart`: the compute device has memory of its own, else its part is the host's too."""
    weights = held.total if offload == "none" else held.total - held.blocks + min(held.blocks, 2 * held.largest)
    device = weights + held.states + held.work
    waiting = held.blocks if offload == "cpu" else 0
    return Memory(
        host=held.process + waiting + held.dense + (0 if apart else device),
        loading=held.process + (held.total if held.converts else 0) + held.files,
        device=device if free.bounded else None,
        host_free=free.host,
        device_free=free.device if free.bounded else None,
    )


def bytes_of(sizes: ModelSizes, itemsize: int, width: int, tokens: Tokens, work: int, process: int) -> Bytes:
    """The bytes of a model computed with `itemsize` bytes per value, whose hidden states have `width` values."""
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
    """What does not fit, and what to change, a line each; `windows`: of the calibration text."""
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
    check("host", needed.host - held.process, needed.host_free, on_host)  # the process is there already
    if held.converts:
        check("host", held.total, needed.host_free, lambda _: f"loading converts the weights: {converts}")
    return tuple(found)


def _fewer(held: Bytes, over: int, windows: int) -> str:
    """The number of calibration windows with which it would fit, if there is one."""
    each = (2 * held.calibration + held.standing) / windows
    fitting = windows - math.ceil(over / each) if each else 0
    return f"set texts.calibration.nsamples = {fitting}" if fitting > 0 else ""
