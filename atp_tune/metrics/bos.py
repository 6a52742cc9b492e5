"""Whether windows should begin with BOS: the dense model's perplexity of the same tokens with and without it.

Without BOS figures compare with the papers', which have none, so it is taken only where the model is much better with
it, and beyond doubt:

    d_w = NLL_w without − NLL_w with        taken if  mean d ≥ ln 1.05  and  mean d ≥ t · sd(d) / √n

over n windows of the calibration text, each with the same predicted tokens both ways: those after the text's first one,
which nothing precedes without BOS. t is the 97.5 % quantile of Student's distribution with n − 1 degrees of freedom: a
standard deviation of a few windows is itself a guess. Of a single window, whose spread is unknown, the first rule
decides.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Self

from atp_tune.frozen import FrozenModel
from atp_tune.metrics.perplexity import Perplexity, perplexity

WINDOWS, TOKENS = 8, 512  # at most, of the calibration text: enough to see an effect of some per cent, and soon done
LEAST = math.log(1.05)  # nats per token
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # t by the number of windows


class BosEffect(FrozenModel):
    """Perplexities of the same tokens with and without BOS, whose text is `token`, and whether to take it."""

    token: str
    with_bos: Perplexity
    without: Perplexity
    windows: int
    tokens: int
    taken: bool

    @classmethod
    def of(cls, token: str, with_bos: Sequence[float], without: Sequence[float], tokens: int) -> Self:
        """The comparison of window NLLs (nats per token), paired; windows have so many tokens with BOS."""
        return cls(
            token=token,
            with_bos=perplexity(with_bos),
            without=perplexity(without),
            windows=len(with_bos),
            tokens=tokens,
            taken=is_better([old - new for old, new in zip(without, with_bos, strict=True)]),
        )

    def __str__(self) -> str:
        """What was taken and why, in one line."""
        how = f"every window begins with {self.token}"
        if not self.taken:
            how = f"no BOS, as in the papers, since {self.token} is not clearly better"
        return (
            f"{how}: dense perplexity {self.with_bos.value:.2f} with it, {self.without.value:.2f} without "
            f"({self.windows} window{'s' * (self.windows > 1)} of {self.tokens} tokens of the calibration text)"
        )


def is_better(gains: Sequence[float]) -> bool:
    """Whether BOS is worth it, by what the NLL of each of at most `WINDOWS` windows falls with it (nats per token); not
    where that is no number.
    """
    mean, count = statistics.fmean(gains), len(gains)
    if not math.isfinite(mean):
        return False
    doubt = STUDENT[count] * statistics.stdev(gains) / math.sqrt(count) if count > 1 else 0.0
    return mean >= max(LEAST, doubt)
