"""Experts of a mixture, as transformers 5 stores and runs them.

An experts module holds two 3-D parameters, W_up [experts, wide, width] and W_down [experts, width, inner]; if
`is_transposed`, the last two dimensions are swapped. For the tokens X_e that the router sends to expert e:

    H_e = gate(X_e W_up[e]ᵀ + b_up[e])    X_e [tokens of e, width], H_e [tokens of e, inner] the inputs of W_down[e]

`gate` is a method of the module. Source: `use_experts_implementation` in `transformers.integrations.moe`.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from atp_tune.errors import UserError

ATTRIBUTES = ("num_experts", "has_bias", "is_transposed", "_apply_gate")


def holds_experts(module: nn.Module) -> bool:
    """Whether a module itself has stacked matrices: parameters with over two dimensions, at least two larger than 1.

    Filters of a depthwise convolution [channels, 1, width] do not count.
    """
    return not is_depthwise(module) and any(map(_is_stack, module.parameters(recurse=False)))


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a depthwise convolution over tokens, as in state-space blocks."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels == module.out_channels


def _is_stack(parameter: Tensor) -> bool:
    return parameter.dim() > 2 and sum(size > 1 for size in parameter.shape) > 1


def expert_weights(module: Any) -> tuple[str, str]:
    """Names of W_up and W_down of an experts module; UserError if it stores experts in another way."""
    deep = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False) if _is_stack(parameter)}
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if deep != {up: 3, "down_proj": 3} or not all(hasattr(module, name) for name in ATTRIBUTES):
        kind, name = type(module).__name__, next(iter(deep))
        raise UserError(f"model module {kind}: {name} has {deep[name]} dimensions in a form that is not known")
    return up, "down_proj"


def expert_name(path: str, weight: str, expert: int) -> str:
    """The name of an expert's matrix as a linear of its block, such as `mlp.experts.down_proj[3]`."""
    return f"{path}.{weight}[{expert}]"


def find_gates(block: nn.Module) -> set[nn.Module]:
    """The linears that gate experts: siblings of an experts module, or the only linear in a sibling (a router).

    They have one output per expert, or a single output, the gate of a shared expert.
    """
    gates: set[nn.Module] = set()
    for holder in block.modules():
        counts = {child.num_experts for child in holder.children() if holds_experts(child)}
        for child in holder.children() if counts else ():
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if len(linears) == 1 and linears[0].weight.shape[0] in {1, *counts}:
                gates.add(linears[0])
    return gates


def expert_inputs(module: Any, weight: str, hidden: Tensor, chosen: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Expert and inputs [tokens, in] of W_up or W_down for each expert with tokens, with the weights of the module.

    hidden [tokens, width] and chosen experts [tokens, k] are the arguments of the module.
    """
    up, _ = expert_weights(module)
    for expert in range(module.num_experts):
        rows = hidden[(chosen == expert).any(-1)]
        if len(rows):
            yield expert, rows if weight == up else _inner(module, up, expert, rows)


def _inner(module: Any, up: str, expert: int, rows: Tensor) -> Tensor:
    weight = getattr(module, up)[expert]
    bias = getattr(module, f"{up}_bias")[expert] if module.has_bias else None
    wide = nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)
    inner: Tensor = module._apply_gate(wide) if up == "gate_up_proj" else module.act_fn(wide)
    return inner
