"""Results of the command `speedup`, as stored in a configuration: bytes, zeros, tokens per second."""

from statistics import median
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from atp_tune.frozen import FrozenModel

Side = Literal["dense", "sparse"]
Phase = Literal["prefill", "decode"]
SIDES: tuple[Side, ...] = ("dense", "sparse")
PHASES: tuple[Phase, ...] = ("prefill", "decode")
ROUNDING = "packed "  # begins the names of engines that round the weights: packed bf16, packed int8
Values = tuple[PositiveFloat, ...]


class Sizes(FrozenModel, allow_inf_nan=False):
    """Bytes of all weight files, plain and compressed with zstd; of the sparse ones packed, if that was counted."""

    dense: NonNegativeInt
    sparse: NonNegativeInt
    dense_zstd: NonNegativeInt
    sparse_zstd: NonNegativeInt
    packed: NonNegativeInt | None = None


class Rates(FrozenModel, allow_inf_nan=False):
    """Tokens per second of each run; the runs of both models alternate."""

    dense: Values = Field(min_length=1)
    sparse: Values = Field(min_length=1)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Speed of sparse over dense, run by run."""
        return tuple(sparse / dense for dense, sparse in zip(self.dense, self.sparse, strict=True))


class Measured(FrozenModel, allow_inf_nan=False):
    """Rates of one engine; `logits`: the largest difference from the logits of transformers, over the largest logit."""

    engine: str
    version: str
    dtype: str
    device: str
    cores: PositiveInt | None
    tokens: PositiveInt = Field(description="of the prompt")
    steps: PositiveInt = Field(description="tokens decoded after the prompt in a run, one at a time")
    batch: PositiveInt = Field(1, description="texts that are read and decoded at once; rates are of all together")
    logits: float | None
    prefill: Rates
    decode: Rates

    def rates(self, phase: Phase) -> Rates:
        """The rates of a phase."""
        return self.prefill if phase == "prefill" else self.decode

    @property
    def name(self) -> str:
        """Engine, number format and batch, the name of a row in tables."""
        return f"{self.engine}, {self.dtype}" + (f", batch {self.batch}" if self.batch > 1 else "")

    @property
    def where(self) -> str:
        """The device and the number of cores used."""
        return self.device if self.cores is None else f"{self.device}, {self.cores} core" + "s" * (self.cores != 1)


class Speed(FrozenModel, allow_inf_nan=False):
    """Sizes, share of zeros by kind of linear, and one row per engine; torch is always among them."""

    sizes: Sizes
    zeros: dict[str, float]
    engines: tuple[Measured, ...]

    def torch_dense(self, phase: Phase) -> float:
        """Median tokens per second of the dense model in torch, in its fastest number format."""
        return max(median(row.rates(phase).dense) for row in self.engines if row.engine == "torch")

    @property
    def fastest(self) -> float | None:
        """Median tokens per second of the sparse model while it decodes one at a time, in its fastest engine.

        Engines that round its weights are left out: it would be another model.
        """
        exact = (row for row in self.engines if not row.engine.startswith(ROUNDING))
        return max((median(row.decode.sparse) for row in exact), default=None)

    def over_torch(self, row: Measured, phase: Phase) -> float:
        """Median speed of an engine's sparse model over `torch_dense`."""
        return median(row.rates(phase).sparse) / self.torch_dense(phase)


def spread(values: tuple[float, ...], digits: str) -> str:
    """Formats runs as `median (lowest to highest)`."""
    low, middle, high = (format(value, digits) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"
