"""The settings of each pruner, which are the keys of its table in a study file. No torch: pruners inherit them."""

from typing import Literal

from pydantic import Field

from atp_tune.frozen import SettingsTable


class WandaSettings(SettingsTable):
    """Settings of Wanda (Sun et al. 2024)."""

    compare: Literal["row", "row-variant"] = Field(
        "row", description="the lowest scores of each row, or the smallest cumulated shares of their rows' scores"
    )


class SparseGPTSettings(SettingsTable):
    """Settings of SparseGPT (Frantar & Alistarh 2023)."""

    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    columns: int = Field(128, ge=1, description="columns per block, in which one mask is chosen")


class DSnoTSettings(SettingsTable):
    """Settings of DSnoT (Zhang et al. 2024)."""

    initial: Literal["wanda", "magnitude"] = Field("wanda", description="what chooses the mask to start from")
    cycles: int = Field(50, ge=0, description="swaps per row at most")
    threshold: float = Field(0.1, ge=0, description="error per row, over 2048 tokens, that is left alone")
    power: float = Field(1.0, ge=0, description="of the variance that the worth of a pruned weight is divided by")


class ALPSSettings(SettingsTable):
    """Settings of ALPS (Meng et al. 2024)."""

    damping: float = Field(0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    rho: float = Field(0.1, gt=0, description="penalty that ADMM starts with")
    iterations: int = Field(300, ge=1, description="of ADMM at most")
    steps: int = Field(10, ge=0, description="of conjugate gradients on the final mask")
