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


def groups_mask(rows: list[list[Any]], sparsity: float, group: int) -> Tensor:
    """In each row, group after group of columns, the share that is asked for, rounded down."""
    parts = []
    for start in range(0, len(rows[0]), group):
        part = [row[start : start + group] for row in rows]
        parts.append(lowest_mask(part, math.floor(len(part[0]) * sparsity + 1e-9)))
    return torch.cat(parts, 1)


def wanda_scores(weight: Tensor, x: Tensor) -> list[list[Any]]:
    """weight [out, in], x [tokens, in]: |W_ij| times the norm of input j, in float32."""
    norms = [np.float32(math.sqrt(math.fsum(v * v for v in column))) for column in x.double().T.tolist()]
    return [[np.float32(abs(w)) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.double().tolist()]


def wanda_matrix_mask(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """Mask of the lowest |W|·‖X‖ of a whole matrix, the first of equal ones, one weight at a time."""
    norms = x.float().square().sum(0).sqrt()
    scores = [float(value) for row in weight.abs().float() * norms for value in row]
    order = sorted(range(len(scores)), key=lambda place: (scores[place], place))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: int(weight.numel() * sparsity)]] = True
    return mask.reshape(weight.shape)


def wanda_variant_mask(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    """The smallest of all rows' cumulated shares, each in float32."""
    shares = []
    for scores in wanda_scores(weight, x):
        total, row = 0.0, [np.float32(0)] * len(scores)
        for j in sorted(range(len(scores)), key=lambda j: scores[j]):
            total += float(scores[j])
            row[j] = np.float32(total)
        shares += [share / np.float32(total) if share > 0 else share for share in row]
    return lowest_mask([shares], int(weight.numel() * sparsity)).reshape(weight.shape)


def wanda_mask(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    return lowest_mask(wanda_scores(weight, x), int(weight.shape[1] * sparsity))


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


def sparsegpt(
    weight: Tensor, x: Tensor, sparsity: float, damping: float, columns: int, group: int | None = None
) -> tuple[Tensor, Tensor]:
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
        inverses = {j: torch.linalg.inv(H[j:, j:]) for j in range(start, stop)}
        pivots = {j: float(inverse[0, 0]) for j, inverse in inverses.items()}
        if group is None:
            scores = [row[j] ** 2 / pivots[j] for row in W.tolist() for j in range(start, stop)]
            masks[:, start:stop] = lowest_mask([scores], int(len(scores) * sparsity)).reshape(out, stop - start)
        for j in range(start, stop):
            if group is not None and j % group == 0:
                part = range(j, min(j + group, width))
                rows = [[row[k] ** 2 / pivots[k] for k in part] for row in W.tolist()]
                masks[:, j : j + group] = groups_mask(rows, sparsity, group)
            gone, inverse = masks[:, j], inverses[j]
            W[gone, j:] -= torch.outer(W[gone, j] / inverse[0, 0], inverse[0])
            W[gone, j] = 0
    return W, masks


def weight_of(model: nn.Module, name: str) -> Tensor:
    """View [out, in] of the weight of a linear; `module.weight[3]` is that of the fourth expert."""
    if not name.endswith("]"):
        module: Any = model.get_submodule(name)
        return module.weight.T if isinstance(module, Conv1D) else module.weight
    path, expert = name[:-1].split("[")
    matrix = model.get_parameter(path)[int(expert)]
    return matrix.T if type(model).__name__ == "GptOssForCausalLM" else matrix


def dsnot_mask(
    weight: Tensor, x: Tensor, sparsity: float, initial: str, group: int | None, **settings: float
) -> Tensor:
    """Row by row, swap by swap; moments by `fsum` over all tokens."""
    columns = x.double().T.tolist()
    means = [math.fsum(column) / len(column) for column in columns]
    variances = [math.fsum((v - m) ** 2 for v in c) / len(c) for c, m in zip(columns, means, strict=True)]
    scores = wanda_scores(weight, x)
    first = scores if initial == "wanda" else weight.double().abs().tolist()
    mask = groups_mask(first, sparsity, group) if group else lowest_mask(first, int(weight.shape[1] * sparsity))
    for i, row in enumerate(weight.double().tolist()):
        effects = [2048 * w * m for w, m in zip(row, means, strict=True)]
        order = first[i] if group else scores[i]
        dsnot_row(mask[i], effects, variances, order, group, **settings)
    return mask


def dsnot_row(
    gone: Tensor,
    effects: list[float],
    variances: list[float],
    scores: list[Any],
    group: int | None,
    cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
) -> None:
    start, free = gone.tolist(), set(range(len(effects)))
    error = math.fsum(e for e, g in zip(effects, start, strict=True) if g)
    sign = math.copysign(1, error)
    for _ in range(cycles):
        if abs(error) <= threshold:
            return
        growing = [j for j in sorted(free) if start[j] and effects[j] * error > 0]
        if not growing:
            return
        grow = max(growing, key=lambda j: abs(effects[j]) / variances[j] ** power if variances[j] else math.inf)
        free.remove(grow)
        if group:
            leaving = [j for j in sorted(free) if not start[j] and j // group == grow // group]
            if not leaving:
                continue
        else:
            leaving = [j for j in sorted(free) if not start[j] and effects[j] * error < 0]
            if not leaving:
                return
        leave = min(leaving, key=lambda j: scores[j])
        after = error + effects[leave] - effects[grow]
        if group and after * sign <= 0:
            return
        free.remove(leave)
        gone[grow], gone[leave], error = False, True, after


def alps(
    weight: Tensor, x: Tensor, sparsity: float, group: int | None = None, damping: float = 0.01, rho: float = 0.1
) -> tuple[Tensor, Tensor]:
    """ADMM with dense inverses, then conjugate gradients row by row, all in float64. Pruned weight, and mask."""
    H = sum((torch.outer(row, row) for row in x.double()), torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64))
    eye = torch.eye(len(H), dtype=torch.float64)
    H = H + damping * H.diagonal().mean() * eye
    scales = H.diagonal().sqrt()
    scales[scales == 0] = 1
    H = H / torch.outer(scales, scales)
    W = weight.double() * scales

    def smallest(B: Tensor) -> Tensor:
        squares = B.square()
        if group is not None:
            return groups_mask(squares.tolist(), sparsity, group)
        return lowest_mask([squares.flatten().tolist()], int(B.numel() * sparsity)).reshape(B.shape)

    last = smallest(W)
    if last.all() or not last.any():
        return weight.double().masked_fill(last, 0), last
    kept, begun = int((~last).sum()), False
    B, D, V = W, W.masked_fill(last, 0), torch.zeros_like(W)
    for i in range(300):
        B = (W @ H - V + rho * D) @ torch.linalg.inv(H + rho * eye)
        mask = smallest((V + rho * B) / rho)
        D = ((V + rho * B) / rho).masked_fill(mask, 0)
        V = V + rho * (B - D)
        if (i + 1) % 3 != 0:
            continue
        changed = int((mask != last).sum())
        last = mask
        if (changed == 0 and begun) or (i >= 30 and changed / kept < 0.0003):
            break
        if changed / kept > 0.1:
            begun, rho = True, 1.3 * rho
        elif changed / kept > 0.005:
            begun, rho = True, 1.2 * rho
        elif begun:
            rho *= 1.1
        else:
            rho /= 5
            if changed:
                D, V = W.masked_fill(smallest(W), 0), torch.zeros_like(W)
        rho = min(rho, 1e6)
    mask = smallest(B)
    rows = [gradients(b.masked_fill(m, 0), ~m, w, H) for b, m, w in zip(B, mask, W, strict=True)]
    return torch.stack(rows) / scales, mask


def gradients(b: Tensor, kept: Tensor, w: Tensor, H: Tensor, steps: int = 10) -> Tensor:
    r = kept * (H @ (w - b))
    p = r
    for _ in range(steps):
        if float(r @ r) == 0:
            return b
        alpha = (r @ r) / (p @ H @ p)
        b, new = b + alpha * p, r - alpha * (kept * (H @ p))
        p, r = new + (new @ new) / (r @ r) * p, new
    return b


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


def kls_of(dense: Any, model: Any, ids: Tensor) -> list[float]:
    """KL from the dense model's next-token distribution to the other's, all of it in float64, mean over a window."""
    found = []
    for row in ids:
        with torch.inference_mode():
            p, q = (m(input_ids=row[None]).logits[0, :-1].double().log_softmax(1) for m in (dense, model))
        found.append(sum(float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(len(p))) / len(p))
    return found


def nlls_of(model: Any, ids: Tensor) -> list[float]:
    """The model's own loss, window by window."""
    with torch.inference_mode():
        return [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in ids]


def grid(group: list[float], bits: int, symmetric: bool) -> tuple[np.float32, float]:
    """Scale, in float32, and zero point of one group."""
    low, high = min(0.0, *group), max(0.0, *group)
    if symmetric:
        high = max(high, -low)
        low = -high
    scale = np.float32(np.float32(high) - np.float32(low)) / np.float32(2**bits - 1)
    if scale == 0:
        return np.float32(1), float(2 ** (bits - 1)) if symmetric else 0.0
    return scale, float(2 ** (bits - 1)) if symmetric else float(np.rint(np.float32(-low) / scale))


def nearest(weight: float, scale: np.float32, zero: float, bits: int) -> float:
    """The value of the grid that is nearest to a weight, in float32."""
    q = min(2.0**bits - 1, max(0.0, float(np.rint(np.float32(weight) / scale)) + zero))
    return float(np.float32(q - zero) * scale)


def grids_of(weight: Tensor, bits: int, size: int, symmetric: bool) -> list[list[tuple[np.float32, float]]]:
    """Scale and zero point for each weight [out, in]; a size of -1 is the whole row."""
    size = weight.shape[1] if size == -1 else size
    return [
        [grid(row[j - j % size : j - j % size + size], bits, symmetric) for j in range(len(row))]
        for row in weight.float().tolist()
    ]


def rtn(weight: Tensor, bits: int, size: int, symmetric: bool) -> Tensor:
    """Each weight [out, in] as the nearest value of its group."""
    grids = grids_of(weight, bits, size, symmetric)
    rows = weight.float().tolist()
    found = [[nearest(w, *g, bits) for w, g in zip(*pair, strict=True)] for pair in zip(rows, grids, strict=True)]
    return torch.tensor(found).reshape(weight.shape).to(weight.dtype)


def gptq(
    weight: Tensor,
    x: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    damping: float,
    zeros: Tensor | None = None,
    order: list[int] | None = None,
) -> Tensor:
    """Optimal brain quantization column by column, with the inverse of what remains of the Hessian made afresh.

    In float64, but for the grids. `order`: of the columns, else as they stand.
    """
    W, H = weight.double().clone(), hessian(x)
    grids = grids_of(weight, bits, size, symmetric)
    W[:, (x == 0).all(0)] = 0
    H += damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    left = list(range(len(H))) if order is None else order
    while left:
        j, *left = left
        inverse = torch.linalg.inv(H[[j, *left]][:, [j, *left]])
        values = [nearest(w, *row[j], bits) for w, row in zip(W[:, j].tolist(), grids, strict=True)]
        rounded = torch.tensor(values, dtype=torch.float64)
        if zeros is not None:
            rounded[zeros[:, j]] = 0
        W[:, left] -= torch.outer((W[:, j] - rounded) / inverse[0, 0], inverse[0, 1:])
        W[:, j] = rounded
    return W
