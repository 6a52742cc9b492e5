"""The table `[quantize]` of a study with `bits`: how weights are rounded, and the bits that blocks may have."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from atp_tune.allocations.bits import share_of, stored_bits
from atp_tune.config.patterns import parse
from atp_tune.config.prune import PruneConfig
from atp_tune.pruners import QUANTIZERS, Pruner
from atp_tune.utils.frozen import FrozenModel, SettingsTable, check_once

if TYPE_CHECKING:
    from atp_tune.config.study import Study

QuantizerName = Literal["rtn", "gptq"]
Width = Annotated[int, Field(ge=2, le=8)]
WIDTHS = (2, 3, 4, 5, 6, 8)
OF_ZEROS = ("er", "erk", "global", "gradient-rows")  # allocations that no number of bits follows from
PER_LINEAR = ("gradient", "alphapruning-linear", *OF_ZEROS)  # those that differ within blocks


class QuantizeConfig(SettingsTable):
    """How weights are rounded to fewer bits: the quantizers to compare, the groups that share a scale, the bits."""

    quantizers: tuple[QuantizerName, ...] = Field(
        ("gptq",), min_length=1, description="rtn: round to nearest, gptq; Optuna chooses, if there are several"
    )
    group_size: int = Field(128, ge=-1, description="consecutive inputs of a row that share a scale; -1: the whole row")
    symmetric: bool = Field(False, description="values from -max to max, without a zero point")
    damping: float = Field(
        0.01, gt=0, description="of gptq, added to the diagonal of the Hessian, as a share of its mean"
    )
    act_order: bool = Field(False, description="of gptq: columns in the order of their inputs' size, not as they stand")
    widths: tuple[Width, ...] = Field(WIDTHS, min_length=1, description="the bits that a block, or a linear, may have")

    @model_validator(mode="after")
    def _known(self) -> Self:
        check_once(self.quantizers, "quantizers")
        if list(self.widths) != sorted(set(self.widths)):
            raise ValueError("widths: must ascend, each once")
        if self.group_size == 0:
            raise ValueError("group_size: must be at least 1, or -1 for the whole row, got 0")
        return self

    def told(self, quantizer: str) -> dict[str, Any]:
        """The settings that determine what a quantizer does; rtn has no `damping`."""
        of_gptq = ["damping", *(["act_order"] if self.act_order else [])] if quantizer == "gptq" else []
        return self.model_dump(include={"group_size", "symmetric", *of_gptq})

    def stored_bits(self, rows: int, columns: int, bits: int, zeros: int = 0) -> int:
        """Bits of a quantized matrix with scales and zero points; without its zeros, if that is less."""
        return stored_bits(rows, columns, bits, self.group_size, self.symmetric, zeros)


@dataclass(frozen=True)
class Treatments:
    """The treatments of weights, in order: zeros by a pruner, if it `prunes`, then rounding, if there is `quantize`."""

    prune: PruneConfig
    quantize: QuantizeConfig | None = None
    prunes: bool = True

    @property
    def short_names(self) -> tuple[str, ...]:
        """The methods to compare, by their short names: pruners, or quantizers where weights are only rounded."""
        return self.prune.short_names if self.prunes or self.quantize is None else self.quantize.quantizers

    def pruner(self, name: str) -> Pruner:
        """A method as the pass over the blocks uses it: zeros stay where kept weights are rounded."""
        own = self.quantize
        if own is None:
            return self.prune.pruner(name)
        rounds_by = own.quantizers[0] if self.prunes else name
        quantizer = QUANTIZERS[rounds_by](own.group_size, own.symmetric, own.damping, own.act_order)
        if self.prunes:
            return self.prune.pruner(name, quantizer)
        from atp_tune.pruners.refinement import Treatment

        return Treatment(None, quantizer=quantizer)

    def measures(self, name: str) -> bool:
        """Whether statistics of inputs are needed; in whole channels, the refit needs them."""
        refits = parse(self.prune.pattern).channels and self.prune.channels.refit
        return refits or self.pruner(name).measures is not None


class Bits(FrozenModel):
    """Bits per weight over all linears of all blocks, weighted by size: the target, what blocks have (`nominal`), and
    with the scales and zero points of groups (`effective`, counted).
    """

    target: float = Field(ge=2, le=8)
    nominal: float = Field(ge=2, le=8)
    effective: float | None = Field(None, ge=0, le=64)


def level_of(study: "Study") -> float:
    """The share between most and fewest bits, which allocations share out."""
    assert study.bits is not None
    return share_of(study.bits, study.quantize.widths)
