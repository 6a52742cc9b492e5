"""Perplexity and its standard error, from the mean NLL of each window.

    PPL = exp(m)        stderr = PPL · sd / √n

m mean and sd standard deviation of n window NLLs (nats per token); the standard error is by the delta method. A 95 %
interval is ± t · stderr, with t of Student's distribution with n - 1 degrees of freedom: 2.13 for 16 windows.

An error that is not known, as that of one window, is 0 here and null in JSON, and is not printed.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer

from atp_tune.frozen import FrozenModel

ROUNDED = 1e-12  # nats; smaller errors are those of floats
Error = Annotated[float, BeforeValidator(lambda error: error or 0.0), PlainSerializer(lambda error: error or None)]


class Estimate(FrozenModel):
    """A value and its standard error, 0 if that is not known."""

    value: float
    stderr: Error

    def said(self, value: str, error: str) -> str:
        """Both, as they are formatted; the value alone if its error is not known."""
        return f"{value} ± {error}" if self.stderr else value

    @property
    def side(self) -> str:
        """On which side of what it is compared with a change is."""
        return "above" if self.value > 0 else "below"


class Perplexity(Estimate):
    """A perplexity and its standard error over windows."""

    def __str__(self) -> str:
        return self.said(f"{self.value:.2f}", f"{self.stderr:.2f}")


class Change(Estimate):
    """Relative change from one perplexity to another, and its standard error over paired windows."""

    def __str__(self) -> str:
        return self.said(f"{self.value:+.1%}", f"{self.stderr:.1%}")

    def beside(self, what: str) -> str:
        """The change in a sentence, without a sign: `16.2% ± 2.2% below uniform’s`."""
        return f"{self.said(f'{abs(self.value):.1%}', f'{self.stderr:.1%}')} {self.side} {what}".rstrip()


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
    return Perplexity(value=value, stderr=value * error_of_mean(nlls))


def by_kind(nlls: Sequence[float], kinds: Sequence[str]) -> dict[str, Perplexity]:
    """Perplexity of the windows of each kind, of which windows are taken in turn; {} unless each kind has one."""
    each = {kind: nlls[place :: len(kinds)] for place, kind in enumerate(kinds)}
    return {kind: perplexity(own) for kind, own in each.items()} if all(each.values()) else {}


def error_of_mean(values: Sequence[float]) -> float:
    """The standard error of the mean of values [n]; 0, not known, for one value or equal ones."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return error if error > ROUNDED else 0.0


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
