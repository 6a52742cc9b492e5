"""Tokens per second of two models that take turns, in any engine."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from atp_tune.events import EventHandler, Step, TrialStarted
from atp_tune.metrics.speed import PHASES, SIDES, Measured, Phase, Rates, Side


@dataclass(frozen=True)
class Workload:
    """Measured `runs` times: `batch` prompts of `tokens` at once, then `steps` tokens of each, one at a time."""

    tokens: int = 128
    steps: int = 32
    runs: int = 5
    batch: int = 1


@dataclass(frozen=True)
class About:
    """An engine and its device; `logits`: the largest difference from transformers' logits, relative to the largest."""

    engine: str
    version: str
    dtype: str
    device: str
    cores: int | None
    logits: float | None = None


class SpeedEngine(Protocol):
    """Computes a dense and a sparse model."""

    @property
    def about(self) -> About:
        """The engine and its device."""

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""


Opening = AbstractContextManager[SpeedEngine]


def measured(opening: Opening, name: str, task: Workload, watch: EventHandler) -> Measured:
    """Opens an engine and measures both models in turns; the first round is a warm-up."""
    watch(TrialStarted(f"measuring {name}", None))
    with opening as engine:
        about = engine.about
        found: dict[tuple[Phase, Side], list[float]] = {key: [] for key in product(PHASES, SIDES)}
        for run in range(task.runs + 1):
            for phase, side in product(PHASES, SIDES):  # dense, sparse, dense, sparse
                seconds = engine.seconds(side, phase)
                if run:
                    found[phase, side].append(
                        task.batch * (task.tokens if phase == "prefill" else task.steps) / seconds
                    )
            watch(Step("runs", run + 1, task.runs + 1))
    prefill, decode = (Rates(**{side: tuple(found[phase, side]) for side in SIDES}) for phase in PHASES)
    length = {"tokens": task.tokens, "steps": task.steps, "batch": task.batch}
    return Measured(**vars(about), **length, prefill=prefill, decode=decode)
