"""What a study will cost: tokens, seconds and memory, from sizes and from the rates of a short probe. Needs no torch.

N calibration tokens, E search tokens, R report tokens, C tokens of the error curve. A trial sends through every block

    block         N to listen to inputs, N to run on, E to evaluate
    sequential    N to listen and run on at once, E to evaluate
    dense         C to run on, E to evaluate; N twice, once for all trials
    screening     a part of E to evaluate; N twice, once for all trials

The document (`atp_tune.plan/2`) is published: keys are added under the same number, never renamed or removed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from atp_tune.checkpoints.offload import Offload
from atp_tune.cost.memory import Memory, Tokens
from atp_tune.frozen import FrozenModel

FORMAT: Literal["atp_tune.plan/2"] = "atp_tune.plan/2"


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
class ProbeRates:
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


def trial_seconds(rates: ProbeRates, pruner: str, cost: Passes, blocks: int, role: str = "validation") -> Seconds:
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


def dense_seconds(rates: ProbeRates, tokens: int, blocks: int, role: str) -> float:
    """The dense model on a text."""
    return blocks * max(rates.fetch, tokens * rates.run[role]) + tokens * rates.ends


class Weights(FrozenModel):
    """Bytes of the weights as they are computed, and where they will lie."""

    bytes: int
    blocks: int
    largest_block: int
    offload: Offload


class TrialCost(FrozenModel):
    """One trial of a pruner, in the study or in its screening; seconds are null where nothing could be measured."""

    what: Literal["trial", "screening"] = "trial"
    pruner: str
    tokens: Passes
    seconds: Seconds | None


class StudyCost(FrozenModel):
    """The whole study: its total of trials (null where it is not known), those done, and those of the screening before
    it; seconds of all and of what is left, with loading, the dense model, the screening, the test text, and other
    draws of the calibration text. A study that settles may end before all of that.
    """

    trials: int | None
    done: int
    screened: int = 0
    early_termination: bool = False
    tokens: int | None
    seconds: float | None
    seconds_left: float | None


class Forecast(FrozenModel):
    """What a study will cost, and what stands in its way (`problems`, a line each)."""

    format: Literal["atp_tune.plan/2"] = FORMAT
    study: str
    device: str
    dtype: str
    weights: Weights
    memory: Memory
    trial: tuple[TrialCost, ...]
    whole: StudyCost
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScreeningCost:
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

    def seconds(self, rates: ProbeRates, pruners: Iterable[str], blocks: int) -> tuple[float, float]:
        """Seconds of all of it, and of what is left."""
        each = _mean([trial_seconds(rates, pruner, self.cost, blocks).total for pruner in pruners])
        before = blocks * self.once * rates.dense + dense_seconds(rates, self.evaluated, blocks, "validation")
        left = max(0, self.trials - self.done)
        return before + self.trials * each, (0 if self.done else before) + left * each


@dataclass(frozen=True)
class DrawsCost:
    """What other draws of the calibration text add: plans that are measured again, on the text of that role, and tokens
    sent through the dense blocks to listen and to run on.
    """

    plans: int
    role: Literal["validation", "test"]
    once: int

    def evaluated(self, tokens: Tokens) -> int:
        """Tokens that each evaluates."""
        return tokens.test if self.role == "test" else tokens.validation

    def seconds(self, rates: ProbeRates, costs: dict[str, Passes], tokens: Tokens, blocks: int) -> float:
        """Seconds of all of it."""
        evaluated = self.evaluated(tokens)
        each = _mean(_again(rates, costs, evaluated, blocks, self.role))
        return self.plans * each + blocks * self.once * rates.dense


def whole(
    rates: ProbeRates | None,
    trials: int | None,
    done: int,
    costs: dict[str, Passes],
    tokens: Tokens,
    blocks: int,
    once: int,
    rows: int,
    drawn: DrawsCost = DrawsCost(0, "test", 0),
) -> StudyCost:
    """The study in all. Trials are shared out evenly over the pruners; none is taken to end early.

    `once`: tokens sent through the dense blocks to listen and to run on, once for all trials; `rows`: plans that are
    measured on the test text (of the dense model once more), 0 where the validation text reports; `drawn`: what other
    draws of the calibration text add.
    """
    if trials is None:
        return StudyCost(trials=None, done=done, tokens=None, seconds=None, seconds_left=None)
    sent = _mean([cost.total for cost in costs.values()])
    calibrated = _mean([cost.total - cost.evaluate for cost in costs.values()])
    reported = rows * (calibrated + tokens.test) + (tokens.test if rows else 0)
    redrawn = drawn.plans * (calibrated + drawn.evaluated(tokens)) + 2 * drawn.once
    through = round(trials * sent + tokens.validation + tokens.curve + 2 * once + reported + redrawn)
    if rates is None:
        return StudyCost(trials=trials, done=done, tokens=through, seconds=None, seconds_left=None)
    each = _mean([trial_seconds(rates, pruner, cost, blocks).total for pruner, cost in costs.items()])
    before = rates.load + blocks * (tokens.curve * rates.run["calibration"] + once * rates.dense)
    dense = dense_seconds(rates, tokens.validation, blocks, "validation")
    after = _report_seconds(rates, costs, tokens, blocks, rows) + drawn.seconds(rates, costs, tokens, blocks)
    left = 0.0 if done >= trials else before + (0 if done else dense) + (trials - done) * each + after
    seconds = before + dense + trials * each + after
    return StudyCost(trials=trials, done=done, tokens=through, seconds=seconds, seconds_left=left)


def screened(
    found: StudyCost, screening: ScreeningCost, rates: ProbeRates | None, pruners: Iterable[str], blocks: int
) -> StudyCost:
    """The study with its screening before it."""
    more: dict[str, float] = {"screened": screening.trials}
    if found.tokens is not None:
        more["tokens"] = found.tokens + screening.tokens
    if rates is not None and found.seconds is not None and found.seconds_left is not None:
        seconds, left = screening.seconds(rates, pruners, blocks)
        more |= {"seconds": found.seconds + seconds, "seconds_left": found.seconds_left + left}
    return found.model_copy(update=more)


def _report_seconds(rates: ProbeRates, costs: dict[str, Passes], tokens: Tokens, blocks: int, rows: int) -> float:
    if not rows:
        return 0.0
    again = _again(rates, costs, tokens.test, blocks, "test")
    return dense_seconds(rates, tokens.test, blocks, "test") + rows * _mean(again)


def _again(rates: ProbeRates, costs: dict[str, Passes], evaluated: int, blocks: int, role: str) -> list[float]:
    """Seconds of a plan of each pruner, evaluated on so many tokens of a text."""
    return [
        trial_seconds(rates, pruner, cost.model_copy(update={"evaluate": evaluated}), blocks, role).total
        for pruner, cost in costs.items()
    ]


def _mean(values: "list[int] | list[float]") -> float:
    return sum(values) / len(values)
