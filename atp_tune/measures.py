"""The meaning of a study's numbers: how items become a score, a change between models, and words.

A `Measure` is the only place that knows what its numbers mean; searches, tables, notes, cards and files ask it. Its
items are one number for each window of a text, or for each image:

    nlls     NLL in nats per token                PPL = exp(m)                  stderr = PPL · sd / √n
    kls      KL from the dense model, likewise    KL = m                        stderr = sd / √n
    kls_99   the 99th percentile of a window's positions, its KLs in order; scored as KL
    same_tops  share of a window's positions (of an image 1 or 0) whose most likely token (class) is the dense model's
               mean, sd / √n
    ranks    of an image's right class, 0: first  A_k = share of ranks < k      stderr = √(p (1 - p) / (n + 1))

m mean and sd standard deviation of n items; the error of a perplexity is by the delta method. KL = Σ p ln(p / q), p and
q next-token distributions of the dense and the pruned model. p = (hits + ½) / (n + 1): half a hit and half a miss are
added for the error, as in Jeffreys' interval, which would be 0 else where all images are hits. A 95 % interval is ± t ·
stderr, with t of Student's distribution with n - 1 degrees of freedom: 2.13 for 16 windows. An error that is not known,
as that of one window, is 0 here and null in JSON, and is not printed.

Changes are paired by items, so that the spread that both models share cancels:

    perplexity   exp(mean of differences of NLLs) - 1
    KL           r = m' / m - 1; its error is that of a ratio: of k' - (1 + r) k, divided by m
    accuracy     (b - c) / n        stderr = √(((b + c + 1) / N - d²) / N), d = (b - c) / N, N = n + 2

b images become hits, c become misses; half an image is added to each of the four cells of before and after (Agresti and
Min, "Simple improved confidence intervals for comparing matched proportions", Stat. in Medicine 2005).

A study by accuracy minimises the top-1 error of n images, k of them wrong, with half an image added, so that its
logarithm, which samplers and figures use, is finite. It orders models as accuracy does: E = (k + ½) / (n + 1).
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import AllowInfNan, BeforeValidator, FiniteFloat, PlainSerializer

from atp_tune.utils.registry import FrozenModel

ROUNDED = 1e-12  # nats; smaller errors are those of floats
Error = Annotated[float, BeforeValidator(lambda error: error or 0.0), PlainSerializer(lambda error: error or None)]
C = TypeVar("C")
Items: TypeAlias = Sequence[float]
Role = Literal["validation", "test"]  # of a text
TEXTS: tuple[Role, Role] = ("validation", "test")
Limit: TypeAlias = Mapping[str, float | Mapping[str, float]]  # one key and its value


class Estimate(FrozenModel):
    """A value and its standard error, 0 if that is not known; the class says how both are written."""

    style: ClassVar[str] = ".2f"
    times: ClassVar[float] = 1.0
    unit: ClassVar[str] = ""

    value: float
    stderr: Error

    @classmethod
    def mean(cls, values: "Items") -> Self:
        """The mean of values [n], one a window."""
        return cls(value=statistics.fmean(values), stderr=error_of_mean(values))

    def __str__(self) -> str:
        return self.written(self.style)

    def written(self, style: str) -> str:
        """Both in a format of numbers; the value alone if its error is not known."""
        error = f" ± {self.times * self.stderr:{style.removeprefix('+')}}" if self.stderr else ""
        return f"{self.times * self.value:{style}}{error}{self.unit}"

    @property
    def alone(self) -> str:
        """The value without its error."""
        return f"{self.times * self.value:{self.style}}{self.unit}"

    def beside(self, what: str) -> str:
        """A change in a sentence, without a sign: `16.2% ± 2.2% below uniform’s`, `1.2 ± 0.5 points above dense`."""
        return f"{self.written(self.style).lstrip('+-')} {'above' if self.value > 0 else 'below'} {what}".rstrip()

    def may_be_chance(self, items: int) -> bool:
        """Whether 0 lies in the 95 % interval of a change over so many items; False if its error is not known."""
        return items > 1 and self.stderr > 0 and abs(self.value) <= interval_factor(items) * self.stderr


class Perplexity(Estimate):
    """A perplexity and its standard error over windows."""


class Change(Estimate):
    """A relative change from one score to another, and its standard error over paired windows."""

    style = "+.1%"


class Divergence(Estimate):
    """A mean KL divergence in nats per token, and its standard error over windows."""

    style = ".4f"


class Accuracy(Estimate):
    """A share of images and its standard error."""

    style = ".1%"


class Gain(Estimate):
    """A difference of two accuracies on the same images, and its standard error."""

    style, times, unit = "+.1f", 100.0, " points"


class TaskScore(Estimate):
    """A mean over the items of a task of lm-eval, or a difference of two."""

    value: FiniteFloat
    stderr: Annotated[Error, AllowInfNan(False)]


def perplexity(nlls: Items) -> Perplexity:
    """Perplexity of window NLLs [n] in nats per token; infinite if exp overflows or an NLL is NaN."""
    mean = statistics.fmean(nlls)
    if not mean < 700:
        return Perplexity(value=math.inf, stderr=math.inf)
    value = math.exp(mean)
    if not value:  # the difference from an infinite NLL
        return Perplexity(value=0, stderr=0)
    return Perplexity(value=value, stderr=value * error_of_mean(nlls))


def change(before: Items, after: Items) -> Change:
    """Relative change of perplexity between NLLs [n] of the same windows."""
    ratio = perplexity(rises(before, after))
    return Change(value=ratio.value - 1, stderr=ratio.stderr)


def rises(before: Items, after: Items) -> list[float]:
    """What each item [n] rises by."""
    return [new - old for old, new in zip(before, after, strict=True)]


def by_kind(nlls: Items, kinds: Sequence[str]) -> dict[str, Perplexity]:
    """Perplexity of the windows of each kind, of which windows are taken in turn; {} unless each kind has one."""
    each = {kind: nlls[index :: len(kinds)] for index, kind in enumerate(kinds)}
    return {kind: perplexity(own) for kind, own in each.items()} if all(each.values()) else {}


def relative(before: Items, after: Items) -> Change | None:
    """Relative change of the mean between KLs [n] of the same windows; None if the mean before is 0."""
    mean = statistics.fmean(before)
    if not mean:
        return None
    ratio = statistics.fmean(after) / mean
    rest = [new - ratio * old for old, new in zip(before, after, strict=True)]
    return Change(value=ratio - 1, stderr=error_of_mean(rest) / mean)


def accuracy(ranks: Items, top: int = 1) -> Accuracy:
    """The share of ranks [n] below `top`."""
    hits = sum(rank < top for rank in ranks)
    return Accuracy(value=hits / len(ranks), stderr=error_of_share(hits, len(ranks)))


def gain(before: Items, after: Items, top: int = 1) -> Gain:
    """The difference of accuracy between ranks [n] of the same images."""
    differences = [(new < top) - (old < top) for old, new in zip(before, after, strict=True)]
    return Gain(value=sum(differences) / len(differences), stderr=error_of_gain(differences))


def error_rate(misses: Items, items: int | None = None) -> Accuracy:
    """The error rate of misses [n], 1 for a wrong image; `items`: of so many images that have their mean."""
    count = items or len(misses)
    wrong = min(max(math.fsum(misses) / len(misses), 0.0), 1.0) * count
    return Accuracy(value=(wrong + 0.5) / (count + 1), stderr=error_of_share(wrong, count))


def difference(values: Items, base: Items) -> TaskScore | None:
    """Mean difference by items on a task, with its standard error; None without scores of at least two items."""
    if len(values) != len(base) or len(values) < 2:
        return None
    gains = rises(base, values)
    error_of = error_of_gain if {*values, *base} <= {0.0, 1.0} else error_of_mean
    return TaskScore(value=statistics.fmean(gains), stderr=error_of(gains))


def mean_of_tasks(scores: Sequence[TaskScore]) -> TaskScore:
    """Unweighted mean over tasks; its standard error is over items, not over the choice of tasks."""
    errors = [score.stderr for score in scores]
    stderr = math.hypot(*errors) / len(errors) if all(errors) else 0.0
    return TaskScore(value=statistics.fmean(score.value for score in scores), stderr=stderr)


def error_of_mean(values: Items) -> float:
    """The standard error of the mean of values [n]; 0, not known, for one value or equal ones."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return error if error > ROUNDED else 0.0


def error_of_share(hits: float, items: int) -> float:
    """The standard error of a share of so many items."""
    return math.sqrt((hits + 0.5) * (items - hits + 0.5) / (items + 1) ** 3)


def error_of_gain(differences: Items) -> float:
    """The standard error of the mean of differences [n] of hits: 1, 0 or -1."""
    count = len(differences) + 2
    mean = sum(differences) / count
    return math.sqrt(((sum(map(abs, differences)) + 1) / count - mean**2) / count)


def paired(change_of: Callable[[Items, Items], C], before: Items | None, after: Items | None) -> C | None:
    """A change between the items of two models; None unless both have the same, and some."""
    return change_of(before, after) if before and after and len(before) == len(after) else None


@dataclass(frozen=True)
class Measure:
    """A kind of number that models are compared by.

    name     in objectives, JSON, data frames and trackers; `column`: in heads of tables; `title`: in sentences
    items    the key of its items, one a window or image, in a trial's attributes
    score    of items; `change`: from one model's items to another's, None where it is not defined
    note     what it is, in a sentence below tables; `objective`: what is minimised
    kind     of its scores; `dense`: that of the dense model in words where it is so by definition
    each     of items, what is minimised of each; `loss`: what is minimised, of these or of the mean of so many
    """

    name: str
    column: str
    title: str
    items: str
    score: Callable[[Items], Estimate]
    change: Callable[[Items, Items], Estimate | None]
    kind: type[Estimate]
    dense: str = ""
    note: str = ""
    objective: str = ""
    is_higher_better: bool = False
    each: Callable[[Items], list[float]] = list
    loss: Callable[[Items, int | None], Estimate] = lambda nlls, items: perplexity(nlls)

    @property
    def dense_items(self) -> str:
        """The key of the dense model's items on the validation text, in a study's attributes."""
        return "dense" if self.items == "nlls" else f"dense_{self.items}"

    def written(self, value: float) -> str:
        """A score without its error."""
        return self.kind(value=value, stderr=0.0).alone

    def of_loss(self, value: float, items: int) -> float:
        """The score that a minimised value of so many items stands for: of an error rate the accuracy."""
        return 1 - ((items + 1) * value - 0.5) / items if self.is_higher_better else value

    def is_gain(self, change: Estimate) -> bool:
        """Whether a change is for the better."""
        return change.value > 0 if self.is_higher_better else change.value < 0


PERPLEXITY = Measure("perplexity", "perplexity", "perplexity", "nlls", perplexity, change, Perplexity)
KL = Measure(
    "kl", "KL", "KL divergence", "kls", Divergence.mean, relative, Divergence, dense="0",
    note="KL: from the dense model's next-token distribution to the pruned one's, nats per token.",
    objective="KL divergence from the dense model (nats per token)", loss=lambda kls, items: Divergence.mean(kls),
)  # fmt: skip
ACCURACY = Measure(
    "accuracy", "accuracy", "accuracy", "ranks", accuracy, gain, Accuracy, is_higher_better=True,
    objective="top-1 error (1 - accuracy, with half an image added)", each=lambda ranks: [int(r > 0) for r in ranks],
    loss=error_rate,
)  # fmt: skip
KL_99 = Measure(
    "kl_99", "KL 99%", "99th percentile of the KL", "kls_99", Divergence.mean, relative, Divergence, dense="0",
    note="KL 99%: the KL that 1 % of a window's positions exceed, mean over windows.",
)  # fmt: skip
SAME_TOP = Measure(
    "same_top", "same top", "share of positions with the dense model's most likely token", "same_tops",
    Accuracy.mean, lambda before, after: Gain.mean(rises(before, after)), Accuracy, dense="100%", is_higher_better=True,
    note="Same top: the share of positions (or images) whose most likely token (or class) is the dense model's.",
)  # fmt: skip
MEASURES = {measure.name: measure for measure in (PERPLEXITY, KL, KL_99, SAME_TOP, ACCURACY)}


def error_over(windows: int | None, unit: str) -> str:
    """Explains ± for a number of windows, or other items, and the factor for a 95 % interval."""
    if windows is None or windows < 2:
        return f"standard error over {unit}"
    return f"standard error over {windows} {unit} (× {interval_factor(windows):.2f} for 95 %)"


def interval_factor(windows: int) -> float:
    """The factor t(n - 1) from the standard error over n ≥ 2 windows to a 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(windows - 1, 0.975))


def excess(
    limit: Limit,
    dense: Items | None,
    nlls: Items | None,
    kls: Items | None = None,
    accuracies: Mapping[str, Items] | None = None,
    ranks: tuple[Items | None, Items | None] = (None, None),
) -> float | None:
    """How far a pruned model is beyond a limit of quality, at the upper end of its standard error.

        max_increase    ln(1 + r + e) - ln(1 + limit)                    r ± e paired change of perplexity against dense
        max_perplexity  as max_increase with 1 + limit = limit / PPL of the dense model
        max_kl          k + e - limit                                     k ± e mean KL in nats per token
        max_drop        e - d - limit                                     d ± e paired change of accuracy against dense
        min_accuracy    limit - (a - e), the largest over the tasks       a ± e accuracy

    Negative or 0: within the limit; of one window the error is not known, and nothing is. Each grows with sparsity, and
    is smooth enough to be interpolated; accuracies are not, which move in steps of one item.

    `limit`: one of the keys above and its value. From window NLLs [n] of the dense and the pruned model, or window KLs
    [n]. `accuracies`: of each task, with its standard error. `ranks` [n]: of the right classes of images, by the dense
    and the pruned model. None if numbers that the limit needs are missing.
    """
    key, value = next(iter(limit.items()))
    if isinstance(value, Mapping):
        scores = accuracies or {}
        by_task = [least - (scores[task][0] - scores[task][1]) for task, least in value.items() if task in scores]
        return max(by_task) if len(by_task) == len(value) else None
    if key == "max_drop":
        lost = paired(gain, *ranks)
        return None if lost is None else lost.stderr - lost.value - value
    if key == "max_kl":
        own = kls or ()
        if not own:
            return None
        mean = Divergence.mean(own)
        return mean.value + mean.stderr - value if len(own) > 1 else math.inf
    against = paired(change, dense, nlls)
    if against is None or not dense:
        return None
    worst = value / perplexity(dense).value if key == "max_perplexity" else 1 + value
    upper = 1 + against.value + against.stderr
    return math.log(upper / worst) if 0 < upper < math.inf and len(dense) > 1 else math.inf


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The index of the point (x, y) of a front that is furthest below the chord from the first to the last.

    There what is lost begins to grow faster than what is gained. x ascends, and y too; both are finite. None of fewer
    than 3 points, or where none is below. Source: Satopää et al., Finding a "Kneedle" in a Haystack, 2011, whose
    scaling of both axes to [0, 1] changes no order of distances.
    """
    if len(points) < 3:
        return None
    (left, low), *_, (right, high) = points
    below = [low + (high - low) * (x - left) / (right - left) - y for x, y in points[1:-1]]
    return 1 + below.index(max(below)) if max(below) > 0 else None
