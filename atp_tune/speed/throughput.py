"""Tokens, or images, per second of two models that take turns, in any engine."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from atp_tune.events import EventHandler, Step, TrialStarted
from atp_tune.metrics.speed import GRAPH, SIDES, Measured, Phase, Side


@dataclass(frozen=True)
class Workload:
    """Measured `runs` times: `batch` prompts of `tokens` at once, then `steps` tokens of each, one at a time.

    Of an image classifier `batch` images at once instead.
    """

    tokens: int = 128
    steps: int = 32
    runs: int = 5
    batch: int = 1

    def amount(self, phase: Phase) -> int:
        """Tokens, or images, of a run of a phase."""
        return self.batch * {"prefill": self.tokens, "classify": 1}.get(phase, self.steps)


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

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is measured in a run."""

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""


Opening = AbstractContextManager[SpeedEngine]


def measured(opening: Opening, name: str, task: Workload, watch: EventHandler) -> Measured:
    """Opens an engine and measures both models in turns; the first round is a warm-up."""
    watch(TrialStarted(f"measuring {name}", None))
    with opening as engine:
        found: dict[tuple[Phase, Side], list[float]] = {key: [] for key in product(engine.phases, SIDES)}
        for run in range(task.runs + 1):
            for (phase, side), taken in found.items():  # dense, sparse, dense, sparse
                seconds = engine.seconds(side, phase)
                if run:
                    taken.append(task.amount(phase) / seconds)
            watch(Step("runs", run + 1, task.runs + 1))
        length = {"tokens": task.tokens, "steps": task.steps} if "prefill" in engine.phases else {}
        fields: Any = {
            phase.replace(GRAPH, "graph"): {side: found[phase, side] for side in SIDES} for phase in engine.phases
        }
        return Measured(**vars(engine.about), batch=task.batch, **length, **fields)
