"""KL divergence from the dense model and its standard error, from the mean of each window.

    KL = mean over positions of Σ p ln(p / q)        stderr = sd / √n        r = m' / m - 1

p, q next-token distributions of the dense and the pruned model; sd standard deviation of n window means (nats per
token). r is the relative change from window means k with mean m to k' with mean m' of the same windows; its standard
error is that of a ratio: the standard error of k' - (1 + r) k, divided by m.
"""

import statistics
from collections.abc import Sequence

from atp_tune.metrics.perplexity import Change, Estimate, error_of_mean


class Divergence(Estimate):
    """A mean KL divergence in nats per token, and its standard error over windows."""

    def __str__(self) -> str:
        return self.said(f"{self.value:.4f}", f"{self.stderr:.4f}")


def divergence(kls: Sequence[float]) -> Divergence:
    """Mean of window KLs [n] in nats per token."""
    return Divergence(value=statistics.fmean(kls), stderr=error_of_mean(kls))


def relative(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """Relative change of the mean between KLs [n] of the same windows; None if the mean before is 0."""
    mean = statistics.fmean(before)
    if not mean:
        return None
    ratio = statistics.fmean(after) / mean
    rest = [new - ratio * old for old, new in zip(before, after, strict=True)]
    return Change(value=ratio - 1, stderr=error_of_mean(rest) / mean)
