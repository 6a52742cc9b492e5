"""The pruners and measurements in their most literal form, to compare with: loops, sorts, dense inverses."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def lowest_mask(rows: list[list[Any]], count: int) -> Tensor:
    """The first `count` of a stable sort of each row."""
    mask = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
    for i, scores in enumerate(rows):
        for j in sorted(range(len(scores)), key=lambda j: scores[j])[:count]:
            mask[i, j] = True
    return mask


def wanda_mask(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """weight [out, in], x [tokens, in]: |W_ij| times the norm of input j, in float32."""
    norms = [np.float32(math.sqrt(math.fsum(v * v for v in column))) for column in x.double().T.tolist()]
    scores = [
        [np.float32(abs(w)) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.double().tolist()
    ]
    return lowest_mask(scores, int(weight.shape[1] * sparsity))


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    scores = [abs(w) for row in weight.double().tolist() for w in row]
    return lowest_mask([scores], int(len(scores) * sparsity)).reshape(weight.shape)


def hessian(x: Tensor) -> Tensor:
    """2 Xᵀ X / n in float64, summed token by token, with 1 for inputs that were never active."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x.double():
        total += 2 * torch.outer(row, row)
    total /= len(x)
    for j in range(len(total)):
        if total[j, j] == 0:
            total[j, j] = 1
    return total


def sparsegpt(weight: Tensor, x: Tensor, sparsity: float, damping: float, columns: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgery, column after column, with the inverse of what remains of the Hessian made afresh.

    Pruned weight in float64, and mask.
    """
    W, H = weight.double().clone(), hessian(x)
    out, width = W.shape
    W[:, (x == 0).all(0)] = 0
    H += damping * H.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    masks = torch.zeros(out, width, dtype=torch.bool)
    for start in range(0, width, columns):
        stop = min(start + columns, width)
        pivots = {j: float(torch.linalg.inv(H[j:, j:])[0, 0]) for j in range(start, stop)}
        scores = [float(W[i, j]) ** 2 / pivots[j] for i in range(out) for j in range(start, stop)]
        masks[:, start:stop] = lowest_mask([scores], int(len(scores) * sparsity)).reshape(out, stop - start)
        for j in range(start, stop):
            inverse = torch.linalg.inv(H[j:, j:])
            for i in range(out):
                if masks[i, j]:
                    W[i, j:] -= W[i, j] / inverse[0, 0] * inverse[0]
                    W[i, j] = 0
    return W, masks


def weight_of(model: nn.Module, name: str) -> Tensor:
    """View [out, in] of the weight of a linear; `module.weight[3]` is that of the fourth expert."""
    if not name.endswith("]"):
        module: Any = model.get_submodule(name)
        return module.weight.T if isinstance(module, Conv1D) else module.weight
    path, expert = name[:-1].split("[")
    matrix = model.get_parameter(path)[int(expert)]
    return matrix.T if type(model).__name__ == "GptOssForCausalLM" else matrix


def inputs_of(model: nn.Module, names: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, in] of the linears of that name, in one forward of the whole model."""
    heard: dict[str, Tensor] = {}

    def hear(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if len(args) == 3:  # hidden states, chosen experts, their weights
                heard.update(expert_inputs(module, name, args[0], args[1]))
            else:
                heard[name] = args[0].reshape(-1, args[0].shape[-1]).clone()

        return hook

    paths = {name.rpartition(".")[0] if name.endswith("]") else name for name in names}
    handles = [model.get_submodule(path).register_forward_pre_hook(hear(path)) for path in paths]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: heard[name] for name in names}


def expert_inputs(experts: Any, path: str, hidden: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Inputs [tokens, in] of each expert's two matrices: token by token, to each expert that was chosen for it."""
    rows: list[list[Tensor]] = [[] for _ in range(experts.num_experts)]
    for token, favourites in zip(hidden, chosen.tolist(), strict=True):
        for expert in favourites:
            rows[expert].append(token)
    heard = {}
    for expert, tokens in enumerate(rows):
        between = [between_of(experts, expert, token) for token in tokens]
        inner = experts.down_proj.numel() // len(rows) // hidden.shape[1]
        heard[f"{path}.gate_up_proj[{expert}]"] = torch.stack(tokens) if tokens else hidden[:0]
        heard[f"{path}.down_proj[{expert}]"] = torch.stack(between) if tokens else torch.zeros(0, inner)
    return heard


def between_of(experts: Any, expert: int, token: Tensor) -> Tensor:
    """What the expert's second matrix gets for a token, by the formula of the family."""
    if type(experts).__name__ == "GptOssExperts":
        both = token @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
    return gate / (1 + torch.exp(-gate)) * up


def states_of(model: Any, blocks: nn.ModuleList, ids: Tensor) -> list[Tensor]:
    """Hidden states after each block; transformers itself gives the last one after the final norm."""
    last: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks[-1].register_forward_hook(keep)
    with torch.inference_mode():
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    return [*states[1 : len(blocks)], *last]


def nlls_of(model: Any, ids: Tensor) -> list[float]:
    """The model's own loss, window by window."""
    with torch.inference_mode():
        return [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids]
