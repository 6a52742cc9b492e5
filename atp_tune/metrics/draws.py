"""Perplexity over several draws of the calibration text: the part of its spread that is due to the draw.

The measured windows stay the same; the pruner is calibrated with other windows in each draw. What was fitted to the
calibration text, such as the sparsities of `row-prices`, is fitted anew to each draw's own; parameters of the search
stay. Draws share no text. The spread is the standard deviation between draws, not the standard error of their mean.

    change in draw d = exp(mean of NLL_best - NLL_uniform over windows) - 1, both calibrated with draw d
"""

import math
import statistics
from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from atp_tune.frozen import FrozenModel
from atp_tune.measures import Change, change, perplexity


class Spread(FrozenModel):
    """A mean over draws and the standard deviation between them."""

    mean: FiniteFloat
    sd: FiniteFloat = Field(ge=0)


class OverDraws(FrozenModel):
    """Perplexities by draw, that of the study first, and changes from uniform with the same pruner and draw (null for
    uniform itself).
    """

    perplexities: tuple[FiniteFloat, ...]
    perplexity: Spread
    changes: tuple[FiniteFloat, ...] | None = None
    change: Spread | None = None
    fitted_to: tuple[int, int] | None = Field(
        None, description="tokens, or images, that each draw's plan was fitted anew to, and those of the plan itself"
    )

    @property
    def count(self) -> int:
        """Number of draws."""
        return len(self.perplexities)

    def __str__(self) -> str:
        return f"{self.perplexity.mean:.2f} ± {self.perplexity.sd:.2f}"

    @property
    def changed(self) -> str:
        """Formats the change from uniform; empty for uniform itself."""
        return f"{self.change.mean:+.1%} ± {self.change.sd:.1%}" if self.change else ""

    def beside(self, what: str) -> str:
        """The change in a sentence, as that over windows is worded; empty for uniform itself."""
        return Change(value=self.change.mean, stderr=self.change.sd).beside(what) if self.change else ""

    def how(self, data: str, is_fitted: bool) -> str:
        """Says what the numbers are; `data`: text or images; `is_fitted`: the plan is, to the calibration text."""
        items, unit = ("images", "images") if data == "images" else ("windows", "tokens")
        said = f"calibrated with other {items} each time, "
        if self.fitted_to:
            each, own = self.fitted_to
            said += f"the plan fitted anew to {each:,} {unit} of each draw, "
            said += f"where the plan itself is fitted to {own:,}, " if each != own else ""
        elif is_fitted:
            said += "all with the plan that was fitted to the first draw, "
        return f"{said}mean ± standard deviation between draws"


def over_draws(
    nlls: Sequence[Sequence[float]],
    uniform: Sequence[Sequence[float]] | None,
    fitted_to: tuple[int, int] | None = None,
) -> OverDraws | None:
    """From window NLLs by draw and those of uniform; None for a single draw or one without a number."""
    values = [perplexity(one).value for one in nlls]
    pairs = zip(uniform or (), nlls, strict=bool(uniform))
    changes = [change(base, own).value for base, own in pairs if len(base) == len(own)] if uniform else []
    if len(values) < 2 or not all(map(math.isfinite, [*values, *changes])):
        return None
    paired = len(changes) == len(values)
    return OverDraws(
        perplexities=tuple(values),
        perplexity=_spread(values),
        fitted_to=fitted_to,
        changes=tuple(changes) if paired else None,
        change=_spread(changes) if paired else None,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(mean=statistics.fmean(values), sd=statistics.stdev(values))
