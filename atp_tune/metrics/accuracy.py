"""Accuracy of an image classifier and its standard error, from the rank of each image's right class.

    A_k = share of images with rank < k        stderr = sd / √n

rank 0 is the most probable class; sd standard deviation of n hits (0 or 1). The difference of two models is paired by
image: its standard error is that of the mean of differences of hits.

A study by accuracy minimises the top-1 error of n images, k of them wrong, with half an image added, so that its
logarithm, which samplers and figures use, is finite. It orders models as accuracy does:

    E = (k + ½) / (n + 1)
"""

import math
import statistics
from collections.abc import Sequence

from atp_tune.frozen import FrozenModel
from atp_tune.metrics.perplexity import Estimate


class Accuracy(Estimate):
    """A share of images and its standard error (0 for a single image)."""

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.stderr:.1%}"


class Gain(Estimate):
    """A difference of two accuracies on the same images, and its standard error."""

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} ± {100 * self.stderr:.1f} points"


class ErrorRate(Estimate):
    """A share of images whose most probable class is wrong, with half an image added, and its standard error."""

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.stderr:.1%}"


class Accuracies(FrozenModel):
    """Top-1 accuracies on the validation and test images, as far as measured, and top-5 on the latter."""

    validation: Accuracy | None = None
    test: Accuracy | None = None
    test_top5: Accuracy | None = None


def accuracy(ranks: Sequence[int], top: int = 1) -> Accuracy:
    """The share of ranks [n] below `top`."""
    value, stderr = _mean([float(rank < top) for rank in ranks])
    return Accuracy(value=value, stderr=stderr)


def error_rate(misses: Sequence[float], items: int | None = None) -> ErrorRate:
    """The error rate of misses [n], 1 for a wrong image; `items`: of so many images that have their mean."""
    (mean, stderr), count = _mean(misses), items or len(misses)
    return ErrorRate(value=(min(max(mean, 0.0), 1.0) * count + 0.5) / (count + 1), stderr=stderr)


def gain(before: Sequence[int], after: Sequence[int], top: int = 1) -> Gain:
    """The difference of accuracy between ranks [n] of the same images."""
    differences = [float(new < top) - float(old < top) for old, new in zip(before, after, strict=True)]
    value, stderr = _mean(differences)
    return Gain(value=value, stderr=stderr)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), spread / math.sqrt(len(values))
