"""The cost of a study in tokens and seconds, from its sizes and the rates of a short probe. Needs no torch.

With N calibration tokens, E validation tokens and C tokens of the error curve, a trial sends through every block

    block         N to measure statistics, N through the pruned block, E to evaluate
    sequential    N to measure statistics and through the pruned block at once, E to evaluate
    dense         C through the pruned block, E to evaluate; once for all trials 2 N through the dense block
    screening     a part of E to evaluate; once for all trials 2 N through the dense block

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
    """Tokens that one trial sends through all blocks: `listen` measures statistics, `run` is calibration, pruned."""

    listen: int
    run: int
    evaluate: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.listen + self.run + self.evaluate


def passes(statistics: str, measures: bool, tokens: Tokens, evaluated: int) -> Passes:
    """The passes of a trial; `measures`: its pruner needs statistics."""
    if not measures or statistics == "dense":
        return Passes(listen=0, run=tokens.curve, evaluate=evaluated)
    listen = tokens.calibration if statistics == "block" else 0
    return Passes(listen=listen, run=tokens.calibration, evaluate=evaluated)


@dataclass(frozen=True)
class PrunerRate:
    """Seconds of a pruner in one block: `calibrate` per token, with its statistics, and `prune` in all."""

    calibrate: float
    prune: float


@dataclass(frozen=True)
class ProbeRates:
    """The measurements of a probe, in seconds."""

    load: float
    run: dict[str, float]  # per token in one block, by text
    dense: float  # per token in one block, to measure statistics of the dense model
    ends: float  # per token in embedding and head
    fetch: float  # to copy one block to the device
    pruners: dict[str, PrunerRate]
    work: int  # peak bytes beside weights and states


class Seconds(FrozenModel):
    """Seconds of one trial by phase, as in its attribute `seconds`."""

    calibrate: float
    prune: float
    evaluate: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.calibrate + self.prune + self.evaluate


def trial_seconds(rates: ProbeRates, pruner: str, cost: Passes, blocks: int, role: str = "validation") -> Seconds:
    """Seconds of one trial, evaluated on the text of this role; copying blocks counts where slower than computing."""
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
    """Seconds of the dense model on a text."""
    return blocks * max(rates.fetch, tokens * rates.run[role]) + tokens * rates.ends


class Weights(FrozenModel):
    """Bytes of the weights in the dtype of the computation, and their offload."""

    bytes: int
    blocks: int
    largest_block: int
    offload: Offload


class TrialCost(FrozenModel):
    """One trial of a pruner, in the study or in its screening; seconds are null without a probe."""

    what: Literal["trial", "screening"] = "trial"
    pruner: str
    tokens: Passes
    seconds: Seconds | None


class StudyCost(FrozenModel):
    """The whole study: total (null if unknown), done and screening trials, and tokens and seconds of everything.

    That is trials, loading, dense model, screening, test text, draws of the calibration text, and, in seconds alone,
    continuations and the speed of the best plan. Early termination,
    which is also the end of a search for the sparsest plan within a limit, can only lower it. `without_tasks`: each
    trial also answers the tasks of `limit.min_accuracy`, which are not in it. `descents`, `training`: seconds of it for
    descents by prices, and for training the best plan, if it is trained; null without them, or without a probe.
    """

    trials: int | None
    done: int
    screened: int = 0
    early_termination: bool = False
    without_tasks: bool = False
    tokens: int | None
    seconds: float | None
    seconds_left: float | None
    descents: float | None = None
    training: float | None = None


class Forecast(FrozenModel):
    """The cost of a study; `problems`: a line for each obstacle."""

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
    """The screening of a study; `evaluated`: tokens per trial; `once`: calibration tokens of all dense statistics."""

    trials: int
    done: int
    evaluated: int
    once: int

    @property
    def cost(self) -> Passes:
        """The passes of one of its trials."""
        return Passes(listen=0, run=0, evaluate=self.evaluated)

    @property
    def tokens(self) -> int:
        """Tokens through the blocks, with those of the dense model."""
        return (self.trials + 1) * self.evaluated + 2 * self.once

    def seconds(self, rates: ProbeRates, pruners: Iterable[str], blocks: int) -> tuple[float, float]:
        """Seconds in all, and seconds left."""
        each = _mean([trial_seconds(rates, pruner, self.cost, blocks).total for pruner in pruners])
        before = blocks * self.once * rates.dense + dense_seconds(rates, self.evaluated, blocks, "validation")
        left = max(0, self.trials - self.done)
        return before + self.trials * each, (0 if self.done else before) + left * each


@dataclass(frozen=True)
class DrawsCost:
    """The cost of other draws of the calibration text: `plans` to measure on the text of `role`; `once`: calibration
    tokens of all dense statistics, and those of descents.
    """

    plans: int
    role: Literal["validation", "test"]
    once: int

    def evaluated(self, tokens: Tokens) -> int:
        """Tokens per plan."""
        return tokens.test if self.role == "test" else tokens.validation

    def seconds(self, rates: ProbeRates, costs: dict[str, Passes], tokens: Tokens, blocks: int) -> float:
        """Seconds in all."""
        each = _plan_seconds(rates, costs, self.evaluated(tokens), blocks, self.role)
        return self.plans * each + blocks * self.once * rates.dense


def whole(
    rates: ProbeRates | None,
    trials: int | None,
    done: int,
    costs: dict[str, Passes],
    tokens: Tokens,
    blocks: int,
    once: int,
    rows: int | None,
    drawn: DrawsCost = DrawsCost(0, "test", 0),
) -> StudyCost:
    """The cost of a study without its screening, with as many trials of each pruner and none stopped early.

    `once`: calibration tokens of all dense statistics. `rows`: plans pruned again for the test text; None if there is
    no such text.
    """
    if trials is None:
        return StudyCost(trials=None, done=done, tokens=None, seconds=None, seconds_left=None)
    sent = _mean([cost.total for cost in costs.values()])
    calibrated = _mean([cost.total - cost.evaluate for cost in costs.values()])
    reported = 0 if rows is None else rows * (calibrated + tokens.test) + tokens.test
    redrawn = drawn.plans * (calibrated + drawn.evaluated(tokens)) + 2 * drawn.once
    through = round(trials * sent + tokens.validation + tokens.curve + 2 * once + reported + redrawn)
    if rates is None:
        return StudyCost(trials=trials, done=done, tokens=through, seconds=None, seconds_left=None)
    each = _mean([trial_seconds(rates, pruner, cost, blocks).total for pruner, cost in costs.items()])
    before = rates.load + blocks * (tokens.curve * rates.run["calibration"] + once * rates.dense)
    dense = dense_seconds(rates, tokens.validation, blocks, "validation")
    after = 0.0
    if rows is not None:
        each_report = _plan_seconds(rates, costs, tokens.test, blocks, "test")
        after = dense_seconds(rates, tokens.test, blocks, "test") + rows * each_report
    after += drawn.seconds(rates, costs, tokens, blocks)
    left = 0.0 if done >= trials else before + (0 if done else dense) + (trials - done) * each + after
    seconds = before + dense + trials * each + after
    return StudyCost(trials=trials, done=done, tokens=through, seconds=seconds, seconds_left=left)


def screened(
    found: StudyCost, screening: ScreeningCost, rates: ProbeRates | None, pruners: Iterable[str], blocks: int
) -> StudyCost:
    """The cost of a study with its screening."""
    times = None if rates is None else screening.seconds(rates, pruners, blocks)
    return added(found, screening.tokens, times).model_copy(update={"screened": screening.trials})


@dataclass(frozen=True)
class TrainingCost:
    """The training of the best plan's kept weights: tokens `forward` and `backward`, those `measured`, and loads.

    A token goes back through all blocks in the time of two forward passes.
    """

    forward: int
    backward: int
    measured: int
    loads: int

    @property
    def tokens(self) -> int:
        """Tokens through the blocks, a way back as two."""
        return self.forward + 2 * self.backward + self.measured

    def seconds(self, rates: ProbeRates, blocks: int) -> float:
        """Seconds in all."""
        return self.tokens * (blocks * rates.run["validation"] + rates.ends) + self.loads * rates.load


def trained(
    found: StudyCost, training: TrainingCost, rates: ProbeRates | None, blocks: int, is_done: bool
) -> StudyCost:
    """The cost of a study with the training of its best plan."""
    own = None if rates is None else training.seconds(rates, blocks)
    found = added(found, training.tokens, None if own is None else (own, 0.0 if is_done else own))
    return found.model_copy(update={"training": own})


def added(found: StudyCost, tokens: int, times: tuple[float, float] | None) -> StudyCost:
    """The cost with more tokens and `times`, seconds in all and left; what is not known stays unknown."""
    more: dict[str, float] = {}
    if found.tokens is not None:
        more["tokens"] = found.tokens + tokens
    if times is not None and found.seconds is not None and found.seconds_left is not None:
        more |= {"seconds": found.seconds + times[0], "seconds_left": found.seconds_left + times[1]}
    return found.model_copy(update=more)


def _plan_seconds(rates: ProbeRates, costs: dict[str, Passes], evaluated: int, blocks: int, role: str) -> float:
    """Mean seconds over the pruners of one plan, evaluated on `evaluated` tokens of a text."""
    return _mean(
        [
            trial_seconds(rates, pruner, cost.model_copy(update={"evaluate": evaluated}), blocks, role).total
            for pruner, cost in costs.items()
        ]
    )


def _mean(values: "list[int] | list[float]") -> float:
    return sum(values) / len(values)
