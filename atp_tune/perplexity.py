"""Perplexity with its error, from the mean NLL of each window.

    PPL = exp(m)        stderr = PPL · sd / √n

m mean and sd standard deviation of n window NLLs (nats per token); the error is by the delta method.
"""

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict


class Perplexity(BaseModel):
    """A perplexity and its standard error over windows (0 for a single window, whose spread is unknown)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}"


def perplexity(nlls: Sequence[float]) -> Perplexity:
    """Perplexity of window NLLs [n] in nats per token; infinite where exp overflows or an NLL is not a number."""
    mean = statistics.fmean(nlls)
    if not mean < 700:
        return Perplexity(value=math.inf, stderr=math.inf)
    value = math.exp(mean)
    spread = statistics.stdev(nlls) if len(nlls) > 1 else 0.0
    return Perplexity(value=value, stderr=value * spread / math.sqrt(len(nlls)))
