"""The first test images of a study of an image classifier with the answers of dense, uniform and best, for reports."""

import math
import statistics
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from atp_tune.measures import Change, Perplexity, change, interval_factor, perplexity, rises
from atp_tune.utils.registry import FrozenModel

COUNT = 10  # images
SIDE = 64  # pixels of the longer side, at most

Words = Annotated[str, Field(max_length=1000)]
Picture = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+=*$", max_length=100_000)]  # base64 of a PNG


class ImageAnswer(FrozenModel):
    """A model's most probable class of an image."""

    name: Words
    index: int = Field(ge=0)  # of the class: names may be equal
    probability: float = Field(ge=0, le=1)


class Answers(FrozenModel):
    """Images as PNG in base64, name and index of each one's class, and the answer of each model, in the same order."""

    pictures: tuple[Picture, ...] = Field(min_length=1, max_length=100)
    labels: tuple[Words, ...]
    indices: tuple[int, ...]
    dense: tuple[ImageAnswer, ...]
    uniform: tuple[ImageAnswer, ...]
    best: tuple[ImageAnswer, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if {len(self.labels), len(self.indices), *(len(self.of(name)) for name in NAMES)} != {len(self.pictures)}:
            raise ValueError("not one label, one index and one answer of each model for each picture")
        return self

    def of(self, name: str) -> tuple[ImageAnswer, ...]:
        """The answers of a model."""
        answers: tuple[ImageAnswer, ...] = getattr(self, name)
        return answers


# --- Whether windows should begin with BOS, from the dense model's perplexity of the same tokens with and without BOS.
#
# Results without BOS are comparable with those of the papers, so BOS is used only if the model is clearly better with
# it:
#
#     d_w = NLL_w without − NLL_w with        BOS if  mean d ≥ ln 1.05  and  mean d ≥ t · sd(d) / √n
#
# over n windows of the calibration text. The predicted tokens are the same with and without BOS: all but the first of
# the window's text. t is the 97.5 % quantile of Student's distribution with n − 1 degrees of freedom. For n = 1 the
# first condition alone decides.

BOS_WINDOWS, BOS_TOKENS = 8, 512  # at most; enough to detect an effect of a few per cent
LEAST = math.log(1.05)  # nats per token


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
            taken=is_better(rises(with_bos, without)),
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
    """Whether BOS lowers the NLL clearly; `gains`: NLL without minus with BOS of at most `BOS_WINDOWS` windows, in nats
    per token. False if a gain is not finite.
    """
    mean, count = statistics.fmean(gains), len(gains)
    if not math.isfinite(mean):
        return False
    doubt = interval_factor(count) * statistics.stdev(gains) / math.sqrt(count) if count > 1 else 0.0
    return mean >= max(LEAST, doubt)


# --- Greedy continuations of prompts by the dense and the pruned models, as stored in a configuration and on a study.

# Eight usual words each: most tokenizers make equally many tokens of them, so they are one batch without padding.
PROMPTS = (
    "The capital of France is the city of",
    "Once upon a time there was a little",
    "To make a cup of tea you first",
)
NAMES = ("dense", "uniform", "best")


class Continuations(FrozenModel):
    """Continuations of each prompt by dense, uniform with the same pruner, and best, in the order of `prompts`.

    `others`: the same of the best plan of each other allocation, by its name.
    `tokens`: the most that were generated. Fewer if a model ends its text. Prompts are continued as they are, without a
    chat template.
    """

    prompts: tuple[str, ...] = Field(min_length=1)
    tokens: PositiveInt
    dtype: str
    dense: tuple[str, ...]
    uniform: tuple[str, ...]
    best: tuple[str, ...]
    others: dict[str, tuple[str, ...]] = Field({}, max_length=100)

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if any(len(self.of(name)) != len(self.prompts) for name in self.names):
            raise ValueError("not one continuation for each prompt")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The models, the best last."""
        return "dense", "uniform", *self.others, "best"

    def of(self, name: str) -> tuple[str, ...]:
        """The continuations of a model."""
        return {**self.others, "dense": self.dense, "uniform": self.uniform, "best": self.best}[name]

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Each prompt with its continuation by each model."""
        for index, prompt in enumerate(self.prompts):
            yield prompt, {name: self.of(name)[index] for name in self.names}


# --- Perplexity over several draws of the calibration text: the part of its spread that is due to the draw.
#
# The measured windows stay the same; the pruner is calibrated with other windows in each draw. What was fitted to the
# calibration text, such as the sparsities of `gradient-rows`, is fitted anew to each draw's own; parameters of the
# search stay. Draws share no text. The spread is the standard deviation between draws, not the standard error of
# their mean.
#
#     change in draw d = exp(mean of NLL_best - NLL_uniform over windows) - 1, both calibrated with draw d


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

    def how(self, items: str, unit: str, is_fitted: bool) -> str:
        """Says what the numbers are; `unit`: of what plans are fitted to; `is_fitted`: the plan is, to the text."""
        text = f"calibrated with other {items} each time, "
        if self.fitted_to:
            each, own = self.fitted_to
            text += f"the plan fitted anew to {each:,} {unit} of each draw, "
            text += f"where the plan itself is fitted to {own:,}, " if each != own else ""
        elif is_fitted:
            text += "all with the plan that was fitted to the first draw, "
        return f"{text}mean ± standard deviation between draws"


def over_draws(
    nlls: Sequence[Sequence[float]], uniform: Sequence[Sequence[float]] | None, fitted_to: tuple[int, int] | None = None
) -> OverDraws | None:
    """From window NLLs by draw and those of uniform; None for a single draw or one without a number."""
    values = [perplexity(one).value for one in nlls]
    pairs = zip(uniform or (), nlls, strict=bool(uniform))
    changes = [change(base, own).value for base, own in pairs if len(base) == len(own)]
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


# --- Results of the command `speedup`, as stored in a configuration: bytes, zeros, tokens or images per second.

Side = Literal["dense", "sparse"]
Phase = Literal["prefill", "decode", "decode in a CUDA graph", "classify"]
SIDES: tuple[Side, ...] = ("dense", "sparse")
GRAPH: Phase = "decode in a CUDA graph"  # each token, compiled, with a static cache: no launches by Python
AT_THE_END = TOKENS, STEPS, RUNS = 64, 16, 3  # of a study with `speed`: some seconds of a small model
ROUNDING = "packed "  # begins the names of engines that round the weights: packed bf16, packed int8
Values = tuple[PositiveFloat, ...]


class Sizes(FrozenModel, allow_inf_nan=False):
    """Bytes of all weight files; compressed with zstd, and the sparse ones packed, where that was counted."""

    dense: NonNegativeInt
    sparse: NonNegativeInt
    dense_zstd: NonNegativeInt | None = None
    sparse_zstd: NonNegativeInt | None = None
    packed: NonNegativeInt | None = None


class Rates(FrozenModel, allow_inf_nan=False):
    """Tokens, or images, per second of each run; the runs of both models alternate."""

    dense: Values = Field(min_length=1)
    sparse: Values = Field(min_length=1)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Speed of sparse over dense, run by run."""
        return tuple(sparse / dense for dense, sparse in zip(self.dense, self.sparse, strict=True))


class Measured(FrozenModel, allow_inf_nan=False):
    """Rates of one engine, of a language model or an image classifier, and where it ran.

    `logits`: the largest difference from those of transformers, over the largest logit.
    """

    engine: str
    version: str
    dtype: str
    device: str
    cores: PositiveInt | None
    batch: PositiveInt = Field(1, description="texts or images that are computed at once; rates are of all together")
    logits: float | None
    tokens: PositiveInt | None = Field(None, description="of the prompt")
    steps: PositiveInt | None = Field(None, description="tokens decoded after the prompt in a run, one at a time")
    prefill: Rates | None = None
    decode: Rates | None = None
    graph: Rates | None = Field(None, description="as decode, in a CUDA graph and with a static cache; on a GPU")
    classify: Rates | None = None

    @property
    def name(self) -> str:
        """Engine, number format and batch, the name of a row in tables."""
        return f"{self.engine}, {self.dtype}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def where(self) -> str:
        """The device and the number of cores used."""
        return self.device if self.cores is None else f"{self.device}, {self.cores} core" + "s" * (self.cores != 1)

    @property
    def rates(self) -> dict[Phase, Rates]:
        """The rates of each phase that was measured; the last is the one that is compared."""
        by_phase: dict[Phase, Rates | None]
        by_phase = {"prefill": self.prefill, "decode": self.decode, GRAPH: self.graph, "classify": self.classify}
        return {phase: rates for phase, rates in by_phase.items() if rates is not None}


class Speed(FrozenModel, allow_inf_nan=False):
    """Sizes, share of zeros by kind of linear, and one row per engine.

    By `speedup` torch is among the engines; at the end of a study the engine `packed` is measured alone, where torch
    computes the dense model too.
    """

    sizes: Sizes
    zeros: dict[str, float] = Field({}, max_length=10_000)
    engines: tuple[Measured, ...] = ()

    @property
    def unit(self) -> str:
        """The unit that is counted per second."""
        return "images" if any(row.classify for row in self.engines) else "tokens"

    def torch_dense(self, phase: Phase) -> float:
        """Median rate of the dense model in torch, if that was measured, in its fastest format and way to decode."""
        ways = ("decode", GRAPH) if phase in ("decode", GRAPH) else (phase,)
        rows = [(row.engine == "torch", row.rates) for row in self.engines]
        return max((by_torch, median(rates[way].dense)) for by_torch, rates in rows for way in ways if way in rates)[1]

    @property
    def fastest(self) -> float | None:
        """Median tokens per second of the sparse model while it decodes one at a time, in its fastest engine.

        Of an image classifier images per second. Engines that round weights are left out: it would be another model.
        """
        exact = (list(row.rates.values()) for row in self.engines if not row.engine.startswith(ROUNDING))
        return max((median(rates[-1].sparse) for rates in exact if rates), default=None)

    def over_torch(self, row: Measured, phase: Phase) -> float:
        """Median speed of an engine's sparse model over `torch_dense`."""
        return median(row.rates[phase].sparse) / self.torch_dense(phase)


def spread(values: tuple[float, ...], digits: str) -> str:
    """Formats runs as `median (lowest to highest)`."""
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
