"""Results of the command `speedup`, as stored in a configuration: bytes, zeros, tokens or images per second."""

from statistics import median
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from atp_tune.frozen import FrozenModel

Side = Literal["dense", "sparse"]
Phase = Literal["prefill", "decode", "decode in a CUDA graph", "classify"]
SIDES: tuple[Side, ...] = ("dense", "sparse")
PHASES: tuple[Phase, ...] = ("prefill", "decode")  # of a language model
GRAPH: Phase = "decode in a CUDA graph"  # each token, compiled, with a static cache: no launches by Python
CLASSIFY: tuple[Phase, ...] = ("classify",)  # of an image classifier
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


class EngineRun(FrozenModel, allow_inf_nan=False):
    """An engine and its device; `logits`: the largest difference from those of transformers, over the largest logit."""

    engine: str
    version: str
    dtype: str
    device: str
    cores: PositiveInt | None
    batch: PositiveInt = Field(1, description="texts or images that are computed at once; rates are of all together")
    logits: float | None

    @property
    def name(self) -> str:
        """Engine, number format and batch, the name of a row in tables."""
        return f"{self.engine}, {self.dtype}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def where(self) -> str:
        """The device and the number of cores used."""
        return self.device if self.cores is None else f"{self.device}, {self.cores} core" + "s" * (self.cores != 1)


class Measured(EngineRun):
    """Rates of a language model in one engine."""

    tokens: PositiveInt = Field(description="of the prompt")
    steps: PositiveInt = Field(description="tokens decoded after the prompt in a run, one at a time")
    prefill: Rates
    decode: Rates
    graph: Rates | None = Field(None, description="as decode, in a CUDA graph and with a static cache; on a GPU")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases that were measured; the last is the one that is compared."""
        return PHASES if self.graph is None else (*PHASES, GRAPH)

    def rates(self, phase: Phase) -> Rates:
        """The rates of a phase; those of `decode` for a graph that there is not."""
        return {"prefill": self.prefill, GRAPH: self.graph}.get(phase) or self.decode


class MeasuredImages(EngineRun):
    """Rates of an image classifier in one engine."""

    classify: Rates

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The one phase."""
        return CLASSIFY

    def rates(self, phase: Phase) -> Rates:
        """The rates of that phase."""
        return self.classify


class Speed(FrozenModel, allow_inf_nan=False):
    """Sizes, share of zeros by kind of linear, and one row per engine.

    `engines` are of a language model, `images` of an image classifier. By `speedup` torch is among them; at the end of
    a study the engine `packed` is measured alone, where torch computes the dense model too.
    """

    sizes: Sizes
    zeros: dict[str, float] = Field({}, max_length=10_000)
    engines: tuple[Measured, ...] = ()
    images: tuple[MeasuredImages, ...] = ()

    @property
    def rows(self) -> tuple[Measured | MeasuredImages, ...]:
        """The engines of either."""
        return (*self.engines, *self.images)

    @property
    def unit(self) -> str:
        """What is counted per second."""
        return "images" if self.images else "tokens"

    def torch_dense(self, phase: Phase) -> float:
        """Median rate of the dense model in torch, in its fastest number format and way to decode."""
        by_torch = [row for row in self.rows if row.engine == "torch"] or self.rows
        ways = {"decode", GRAPH} if phase in ("decode", GRAPH) else {phase}
        return max(median(row.rates(way).dense) for row in by_torch for way in ways)

    @property
    def fastest(self) -> float | None:
        """Median tokens per second of the sparse model while it decodes one at a time, in its fastest engine.

        Of an image classifier images per second. Engines that round weights are left out: it would be another model.
        """
        exact = (row for row in self.rows if not row.engine.startswith(ROUNDING))
        return max((median(row.rates(row.phases[-1]).sparse) for row in exact), default=None)

    def over_torch(self, row: Measured | MeasuredImages, phase: Phase) -> float:
        """Median speed of an engine's sparse model over `torch_dense`."""
        return median(row.rates(phase).sparse) / self.torch_dense(phase)


def spread(values: tuple[float, ...], digits: str) -> str:
    """Formats runs as `median (lowest to highest)`."""
    low, middle, high = (format(value, digits) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"
