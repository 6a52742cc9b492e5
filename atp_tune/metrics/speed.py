"""Results of the command `speedup`, as stored in a configuration: bytes, zeros, tokens or images per second."""

from statistics import median
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from atp_tune.frozen import FrozenModel

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
        found: dict[Phase, Rates | None]
        found = {"prefill": self.prefill, "decode": self.decode, GRAPH: self.graph, "classify": self.classify}
        return {phase: rates for phase, rates in found.items() if rates is not None}


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
    low, middle, high = (format(value, digits) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"
