"""Statistics of the inputs of a linear, accumulated batch by batch.

X inputs [tokens, in] of a linear over all calibration tokens. Linears with the same input tensor (such as query, key
and value) share one object, and what is derived from X is computed once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from atp_tune.errors import TrialError
from atp_tune.pruners import Statistics

Tensors = dict[str, Tensor]  # by name
DAMPING_RAISES = 4
PANEL, WIDE_PANEL = 256, 2048  # rows of the Hessian that are updated at a time, on the CPU and on other devices


class InputNorms:
    """‖X_j‖₂ of each input j over all tokens, in float32."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._squares = torch.zeros(inputs, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., in] of any float dtype."""
        flat = x.reshape(-1, x.shape[-1])
        if flat.device.type == "cuda":  # one kernel, which reads the inputs once and writes no copy
            self._squares += torch.linalg.vector_norm(flat, dim=0, dtype=torch.float32).square_()
            return
        flat = flat.to(torch.float32, copy=True)
        self._squares += flat.mul_(flat).sum(0)  # in place: on a CPU a quarter of the time of vector_norm

    def tensors(self) -> Tensors:
        """The sums of squares [in]."""
        return {"squares": self._squares}

    @staticmethod
    def bytes_for(inputs: int) -> int:
        """Upper bound on the bytes of `tensors`."""
        return 4 * inputs

    @classmethod
    def restored(cls, tensors: Tensors) -> Self:
        """Restores statistics from `tensors`."""
        statistics = cls.__new__(cls)
        statistics._squares = tensors["squares"]
        return statistics

    def squares(self) -> Tensor:
        """The sums of squares [in]; TrialError if one is not finite."""
        return finite(self._squares, "norms of inputs")

    def norms(self) -> Tensor:
        """The norms [in]; TrialError if one is not finite."""
        return self.squares().sqrt()


class InputMoments:
    """Norm ‖X_j‖₂, mean and variance of each input j over all tokens, in float32.

    Batches are merged by means and squared deviations, so that a small variance with a large mean stays exact.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._norms = InputNorms(inputs, device)
        self._means = torch.zeros(inputs, dtype=torch.float32, device=device)
        self._deviations = torch.zeros_like(self._means)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., in] of any float dtype."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        self._norms.add(flat)
        before, new = self.tokens, len(flat)
        self.tokens += new
        means = flat.mean(0)  # not var_mean, which is slower and in some releases rounds equal columns differently
        shift = means - self._means
        self._means += shift * (new / self.tokens)
        self._deviations += (flat - means).square_().sum(0) + shift.square() * (before * new / self.tokens)

    def tensors(self) -> Tensors:
        """Sums of squares, means and sums of squared deviations [in], and the number of tokens."""
        own = {"means": self._means, "deviations": self._deviations, "tokens": torch.tensor(self.tokens)}
        return self._norms.tensors() | own

    @staticmethod
    def bytes_for(inputs: int) -> int:
        """Upper bound on the bytes of `tensors`."""
        return 12 * inputs + 8

    @classmethod
    def restored(cls, tensors: Tensors) -> Self:
        """Restores statistics from `tensors`."""
        statistics = cls.__new__(cls)
        statistics._norms = InputNorms.restored(tensors)
        statistics._means, statistics._deviations = tensors["means"], tensors["deviations"]
        statistics.tokens = int(tensors["tokens"])
        return statistics

    def norms(self) -> Tensor:
        """The norms [in]."""
        return self._norms.norms()

    def mean_squares(self) -> Tensor:
        """The means of squares [in]; TrialError if one is not finite."""
        return self._norms.squares() / max(1, self.tokens)

    def means(self) -> Tensor:
        """The means [in]."""
        return self._means

    def variances(self) -> Tensor:
        """The variances [in], over all tokens."""
        return self._deviations / max(1, self.tokens)


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Several:
    """Statistics of several `kinds` of the same inputs, by names of parts, which begin the names of their tensors."""

    kinds: ClassVar[Mapping[str, type[Statistics]]]

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.parts: dict[str, Any] = {part: kind(inputs, device) for part, kind in self.kinds.items()}

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., in] of any float dtype."""
        for own in self.parts.values():
            own.add(x)

    def tensors(self) -> Tensors:
        """The tensors of all parts."""
        return {f"{part}.{name}": x for part, own in self.parts.items() for name, x in own.tensors().items()}

    @classmethod
    def restored(cls, tensors: Tensors) -> Self:
        """Restores statistics from `tensors`."""
        statistics = cls.__new__(cls)
        statistics.parts = {part: kind.restored(below(tensors, f"{part}.")) for part, kind in cls.kinds.items()}
        return statistics

    @classmethod
    def bytes_for(cls, inputs: int) -> int:
        """Upper bound on the bytes of `tensors`."""
        return sum(kind.bytes_for(inputs) for kind in cls.kinds.values())


@dataclass(frozen=True)
class Scaled:
    """H̃_jk = H_jk / (d_j d_k) with d_j = √H_jj and so a diagonal of 1; in float32."""

    scales: Tensor  # d [in]
    matrix: Tensor  # H̃ [in, in]

    def inverse(self, rho: float) -> Tensor:
        """(H̃ + ρI)⁻¹ [in, in]; by elimination, if rounding has made that matrix one that is not positive definite."""
        raised = self.matrix.to(precise(self.matrix.device), copy=True)
        raised.diagonal().add_(rho)
        factor, failed = torch.linalg.cholesky_ex(raised)
        inverse = torch.linalg.inv(raised) if failed else torch.cholesky_inverse(factor)
        return inverse.to(self.matrix.device)


class Hessian:
    """H = 2 Xᵀ X / n of the layer-wise squared error over n tokens, float32 [in, in], and its factors.

    H is symmetric: only the upper triangle is accumulated, panel by panel, at little over half the cost.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._gram = torch.zeros(
            inputs, inputs, dtype=torch.float32, device=device
        )  # n/2 H; invalid below the diagonal
        self.tokens = 0
        self._factors: Tensors = {}
        self._scaled = dict[float, Scaled]()

    def add(self, x: Tensor) -> None:
        """Adds inputs [..., in] of any float dtype."""
        flat = x.reshape(-1, x.shape[-1])
        widen = widens(flat.device, flat.dtype)
        flat = flat if widen else flat.float()
        panel = PANEL if flat.device.type == "cpu" else WIDE_PANEL
        for start in range(0, flat.shape[1], panel):
            left, right = flat[:, start : start + panel].T, flat[:, start:]
            part = self._gram[start : start + panel, start:]
            if widen:
                part += torch.ops.aten.mm.dtype(left, right, torch.float32)
            else:
                part.addmm_(left, right)
        self.tokens += flat.shape[0]
        self._factors.clear()
        self._scaled.clear()

    def tensors(self) -> Tensors:
        """The sum Xᵀ X [in, in], the number of tokens, and the computed factors."""
        factors = {f"factor {name}": factor for name, factor in self._factors.items()}
        return {"gram": self._gram, "tokens": torch.tensor(self.tokens), **factors}

    @staticmethod
    def bytes_for(inputs: int) -> int:
        """Upper bound on the bytes of `tensors`."""
        return 8 * inputs**2 + 8

    @classmethod
    def restored(cls, tensors: Tensors) -> Self:
        """Restores statistics from `tensors`."""
        statistics = cls.__new__(cls)
        statistics._gram, statistics.tokens, statistics._scaled = tensors["gram"], int(tensors["tokens"]), {}
        statistics._factors = below(tensors, "factor ")
        return statistics

    def matrix(self) -> Tensor:
        """H [in, in]; inputs that were always zero get 1 on the diagonal, so that H can be inverted."""
        hessian = self._upper().triu_()
        hessian += hessian.triu(1).T
        return hessian

    def _upper(self) -> Tensor:
        """`matrix`, but invalid below the diagonal."""
        hessian = self._gram * (2 / max(1, self.tokens))
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1
        return hessian

    def dead(self) -> Tensor:
        """Mask [in] of the inputs that were zero at every token."""
        return self._gram.diagonal() == 0

    def order(self) -> Tensor:
        """The inputs [in] by the sums of their squares, the largest first; of equal ones the first."""
        return torch.argsort(self._gram.diagonal(), descending=True, stable=True)

    def factor(self, damping: float, ordered: bool = False) -> Tensor:
        """Upper triangular R [in, in] with R Rᵀ = H + damping · mean(diag H) · I, computed once per damping.

        `ordered`: of H with its inputs in `order`. If H is not positive definite in float32, the damping is multiplied
        by 10, up to four times; then TrialError.
        """
        name = f"{damping!r}{' ordered' * ordered}"
        if name not in self._factors:
            order = self.order() if ordered else None
            self._factors[name] = _factor(self._upper() if order is None else self.matrix()[order][:, order], damping)
        return self._factors[name]

    def scaled(self, damping: float) -> Scaled:
        """H + damping · mean(diag H) · I, scaled; computed once per damping.

        Inputs that were always zero have only the damping on the diagonal. TrialError if H is not finite.
        """
        if damping not in self._scaled:
            hessian = self.matrix()
            hessian.diagonal().masked_fill_(self.dead(), 0)
            finite(hessian, "Hessian").diagonal().add_(damping * hessian.diagonal().mean())
            scales = hessian.diagonal().sqrt()
            scales = torch.where(scales > 0, scales, 1)
            self._scaled[damping] = Scaled(scales, hessian / scales / scales[:, None])
        return self._scaled[damping]


def finite(statistic: Tensor, what: str) -> Tensor:
    """The statistic; TrialError if it is not finite."""
    if not statistic.isfinite().all():
        raise TrialError(f"{what} not finite: the model's activations overflow; try dtype = bfloat16 or float32")
    return statistic


def _factor(hessian: Tensor, damping: float) -> Tensor:
    """R = J L J, with J the reversal of order and J H J = L Lᵀ, so that R is upper triangular and R Rᵀ = H.

    Reads no entry below the diagonal. At most two matrices exist at a time: of a wide linear each takes gigabytes.
    """
    device, mean = hessian.device, finite(hessian.diagonal(), "Hessian").mean()
    diagonal = hessian.diagonal().flip(0)
    hessian = hessian.flip(0, 1).to(precise(device))
    for power in range(DAMPING_RAISES + 1):
        hessian.diagonal().copy_(diagonal + damping * 10**power * mean)
        lower: Tensor
        lower, wrong = torch.linalg.cholesky_ex(hessian)
        if not wrong and lower.diagonal().isfinite().all():
            del hessian
            lower = lower.flip(0, 1)
            return lower.contiguous().to(device)  # the layout of a saved factor, so that products round equally
    raise TrialError(f"Hessian not positive definite, even with damping {damping * 10**DAMPING_RAISES:g}")


def precise(device: torch.device) -> torch.device:
    """Where float64 and Cholesky factors are computed: MPS lacks, or lacked, both."""
    return torch.device("cpu") if device.type == "mps" else device


def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch can multiply matrices of this dtype with a float32 result, without float32 copies.

    With ROCm, whose devices are called cuda too, it has the overload and raises.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and dtype in {torch.bfloat16, torch.float16} and hasattr(torch.ops.aten.mm, "dtype")
