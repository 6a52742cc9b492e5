"""Whether windows should begin with BOS, from the dense model's perplexity of the same tokens with and without BOS.

Results without BOS are comparable with those of the papers, so BOS is used only if the model is clearly better with it:

    d_w = NLL_w without − NLL_w with        BOS if  mean d ≥ ln 1.05  and  mean d ≥ t · sd(d) / √n

over n windows of the calibration text. The predicted tokens are the same with and without BOS: all but the first of the
window's text. t is the 97.5 % quantile of Student's distribution with n − 1 degrees of freedom. For n = 1 the first
condition alone decides.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Self

from atp_tune.frozen import FrozenModel
from atp_tune.measures import Perplexity, perplexity

WINDOWS, TOKENS = 8, 512  # at most; enough to detect an effect of a few per cent
LEAST = math.log(1.05)  # nats per token
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # t by the number of windows


class BosEffect(FrozenModel):
    """Perplexities of the same tokens with and without BOS (spelled `token`), and whether BOS is used (`taken`)."""

    token: str
    with_bos: Perplexity
    without: Perplexity
    windows: int
    tokens: int
    taken: bool

    @classmethod
    def of(cls, token: str, with_bos: Sequence[float], without: Sequence[float], tokens: int) -> Self:
        """Compares paired window NLLs (nats per token); `tokens`: length of a window with BOS."""
        return cls(
            token=token,
            with_bos=perplexity(with_bos),
            without=perplexity(without),
            windows=len(with_bos),
            tokens=tokens,
            taken=is_better([old - new for old, new in zip(without, with_bos, strict=True)]),
        )

    def __str__(self) -> str:
        """The decision and its reason in one line."""
        how = f"every window begins with {self.token}"
        if not self.taken:
            how = f"no BOS, as in the papers, since {self.token} is not clearly better"
        return (
            f"{how}: dense perplexity {self.with_bos.value:.2f} with it, {self.without.value:.2f} without "
            f"({self.windows} window{'s' * (self.windows > 1)} of {self.tokens} tokens of the calibration text)"
        )


def is_better(gains: Sequence[float]) -> bool:
    """Whether BOS lowers the NLL clearly; `gains`: NLL without minus with BOS of at most `WINDOWS` windows (nats per
    token). False if a gain is not finite.
    """
    mean, count = statistics.fmean(gains), len(gains)
    if not math.isfinite(mean):
        return False
    doubt = STUDENT[count] * statistics.stdev(gains) / math.sqrt(count) if count > 1 else 0.0
    return mean >= max(LEAST, doubt)
