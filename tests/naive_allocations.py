"""The rival allocations and their measurements in their most literal form: loops, a full sort, a fit by search."""

import math
from typing import Any

import naive
import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from atp_tune.checkpoints.blocks import Linear
from atp_tune.checkpoints.checkpoint import Checkpoint


def linears_of(checkpoint: Checkpoint) -> list[list[tuple[str, Linear]]]:
    """Name in the whole model and description of each linear of each block."""
    return [
        [(checkpoint.key(i, linear).removesuffix(".weight"), linear) for linear in linears]
        for i, linears in enumerate(checkpoint.linears)
    ]


def matrix(model: nn.Module, name: str, linear: Linear) -> Tensor:
    weight: Any = model.get_submodule(name).weight
    return weight.detach().T if linear.transposed else weight.detach()


def scores(model: nn.Module, checkpoint: Checkpoint, ids: Tensor, score: str) -> list[list[list[Any]]]:
    """Scores (float32) of each linear of each block, row by row, with inputs heard in one forward of the model."""
    names = [name for block in linears_of(checkpoint) for name, _ in block]
    inputs = naive.inputs_of(model, names, ids)
    found = []
    for block in linears_of(checkpoint):
        found.append([])
        for name, linear in block:
            columns = inputs[name].double().T.tolist()
            norms = [np.float32(math.sqrt(math.fsum(v * v for v in column))) for column in columns]
            if score == "magnitude":
                norms = [np.float32(1)] * len(columns)
            rows = matrix(model, name, linear).double().tolist()
            found[-1].append([np.float32(abs(w)) * norm for row in rows for w, norm in zip(row, norms, strict=True)])
    return found


def outlier_ratios(all_scores: list[list[list[Any]]], threshold: float) -> tuple[float, ...]:
    ratios = []
    for block in all_scores:
        flat = [float(s) for linear in block for s in linear]
        mean = math.fsum(flat) / len(flat)
        ratios.append(sum(s > threshold * mean for s in flat) / len(flat))
    return tuple(ratios)


def owl(ratios: list[float], sizes: tuple[int, ...], target: float, lam: float) -> list[float]:
    """The densities of the authors, with a mean over weights, as sparsities."""
    D = [(r - min(ratios)) / (max(ratios) - min(ratios)) * 2 * lam for r in ratios]
    mean = math.fsum(d * size for d, size in zip(D, sizes, strict=True)) / sum(sizes)
    return [1 - (d - mean + (1 - target)) for d in D]


def spectrum(weight: Tensor) -> list[float]:
    return sorted(float(s) ** 2 for s in np.linalg.svd(weight.double().numpy(), compute_uv=False))


def pareto_exponent(tail: list[float]) -> float:
    """The α of greatest likelihood ∏ (α-1)/x₀ (x/x₀)^-α, x₀ the lowest, by search."""
    logs = [math.log(x / tail[0]) for x in tail]

    def minus_log_likelihood(alpha: float) -> float:
        return -len(tail) * math.log(alpha - 1) + alpha * math.fsum(logs)

    return float(
        minimize_scalar(minus_log_likelihood, bounds=(1 + 1e-9, 1e3), method="bounded", options={"xatol": 1e-10}).x
    )


def tail_exponent(eigenvalues: list[float]) -> float:
    """The candidates near the peak, one after the other."""
    counts, edges = np.histogram(np.log10(eigenvalues), bins=100)
    peak = 10 ** edges[list(counts).index(max(counts))]
    best = (math.inf, math.nan)
    for i, start in enumerate(eigenvalues[:-1]):
        if math.log10(0.95 * peak) <= start <= 1.5 * peak:
            tail = eigenvalues[i:]
            alpha = pareto_exponent(tail)
            distance = max(abs(1 - (x / start) ** (1 - alpha) - k / len(tail)) for k, x in enumerate(tail))
            best = min(best, (distance, alpha))
    return best[1]


def alphapruning(exponents: list[list[float]], sizes: tuple[int, ...], target: float, epsilon: float) -> list[float]:
    """The authors' map; what exceeds 1 afterwards is handed on to the others, by bisection of the scale."""
    means = [sum(block) / len(block) for block in exponents]
    lowest, highest = min(means), max(means)
    W = [(m - lowest) / (highest - lowest) * ((1 + epsilon) - (1 - epsilon)) + (1 - epsilon) for m in means]
    return bisected(W, sizes, target)


def er(shapes: list[tuple[int, int]], target: float) -> list[float]:
    W = [(rows + columns) / (rows * columns) for rows, columns in shapes]
    return [1 - density for density in bisected(W, [rows * columns for rows, columns in shapes], 1 - target)]


def bisected(weights: list[float], sizes: Any, mean: float) -> list[float]:
    """min(1, c w), c found by halving an interval until the mean is right."""
    low, high = 0.0, 2 / min(weights)
    for _ in range(200):
        c = (low + high) / 2
        reached = math.fsum(min(1.0, c * w) * size for w, size in zip(weights, sizes, strict=True)) / sum(sizes)
        low, high = (c, high) if reached < mean else (low, c)
    return [min(1.0, high * w) for w in weights]


def global_mask(all_scores: list[list[list[Any]]], target: float) -> list[list[list[bool]]]:
    """Which weights are among the lowest of the whole model, by a stable sort of all of them."""
    places = [
        (s, b, k, j) for b, block in enumerate(all_scores) for k, part in enumerate(block) for j, s in enumerate(part)
    ]
    gone = {place[1:] for place in sorted(places, key=lambda place: place[0])[: int(target * len(places))]}
    return [
        [[(b, k, j) in gone for j in range(len(part))] for k, part in enumerate(block)]
        for b, block in enumerate(all_scores)
    ]
