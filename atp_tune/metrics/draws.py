"""What a plan comes to over several draws of the calibration text: how much of its perplexity is due to the one draw.

The plan stays the same, the pruner is calibrated with other windows each time, and the same windows of one text are
measured. The spread is the standard deviation between draws: that of one draw, not the error of their mean.

    change of draw d = exp(mean of the paired differences of NLL) - 1, best against uniform, both of draw d
"""

import math
import statistics
from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from atp_tune.frozen import FrozenModel
from atp_tune.metrics.perplexity import change, perplexity


class Spread(FrozenModel):
    """A mean over draws and the standard deviation between them."""

    mean: FiniteFloat
    sd: FiniteFloat = Field(ge=0)


class OverDraws(FrozenModel):
    """Perplexities by draw, the study's own first, and changes from uniform's with the same pruner and draw; null for
    uniform itself.
    """

    perplexities: tuple[FiniteFloat, ...]
    perplexity: Spread
    changes: tuple[FiniteFloat, ...] | None = None
    change: Spread | None = None

    @property
    def count(self) -> int:
        """How many draws."""
        return len(self.perplexities)

    def __str__(self) -> str:
        return f"{self.perplexity.mean:.2f} ± {self.perplexity.sd:.2f}"

    @property
    def changed(self) -> str:
        """The change from uniform in words; empty for uniform itself."""
        return f"{self.change.mean:+.1%} ± {self.change.sd:.1%}" if self.change else ""


def over_draws(nlls: Sequence[Sequence[float]], uniform: Sequence[Sequence[float]] | None) -> OverDraws | None:
    """Of window NLLs by draw, and uniform's of the same draws; None for a single draw, and where one is infinite."""
    values = [perplexity(one).value for one in nlls]
    pairs = zip(uniform or (), nlls, strict=bool(uniform))
    changes = [change(base, own).value for base, own in pairs if len(base) == len(own)] if uniform else []
    if len(values) < 2 or not all(map(math.isfinite, [*values, *changes])):
        return None
    paired = len(changes) == len(values)
    return OverDraws(
        perplexities=tuple(values),
        perplexity=_spread(values),
        changes=tuple(changes) if paired else None,
        change=_spread(changes) if paired else None,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(mean=statistics.fmean(values), sd=statistics.stdev(values))
