"""Structured pruning: scores of whole channels, and the refit of the linear that reads them. No gradients.

    score_c = Σ_{j in c} e_j ‖W_{:,j}‖²                       what channel c carries to the outputs
    W'_K    = W_K + W_G H_GK (H_KK + λI)⁻¹                    K columns that stay, G columns that go

W weight [out, in] of the linear that reads the channels, H = 2 XᵀX/n of its inputs X [n, in], λ a ridge. e_j is

    norm          ‖X_j‖² / n, as in Wanda's score |W_ij| ‖X_j‖; for a single column the order of ‖W_j‖ ‖X_j‖
    fluctuation   the variance of X_j

The refit minimises ‖W X_K'ᵀ - W Xᵀ‖² over W', with λ ‖W' - W_K‖² added. For λ → 0 it is W H_{:,K} H_KK⁻¹.

Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024; An et al.,
"Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, equation 6. In the place of its
bias, which most models have no room for, the refit spreads all that is lost over the columns that stay.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from atp_tune.errors import TrialError
from atp_tune.pruners import Statistics
from atp_tune.pruners.selection import lowest
from atp_tune.pruners.statistics import Hessian, InputMoments, Several, finite

RAISES = 4  # of the ridge, tenfold each, where the system cannot be solved


class HessianAndMoments(Several):
    """The Hessian of a linear's inputs, and their moments."""

    kinds: ClassVar[Mapping[str, type[Statistics]]] = {"hessian": Hessian, "moments": InputMoments}


def channel_scores(weight: Tensor, energies: Tensor, columns: int) -> Tensor:
    """Scores [channels] of a reader's weight [out, in], from the energy [in] of each input; `columns` per channel."""
    squares = weight.float().square().sum(0) * energies
    return squares.view(-1, columns).sum(1)


def magnitude_scores(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Squared norm [channels] of all weights of a channel.

    parts: weights whose rows go [rows, ...], or columns by a transposed view, and the rows per channel.
    """
    return torch.stack([part.float().square().sum(1).view(-1, rows).sum(1) for part, rows in parts]).sum(0)


def lowest_channels(scores: Tensor, count: int) -> Tensor:
    """Mask [channels] of the `count` lowest scores, the first of equal ones first."""
    return lowest(scores[None], count)[0]


def refitted(weight: Tensor, gone: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The weight [out, in] with zeros in the columns `gone` [in], and the others fitted; in the weight's dtype.

    hessian [in, in]; the ridge is `damping` times the mean of its diagonal, and ten times as much, up to four times,
    where the system cannot be solved. Computed in float64. TrialError if H is not finite.
    """
    finite(hessian, "Hessian")
    wide = "cpu" if weight.device.type == "mps" else weight.device  # MPS has no float64
    dense, full = weight.to(wide, torch.float64), hessian.to(wide, torch.float64)
    there, lost = (~gone).to(wide).nonzero()[:, 0], gone.to(wide).nonzero()[:, 0]
    right = dense[:, lost] @ full[lost][:, there]
    system, ridge = full[there][:, there], damping * full.diagonal().mean()
    for power in range(RAISES + 1):
        damped = system.clone()
        damped.diagonal().add_(ridge * 10**power)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if not wrong:
            break
    else:
        raise TrialError(
            f"refit of channels: Hessian not positive definite, even with damping {damping * 10**RAISES:g}"
        )
    made = torch.zeros_like(dense)
    made[:, there] = dense[:, there] + torch.cholesky_solve(right.T, lower).T
    return made.to(weight.device, weight.dtype)
