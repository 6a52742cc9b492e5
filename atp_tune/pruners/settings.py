"""Settings of pruners, the keys of their tables in a study file. Loads no torch; pruners inherit from them."""

from typing import Any, Literal

from pydantic import Field

from atp_tune.errors import UserError
from atp_tune.utils.registry import Origin, SettingsTable


class WandaSettings(SettingsTable):
    """Settings of Wanda (Sun et al. 2024)."""

    compare: Literal["row", "row-variant", "matrix"] = "row"
    (
        "prune the lowest scores of each row, the smallest cumulative shares of row sums in the matrix, or the "
        "lowest scores of the matrix"
    )


class SparseGPTSettings(SettingsTable):
    """Settings of SparseGPT (Frantar & Alistarh 2023)."""

    damping: float = Field(0.01, gt=0)
    """added to the diagonal of the Hessian, as a share of its mean"""
    columns: int = Field(128, ge=1)
    """columns per block; one mask is chosen per block"""


class DSnoTSettings(SettingsTable):
    """Settings of DSnoT (Zhang et al. 2024)."""

    initial: Literal["wanda", "magnitude"] = "wanda"
    """score that chooses the initial mask"""
    cycles: int = Field(50, ge=0)
    """maximum number of swaps per row"""
    threshold: float = Field(0.1, ge=0)
    """error per row, over 2048 tokens, below which swapping stops"""
    power: float = Field(1.0, ge=0)
    """power of the variance in the score of weights to restore"""


class ALPSSettings(SettingsTable):
    """Settings of ALPS (Meng et al. 2024)."""

    damping: float = Field(0.01, gt=0)
    """added to the diagonal of the Hessian, as a share of its mean"""
    rho: float = Field(0.1, gt=0)
    """initial penalty of ADMM"""
    iterations: int = Field(300, ge=1)
    """maximum number of ADMM iterations"""
    steps: int = Field(10, ge=0)
    """steps of conjugate gradients on the final mask"""


class ChannelSettings(SettingsTable):
    """Settings of `pattern = "channels"`, structured pruning."""

    heads: bool = False
    """also remove groups of query heads with their key/value head"""
    score: Literal["fluctuation", "norm"] = "norm"
    """by variance (FLAP) or norm (Wanda) of what a channel carries; magnitude measures neither"""
    refit: bool = True
    """fit the columns that stay to the outputs before, by least squares"""
    damping: float = Field(0.01, gt=0)
    """ridge of the refit, as a share of the Hessian's mean diagonal"""
    round_to: int = Field(8, ge=1)
    """MLP channels that stay are a multiple of this"""


def finished(pruner: Any, origin: Origin) -> type[SettingsTable]:
    """The class of a pruner that is a plug-in; UserError if it is none, or if its settings have no defaults."""
    if not isinstance(pruner, type) or not issubclass(pruner, SettingsTable):
        raise UserError(f"{origin}: is no pruner: must be a class that inherits from atp_tune.SettingsTable")
    if not callable(getattr(pruner, "prune", None)):
        raise UserError(f"{origin}: is no pruner: has no method prune(self, weight, sparsity, statistics)")
    measures = getattr(pruner, "measures", origin)
    if measures is origin:
        raise UserError(f"{origin}: has no class variable measures: None, or a class of statistics such as InputNorms")
    if measures is not None and not all(
        hasattr(measures, name) for name in ("add", "tensors", "restored", "bytes_for")
    ):
        raise UserError(f"{origin}: measures must be None or a class of statistics, such as InputNorms")
    needed = [name for name, field in pruner.model_fields.items() if field.is_required()]
    if needed:
        raise UserError(f"{origin}: its setting {needed[0]} needs a default")
    return pruner
