"""The cost of a study in tokens and seconds, from its sizes and the rates of a short probe. Needs no torch.

With N calibration tokens, E validation tokens and C tokens of the error curve, a trial sends through every block

    block         N to measure statistics, N through the pruned block, E to evaluate
    sequential    N to measure statistics and through the pruned block at once, E to evaluate
    dense         C through the pruned block, E to evaluate; once for all trials 2 N through the dense block
    screening     a part of E to evaluate; once for all trials 2 N through the dense block

The document (`atp_tune.plan/2`) is published: keys are added under the same number, never renamed or removed.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from atp_tune.checkpoints.files import Offload
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


class Seconds(FrozenModel):
    """Seconds of one trial by phase, as in its attribute `seconds`."""

    calibrate: float
    prune: float
    evaluate: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.calibrate + self.prune + self.evaluate


@dataclass(frozen=True)
class ProbeRates:
    """The measurements of a probe of a model with so many `blocks`, in seconds."""

    blocks: int
    load: float
    run: Mapping[str, float]  # per token in one block, by text
    dense: float  # per token in one block, to measure statistics of the dense model
    ends: float  # per token in embedding and head
    fetch: float  # to copy one block to the device
    pruners: Mapping[str, PrunerRate]
    work: int  # peak bytes beside weights and states

    def trial(self, pruner: str, cost: Passes, role: str = "validation") -> Seconds:
        """Seconds of one trial, evaluated on the text of this role; copies of blocks count where they are slower."""
        own = self.pruners[pruner]
        calibrate = cost.run * own.calibrate
        evaluate = cost.evaluate * self.run[role]
        stall = max(0.0, self.fetch - calibrate - own.prune - evaluate)
        return Seconds(
            calibrate=self.blocks * (calibrate + stall),
            prune=self.blocks * own.prune,
            evaluate=self.blocks * evaluate + cost.evaluate * self.ends,
        )

    def dense_on(self, tokens: int, role: str) -> float:
        """Seconds of the dense model on a text."""
        return self.blocks * max(self.fetch, tokens * self.run[role]) + tokens * self.ends

    def statistics(self, tokens: int) -> float:
        """Seconds to measure statistics of the dense model."""
        return self.blocks * tokens * self.dense

    def read(self, tokens: float) -> float:
        """Seconds of tokens through the whole model."""
        return tokens * (self.blocks * self.run["validation"] + self.ends)


NAN = math.nan
UNKNOWN = ProbeRates(
    0, NAN, defaultdict(lambda: NAN), NAN, NAN, NAN, defaultdict(lambda: PrunerRate(NAN, NAN)), 0
)  # without a probe


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
