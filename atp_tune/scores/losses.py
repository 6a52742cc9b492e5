"""Losses by logits, and their gradient: NLL of the targets, and KL divergence from the dense model.

    NLL         -ln q_y, q the softmax of the logits and y the target
    KL(p ‖ q)   Σ p ln(p / q), p the softmax of the dense model's logits
    loss        share · NLL + (1 - share) · KL(p ‖ q)
    gradient    q - share · y - (1 - share) · p by the logits, y one-hot

Source of the loss: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, with temperature 1.

Logits [items, classes], of any number format, are converted to float32 a few rows at a time, so that the float32 copy
stays in the CPU's cache: memory traffic would cost more than the matrix product.
"""

import torch
from torch import Tensor
from torch.nn import functional

CACHED = 1 << 17  # float32 logits at a time per thread of a CPU (512 KB); other devices take all
COMPARED = 1 << 28  # the same for KL on other devices (1 GB)


def token_nlls(logits: Tensor, targets: Tensor) -> Tensor:
    """NLL [tokens] in float32 of logits z [tokens, vocabulary]: ln Σ exp(z - max z) - (z_target - max z)."""
    rows = rows_at_a_time(logits) or len(logits)
    nlls = []
    for part, target in zip(torch.split(logits, rows), torch.split(targets, rows), strict=True):
        z = part.float()
        z = z - z.amax(1, keepdim=True)
        picked = z.gather(1, target[:, None]).squeeze(1)
        nlls.append(z.exp_().sum(1).log_() - picked)
    return torch.cat(nlls)


def token_kls(dense: Tensor, logits: Tensor) -> Tensor:
    """KL(p ‖ q) [tokens] in float32, p from dense logits [tokens, vocabulary], q from `logits`; never negative."""
    rows = rows_compared(logits)
    kls = []
    for one, other in zip(torch.split(dense, rows), torch.split(logits, rows), strict=True):
        p, q = one.float().log_softmax(1), other.float().log_softmax(1)
        kls.append(functional.kl_div(q, p, reduction="none", log_target=True).sum(1).clamp_(min=0))
    return torch.cat(kls)


def mean_loss(logits: Tensor, targets: Tensor, dense: Tensor | None, share: float = 0.5) -> Tensor:
    """The mean over items of the loss, in float32; without `dense` logits the mean NLL."""
    nll = token_nlls(logits, targets).mean()
    return nll if dense is None else share * nll + (1 - share) * token_kls(dense, logits).mean()


def loss_gradient(
    logits: Tensor, targets: Tensor, dense: Tensor | None, weight: float = 1.0, share: float = 0.5
) -> Tensor:
    """Gradient of `weight` times the summed loss by the logits, in their format; without `dense` logits of the NLL."""
    found, rows = torch.empty_like(logits), rows_compared(logits)
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        q, target = logits[here].float().softmax(1), targets[here]
        if dense is not None:
            q.sub_(dense[here].float().softmax(1), alpha=1 - share)
        q[torch.arange(len(q), device=q.device), target] -= 1.0 if dense is None else share
        found[here] = q.mul_(weight)
    return found


def rows_at_a_time(logits: Tensor) -> int | None:
    """Number of float32 rows of logits [tokens, vocabulary] that fit in a CPU's caches; None on other devices."""
    if logits.device.type != "cpu":
        return None
    return torch.get_num_threads() * max(1, CACHED // logits.shape[1])


def rows_compared(logits: Tensor) -> int:
    """Number of rows of logits [tokens, vocabulary] whose distribution is compared with the dense model's at a time."""
    return rows_at_a_time(logits) or max(1, COMPARED // logits.shape[1])
