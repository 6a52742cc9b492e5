"""Accuracy of an image classifier and its standard error, from the rank of each image's right class.

    A_k = share of images with rank < k        stderr = √(p (1 - p) / (n + 1)), p = (hits + ½) / (n + 1)

rank 0 is the most probable class. Half a hit and half a miss are added for the error, as in Jeffreys' interval: where
all images are hits it would be 0 else. The difference of two models is paired by image:

    A' - A = (b - c) / n        stderr = √(((b + c + 1) / N - d²) / N), d = (b - c) / N, N = n + 2

b images that become hits, c that become misses; half an image is added to each of the four cells of before and after
(Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", Stat. in Medicine 2005).

A study by accuracy minimises the top-1 error of n images, k of them wrong, with half an image added, so that its
logarithm, which samplers and figures use, is finite. It orders models as accuracy does:

    E = (k + ½) / (n + 1)
"""

import math
from collections.abc import Sequence

from atp_tune.frozen import FrozenModel
from atp_tune.metrics.perplexity import Estimate


class Accuracy(Estimate):
    """A share of images and its standard error."""

    def __str__(self) -> str:
        return self.said(f"{self.value:.1%}", f"{self.stderr:.1%}")


class Gain(Estimate):
    """A difference of two accuracies on the same images, and its standard error."""

    def __str__(self) -> str:
        return self.said(f"{100 * self.value:+.1f}", f"{100 * self.stderr:.1f}") + " points"

    def beside(self, what: str) -> str:
        """The difference in a sentence, without a sign: `1.2 ± 0.5 points above uniform’s`."""
        size = self.said(f"{abs(100 * self.value):.1f}", f"{100 * self.stderr:.1f}")
        return f"{size} points {self.side} {what}"


class ErrorRate(Accuracy):
    """A share of images whose most probable class is wrong, with half an image added, and its standard error."""


class Accuracies(FrozenModel):
    """Top-1 accuracies on the validation and test images, as far as measured, and top-5 on the latter."""

    validation: Accuracy | None = None
    test: Accuracy | None = None
    test_top5: Accuracy | None = None


def accuracy(ranks: Sequence[int], top: int = 1) -> Accuracy:
    """The share of ranks [n] below `top`."""
    hits = sum(rank < top for rank in ranks)
    return Accuracy(value=hits / len(ranks), stderr=error_of_share(hits, len(ranks)))


def error_rate(misses: Sequence[float], items: int | None = None) -> ErrorRate:
    """The error rate of misses [n], 1 for a wrong image; `items`: of so many images that have their mean."""
    count = items or len(misses)
    wrong = min(max(math.fsum(misses) / len(misses), 0.0), 1.0) * count
    return ErrorRate(value=(wrong + 0.5) / (count + 1), stderr=error_of_share(wrong, count))


def gain(before: Sequence[int], after: Sequence[int], top: int = 1) -> Gain:
    """The difference of accuracy between ranks [n] of the same images."""
    differences = [(new < top) - (old < top) for old, new in zip(before, after, strict=True)]
    return Gain(value=sum(differences) / len(differences), stderr=error_of_gain(differences))


def error_of_share(hits: float, items: int) -> float:
    """The standard error of a share of so many items."""
    return math.sqrt((hits + 0.5) * (items - hits + 0.5) / (items + 1) ** 3)


def error_of_gain(differences: Sequence[float]) -> float:
    """The standard error of the mean of differences [n] of hits: 1, 0 or -1."""
    count = len(differences) + 2
    mean = sum(differences) / count
    return math.sqrt(((sum(map(abs, differences)) + 1) / count - mean**2) / count)
