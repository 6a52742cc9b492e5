"""What a study will cost: tokens, seconds and memory, from sizes and from the rates of a short probe. Needs no torch.

N calibration tokens, E search tokens, R report tokens, C tokens of the error curve. A trial sends through every block

    block         N to listen to inputs, N to run on, E to evaluate
    sequential    N to listen and run on at once, E to evaluate
    dense         C to run on, E to evaluate; N twice, once for all trials
    screening     a part of E to evaluate; N twice, once for all trials

The document (`atp_tune.plan/1`) is published: keys are added under the same number, never renamed or removed.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from atp_tune.checkpoints.headers import Sizes
from atp_tune.checkpoints.residency import Free, Residency
from atp_tune.frozen import FrozenModel

FORMAT: Literal["atp_tune.plan/1"] = "atp_tune.plan/1"
GIB = 1024**3


@dataclass(frozen=True)
class Tokens:
    """Tokens of each text, and those of the error curve."""

    calibration: int
    search: int
    report: int
    curve: int


class Passes(FrozenModel):
    """Tokens that one trial sends through all blocks: `listen` for statistics, `run` pruned, `evaluate` on a text."""

    listen: int
    run: int
    evaluate: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.listen + self.run + self.evaluate


def passes(statistics: str, measures: bool, tokens: Tokens, evaluated: int) -> Passes:
    """What a trial sends through the blocks; `measures`: its pruner wants statistics."""
    if not measures or statistics == "dense":
        return Passes(listen=0, run=tokens.curve, evaluate=evaluated)
    listen = tokens.calibration if statistics == "block" else 0
    return Passes(listen=listen, run=tokens.calibration, evaluate=evaluated)


@dataclass(frozen=True)
class PrunerRate:
    """Seconds of a pruner in one block: for each token that runs on, with listening to it, and to prune."""

    calibrate: float
    prune: float


@dataclass(frozen=True)
class Rates:
    """What a probe has measured, in seconds: loading; one block per token of each text, and per token of what is
    measured once on the dense model; embedding and head per token; a block's way to the device; each pruner.
    `work`: bytes taken at most beside weights and states.
    """

    load: float
    run: dict[str, float]
    dense: float
    ends: float
    fetch: float
    pruners: dict[str, PrunerRate]
    work: int


class Seconds(FrozenModel):
    """Seconds of one trial by phase, as its record will have them."""

    calibrate: float
    prune: float
    evaluate: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.calibrate + self.prune + self.evaluate


def trial_seconds(rates: Rates, pruner: str, cost: Passes, blocks: int, role: str = "search") -> Seconds:
    """One trial, evaluated on the text of that role. Where blocks are copied, the slower of both sets the pace."""
    own = rates.pruners[pruner]
    calibrate = cost.run * own.calibrate
    evaluate = cost.evaluate * rates.run[role]
    stall = max(0.0, rates.fetch - calibrate - own.prune - evaluate)
    return Seconds(
        calibrate=blocks * (calibrate + stall),
        prune=blocks * own.prune,
        evaluate=blocks * evaluate + cost.evaluate * rates.ends,
    )


def dense_seconds(rates: Rates, tokens: int, blocks: int, role: str) -> float:
    """The dense model on a text."""
    return blocks * max(rates.fetch, tokens * rates.run[role]) + tokens * rates.ends


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
    search: int
    dense: int
    work: int
    process: int
    standing: int = 0

    @property
    def states(self) -> int:
        """Hidden states at their peak: those of calibration exist twice for a moment, beside those of the search."""
        return max(self.search + 2 * self.calibration + self.standing, 2 * self.search)


def memory(held: Bytes, residency: Residency, free: Free, apart: bool) -> Memory:
    """The peaks; `apart`: the compute device has memory of its own, else its part is the host's too."""
    weights = held.total if residency == "device" else held.total - held.blocks + min(held.blocks, 2 * held.largest)
    device = weights + held.states + held.work
    waiting = held.blocks if residency == "host" else 0
    return Memory(
        host=held.process + waiting + held.dense + (0 if apart else device),
        loading=held.process + (held.total if held.converts else 0) + held.files,
        device=device if free.bounded else None,
        host_free=free.host,
        device_free=free.device if free.bounded else None,
    )


class Weights(FrozenModel):
    """Bytes of the weights as they are computed, and where they will lie."""

    bytes: int
    blocks: int
    largest_block: int
    residency: Residency


class Trial(FrozenModel):
    """One trial of a pruner, in the study or in its screening; seconds are null where nothing could be measured."""

    what: Literal["trial", "screening"] = "trial"
    pruner: str
    tokens: Passes
    seconds: Seconds | None


class Whole(FrozenModel):
    """The whole study: its total of trials (null where it is not known), those done, and those of the screening before
    it; seconds of all and of what is left, with loading, the dense model, the screening, the report text, and other
    draws of the calibration text. A study that settles may end before all of that.
    """

    trials: int | None
    done: int
    screened: int = 0
    settles: bool = False
    tokens: int | None
    seconds: float | None
    seconds_left: float | None


class Forecast(FrozenModel):
    """What a study will cost, and what stands in its way (`problems`, a line each)."""

    format: Literal["atp_tune.plan/1"] = FORMAT
    study: str
    device: str
    dtype: str
    weights: Weights
    memory: Memory
    trial: tuple[Trial, ...]
    whole: Whole
    problems: tuple[str, ...] = ()


def problems(held: Bytes, needed: Memory, residency: Residency, windows: int) -> tuple[str, ...]:
    """What does not fit, and what to change, a line each; `windows`: of the calibration text."""
    found = []
    if needed.device is not None and needed.device_free is not None and needed.device > needed.device_free:
        advice = _advice(held, residency, needed.device - needed.device_free, windows)
        found.append(_missing("device", needed.device, needed.device_free, advice))
    own = needed.host - held.process  # the process is there already
    if own > needed.host_free:
        found.append(_missing("host", own, needed.host_free, _host_advice(held, residency, own, needed, windows)))
    if held.converts and held.total > needed.host_free:
        advice = "give the model in the number format that it is computed in, or set model.dtype to its own"
        found.append(_missing("host", held.total, needed.host_free, f"loading converts the weights: {advice}"))
    return tuple(found)


def _missing(where: str, needed: int, free: int, advice: str) -> str:
    return f"{where} memory: {needed / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free; {advice}"


def _advice(held: Bytes, residency: Residency, over: int, windows: int) -> str:
    if residency == "device" and held.blocks - 2 * held.largest >= over:
        return 'set model.residency = "auto"'
    return _fewer(held, over, windows) or "take shorter windows or a larger device"


def _host_advice(held: Bytes, residency: Residency, own: int, needed: Memory, windows: int) -> str:
    over = own - needed.host_free
    if residency == "host" and held.blocks >= over:
        return 'set model.residency = "disk"'
    return _fewer(held, over, windows) or "free some, or take a smaller model"


def _fewer(held: Bytes, over: int, windows: int) -> str:
    """The number of calibration windows with which it would fit, if there is one."""
    each = (2 * held.calibration + held.standing) / windows
    fitting = windows - math.ceil(over / each) if each else 0
    return f"set texts.calibration.windows = {fitting}" if fitting > 0 else ""


@dataclass(frozen=True)
class Screening:
    """What comes before a study: its trials and those done, tokens that each evaluates, and tokens sent through the
    dense blocks to listen and to run on, once for all.
    """

    trials: int
    done: int
    evaluated: int
    once: int

    @property
    def cost(self) -> Passes:
        """What one of its trials sends through the blocks."""
        return Passes(listen=0, run=0, evaluate=self.evaluated)

    @property
    def tokens(self) -> int:
        """Tokens through the blocks in all, the dense model's among them."""
        return (self.trials + 1) * self.evaluated + 2 * self.once

    def seconds(self, rates: Rates, pruners: Iterable[str], blocks: int) -> tuple[float, float]:
        """Seconds of all of it, and of what is left."""
        each = _mean([trial_seconds(rates, pruner, self.cost, blocks).total for pruner in pruners])
        before = blocks * self.once * rates.dense + dense_seconds(rates, self.evaluated, blocks, "search")
        left = max(0, self.trials - self.done)
        return before + self.trials * each, (0 if self.done else before) + left * each


@dataclass(frozen=True)
class Drawn:
    """What other draws of the calibration text add: plans that are measured again, on the text of that role, and tokens
    sent through the dense blocks to listen and to run on.
    """

    plans: int
    role: Literal["search", "report"]
    once: int

    def evaluated(self, tokens: Tokens) -> int:
        """Tokens that each evaluates."""
        return tokens.report if self.role == "report" else tokens.search

    def seconds(self, rates: Rates, costs: dict[str, Passes], tokens: Tokens, blocks: int) -> float:
        """Seconds of all of it."""
        evaluated = self.evaluated(tokens)
        each = _mean(_again(rates, costs, evaluated, blocks, self.role))
        return self.plans * each + blocks * self.once * rates.dense


def whole(
    rates: Rates | None,
    trials: int | None,
    done: int,
    costs: dict[str, Passes],
    tokens: Tokens,
    blocks: int,
    once: int,
    rows: int,
    drawn: Drawn = Drawn(0, "report", 0),
) -> Whole:
    """The study in all. Trials are shared out evenly over the pruners; none is taken to end early.

    `once`: tokens sent through the dense blocks to listen and to run on, once for all trials; `rows`: plans that are
    measured on the report text (of the dense model once more), 0 where the search text reports; `drawn`: what other
    draws of the calibration text add.
    """
    if trials is None:
        return Whole(trials=None, done=done, tokens=None, seconds=None, seconds_left=None)
    sent = _mean([cost.total for cost in costs.values()])
    calibrated = _mean([cost.total - cost.evaluate for cost in costs.values()])
    reported = rows * (calibrated + tokens.report) + (tokens.report if rows else 0)
    redrawn = drawn.plans * (calibrated + drawn.evaluated(tokens)) + 2 * drawn.once
    through = round(trials * sent + tokens.search + tokens.curve + 2 * once + reported + redrawn)
    if rates is None:
        return Whole(trials=trials, done=done, tokens=through, seconds=None, seconds_left=None)
    each = _mean([trial_seconds(rates, pruner, cost, blocks).total for pruner, cost in costs.items()])
    before = rates.load + blocks * (tokens.curve * rates.run["calibration"] + once * rates.dense)
    dense = dense_seconds(rates, tokens.search, blocks, "search")
    after = _report_seconds(rates, costs, tokens, blocks, rows) + drawn.seconds(rates, costs, tokens, blocks)
    left = 0.0 if done >= trials else before + (0 if done else dense) + (trials - done) * each + after
    seconds = before + dense + trials * each + after
    return Whole(trials=trials, done=done, tokens=through, seconds=seconds, seconds_left=left)


def screened(found: Whole, screening: Screening, rates: Rates | None, pruners: Iterable[str], blocks: int) -> Whole:
    """The study with its screening before it."""
    more: dict[str, float] = {"screened": screening.trials}
    if found.tokens is not None:
        more["tokens"] = found.tokens + screening.tokens
    if rates is not None and found.seconds is not None and found.seconds_left is not None:
        seconds, left = screening.seconds(rates, pruners, blocks)
        more |= {"seconds": found.seconds + seconds, "seconds_left": found.seconds_left + left}
    return found.model_copy(update=more)


def _report_seconds(rates: Rates, costs: dict[str, Passes], tokens: Tokens, blocks: int, rows: int) -> float:
    if not rows:
        return 0.0
    again = _again(rates, costs, tokens.report, blocks, "report")
    return dense_seconds(rates, tokens.report, blocks, "report") + rows * _mean(again)


def _again(rates: Rates, costs: dict[str, Passes], evaluated: int, blocks: int, role: str) -> list[float]:
    """Seconds of a plan of each pruner, evaluated on so many tokens of a text."""
    return [
        trial_seconds(rates, pruner, cost.model_copy(update={"evaluate": evaluated}), blocks, role).total
        for pruner, cost in costs.items()
    ]


def _mean(values: "list[int] | list[float]") -> float:
    return sum(values) / len(values)


def bytes_of(sizes: Sizes, itemsize: int, width: int, tokens: Tokens, work: int, process: int) -> Bytes:
    """The bytes of a model computed with `itemsize` bytes per value, whose hidden states have `width` values."""
    state = width * itemsize
    return Bytes(
        total=sizes.total * itemsize,
        blocks=sum(sizes.blocks) * itemsize,
        largest=max(sizes.blocks) * itemsize,
        files=sizes.bytes,
        converts=sizes.bytes != sizes.total * itemsize,
        calibration=tokens.calibration * state,
        search=max(tokens.search, tokens.report) * state,
        dense=len(sizes.blocks) * tokens.curve * state,
        work=work,
        process=process,
    )
