"""The linears of a block, the weight matrices that are pruned.

Pruned: `nn.Linear` and its subclasses, GPT-2's `Conv1D`, experts of a mixture. Dense: routers, convolutions over
tokens, parameters of a recurrence.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atp_tune.checkpoints.experts import expert_name, expert_weights, find_gates, holds_experts
from atp_tune.checkpoints.quantized import check_plain
from atp_tune.errors import UserError

OTHERS = 0.25  # largest size of other matrices, relative to the linears of a block


@dataclass(frozen=True)
class Linear:
    """A prunable weight matrix: the path of its module in the block; `transposed`: the weight is stored [in, out].

    The matrix of an expert is a slice of a 3-D tensor; its name ends in the index, `[expert]`.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool
    expert: int | None = None

    @property
    def key(self) -> str:
        """Name in the block of the tensor that holds the weight."""
        return f"{self.name}.weight" if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def module(self) -> str:
        """Path in the block of the module that multiplies by the weight."""
        return self.key.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def matrix(self, stored: Tensor) -> Tensor:
        """View [out, in] of the weight in the tensor that holds it."""
        own = stored if self.expert is None else stored[self.expert]
        return own.T if self.transposed else own


def is_attention(name: str) -> bool:
    """Whether a linear belongs to attention, by its path: attn or attention."""
    return "attn" in name or "attention" in name


def is_value(name: str) -> bool:
    """Whether a linear is the value projection of attention, not fused with others."""
    return name.rpartition(".")[2] in ("v_proj", "value")


def is_state_space(name: str) -> bool:
    """Whether a linear is Mamba's Δ projection, whose weight the model may read without calling the module, so that
    its inputs are unknown.
    """
    return name.rpartition(".")[2] == "dt_proj"


def is_position_bias(name: str) -> bool:
    """Whether a linear makes a bias of attention from positions, not from images, as SwinV2's."""
    return "position_bias" in name


def find_linears(block: nn.Module, of_images: bool = False) -> list[Linear]:
    """The prunable linears of a block, in the order of its modules.

    `of_images`: of an image classifier, whose other matrices, which are convolutions and biases by position, stay
    dense. Errors: UserError if there is none, or in a language model for a weight of an unknown kind.
    """
    if of_images:
        linears = ((name, part) for name, part in block.named_modules() if isinstance(part, nn.Linear))
        return [
            Linear(name, part.out_features, part.in_features, False)
            for name, part in linears
            if not is_position_bias(name)
        ]
    experts = {name: _expert_linears(name, module) for name, module in block.named_modules() if holds_experts(module)}
    gates, found = find_gates(block), []
    for name, module in block.named_modules():
        if name in experts:
            found += experts[name]
        elif isinstance(module, nn.Linear | Conv1D) and module not in gates and not is_state_space(name):
            transposed = isinstance(module, Conv1D)
            rows, columns = module.weight.T.shape if transposed else module.weight.shape
            found.append(Linear(name, rows, columns, transposed))
    check_plain(block, (linear.key for linear in found))
    if not found:
        raise UserError(f"model block {type(block).__name__}: has no linear that can be pruned")
    _check_others(block, found, gates)
    return found


def _check_others(block: nn.Module, found: list[Linear], gates: set[nn.Module]) -> None:
    """UserError if matrices outside the linears hold more than `OTHERS`: the block would be denser than reported.

    Routers and recurrences have small ones.
    """
    known = {linear.key for linear in found} | {
        f"{name}.weight" for name, module in block.named_modules() if module in gates
    }
    others = {
        name: parameter.numel()
        for name, parameter in block.named_parameters()
        if name not in known
        and sum(size > 1 for size in parameter.shape) > 1
        and not is_state_space(name.rpartition(".")[0])
    }
    if sum(others.values()) > OTHERS * sum(linear.size for linear in found):
        name = max(others, key=others.__getitem__)
        kind = type(block.get_submodule(name.rpartition(".")[0])).__name__
        raise UserError(f"model module {kind}: {name.rpartition('.')[2]} is a matrix in a form that is not known")


def _expert_linears(path: str, module: nn.Module) -> list[Linear]:
    found = []
    for weight in expert_weights(module):
        experts, *shape = getattr(module, weight).shape
        rows, columns = shape[::-1] if module.is_transposed else shape
        found += [
            Linear(expert_name(path, weight, expert), rows, columns, bool(module.is_transposed), expert)
            for expert in range(experts)
        ]
    return found
