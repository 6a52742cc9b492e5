"""What is written down of a trial beside its value: the names of the user attributes and how they are gathered."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from atp_tune.blocks.prune_pass import PrunedBlock
from atp_tune.blocks.timing import Timer
from atp_tune.checkpoints.devices import device_name, peak_memory, reset_peak_memory
from atp_tune.errors import TrialError
from atp_tune.metrics.kl import Divergence, divergence
from atp_tune.metrics.perplexity import Perplexity, perplexity
from atp_tune.scores import WindowScores
from atp_tune.scores.evaluation import Block
from atp_tune.storage.process_identity import versions


class Record:
    """Follows one plan through pruning and evaluation, and adds up what the trial's attributes say."""

    def __init__(self, device: Any, dtype: str) -> None:
        self.nlls: list[float] = []
        self.kls: list[float] = []  # where the dense model is compared with
        self.errors: list[float] = []
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.experts_without_tokens: list[str] = []
        self._zeros = self._weights = 0
        self._device = device
        self._dtype = dtype
        self._timer = Timer(device)
        reset_peak_memory(device)

    def follow(self, pruned: Iterator[PrunedBlock], sizes: tuple[int, ...]) -> Iterator[Block]:
        """Hands on each pruned block after taking down its zeros, its error and its seconds."""
        for block in pruned:
            self.errors += [] if block.error is None else [round(block.error, 6)]
            self.experts_without_tokens += [f"{block.index}.{name}" for name in block.experts_without_tokens]
            self._zeros += sum(block.zeros.values())
            self._weights += sizes[block.index]
            for phase, seconds in block.seconds.items():
                self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
            self.peak_bytes["prune"] = peak_memory(self._device)
            yield block.index, block.weights

    def add(self, scores: WindowScores) -> None:
        """Takes in the scores of further windows."""
        self.nlls += scores.nlls
        self.kls += scores.kls

    def results(self, objectives: Sequence[str]) -> list[Perplexity | Divergence]:
        """What a trial came to in each of its objectives; TrialError where one is no number."""
        found = [divergence(self.kls) if objective == "kl" else perplexity(self.nlls) for objective in objectives]
        for objective, result in zip(objectives, found, strict=True):
            if not math.isfinite(result.value):
                raise TrialError(
                    f"{objective} is {result.value}: the pruned model's numbers overflow or are not defined"
                )
        return found

    def close(self) -> dict[str, Any]:
        """The user attributes of the trial; what was not pruning counts as evaluation."""
        self._timer.lap("all")
        self.seconds["evaluate"] = self._timer.seconds["all"] - sum(self.seconds.values())
        self.peak_bytes["evaluate"] = peak_memory(self._device)
        return {
            "realised": self._zeros / self._weights,
            "errors": self.errors,
            "nlls": self.nlls,
            "seconds": {phase: round(seconds, 3) for phase, seconds in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "device": device_name(self._device),
            "dtype": self._dtype,
            "versions": versions(),
            **({"kls": self.kls} if self.kls else {}),
            **({"experts_without_tokens": self.experts_without_tokens} if self.experts_without_tokens else {}),
        }
