"""Perplexity and its standard error, from the mean NLL of each window.

    PPL = exp(m)        stderr = PPL · sd / √n

m mean and sd standard deviation of n window NLLs (nats per token); the standard error is by the delta method. A 95 %
interval is ± t · stderr, with t of Student's distribution with n - 1 degrees of freedom: 2.13 for 16 windows.
"""

import math
import statistics
from collections.abc import Sequence

from atp_tune.frozen import FrozenModel


class Estimate(FrozenModel):
    """A value and its standard error."""

    value: float
    stderr: float


class Perplexity(Estimate):
    """A perplexity and its standard error over windows (0 for a single window, whose spread is unknown)."""

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.stderr:.2f}" if self.stderr else f"{self.value:.2f}"


class Change(Estimate):
    """Relative change from one perplexity to another, and its standard error over paired windows."""

    def __str__(self) -> str:
        return f"{self.value:+.1%} ± {self.stderr:.1%}"


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Relative change of perplexity between NLLs [n] of the same windows.

    The spread between windows, which both share, cancels in the differences, so the standard error is much smaller than
    those of the two perplexities.
    """
    ratio = perplexity([new - old for old, new in zip(before, after, strict=True)])
    return Change(value=ratio.value - 1, stderr=ratio.stderr)


def perplexity(nlls: Sequence[float]) -> Perplexity:
    """Perplexity of window NLLs [n] in nats per token; infinite if exp overflows or an NLL is NaN."""
    mean = statistics.fmean(nlls)
    if not mean < 700:
        return Perplexity(value=math.inf, stderr=math.inf)
    value = math.exp(mean)
    if not value:  # the difference from an infinite NLL
        return Perplexity(value=0, stderr=0)
    spread = statistics.stdev(nlls) if len(nlls) > 1 else 0.0
    return Perplexity(value=value, stderr=value * spread / math.sqrt(len(nlls)))


def error_over(windows: int | None) -> str:
    """Explains ± for a number of windows, and the factor for a 95 % interval."""
    if windows is None or windows < 2:
        return "standard error over windows"
    return f"standard error over {windows} windows (× {reach_of(windows):.2f} for 95 %)"


def reach_of(windows: int) -> float:
    """The factor t(n - 1) from the standard error over n ≥ 2 windows to a 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(windows - 1, 0.975))


def may_be_chance(change: Estimate, windows: int) -> bool:
    """Whether 0 lies in the 95 % interval of a change over n windows; False if its error is not known."""
    return windows > 1 and change.stderr > 0 and abs(change.value) <= reach_of(windows) * change.stderr
