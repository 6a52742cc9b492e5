"""What `speedup` finds of a sparse model, as a configuration holds it: bytes, zeros, tokens per second of each run."""

from statistics import median
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from atp_tune.frozen import FrozenModel

Side = Literal["dense", "sparse"]
Phase = Literal["prefill", "decode"]
SIDES: tuple[Side, ...] = ("dense", "sparse")
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Values = tuple[PositiveFloat, ...]


class Sizes(FrozenModel, allow_inf_nan=False):
    """Bytes of all weight files, as they are and compressed with zstd."""

    dense: NonNegativeInt
    sparse: NonNegativeInt
    dense_zstd: NonNegativeInt
    sparse_zstd: NonNegativeInt


class Rates(FrozenModel, allow_inf_nan=False):
    """Tokens per second, run by run: the runs of both models took turns."""

    dense: Values = Field(min_length=1)
    sparse: Values = Field(min_length=1)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Sparse against dense, run by run."""
        return tuple(sparse / dense for dense, sparse in zip(self.dense, self.sparse, strict=True))


class Measured(FrozenModel, allow_inf_nan=False):
    """One engine: what it is, on what it ran, and its rates; `logits`: the largest difference to transformers'."""

    engine: str
    version: str
    dtype: str
    device: str
    cores: PositiveInt | None
    tokens: PositiveInt = Field(description="of the prompt")
    steps: PositiveInt = Field(description="tokens of a run of decode, one at a time, after the prompt")
    logits: float | None
    prefill: Rates
    decode: Rates

    def rates(self, phase: Phase) -> Rates:
        """Rates of one phase."""
        return self.prefill if phase == "prefill" else self.decode

    @property
    def name(self) -> str:
        """Engine and number format, which together are one row."""
        return f"{self.engine}, {self.dtype}"

    @property
    def where(self) -> str:
        """The device, and how many of its cores."""
        return self.device if self.cores is None else f"{self.device}, {self.cores} core" + "s" * (self.cores != 1)


class Speed(FrozenModel, allow_inf_nan=False):
    """Sizes, share of zeros by kind of linear, and a row for each engine; torch is always there."""

    sizes: Sizes
    zeros: dict[str, float]
    engines: tuple[Measured, ...]

    def torch_dense(self, phase: Phase) -> float:
        """Tokens per second of the dense model in torch, in the number format in which it is fastest."""
        return max(median(row.rates(phase).dense) for row in self.engines if row.engine == "torch")

    def over_torch(self, row: Measured, phase: Phase) -> float:
        """An engine's sparse model against torch's best dense one, by medians."""
        return median(row.rates(phase).sparse) / self.torch_dense(phase)


def spread(values: tuple[float, ...], digits: str) -> str:
    """The median of some runs, and their lowest and highest."""
    low, middle, high = (format(value, digits) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"
