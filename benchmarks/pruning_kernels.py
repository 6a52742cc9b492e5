"""The pruning kernels against the plain way, in one run: `python benchmarks/pruning_kernels.py`.

The plain way is what the papers' code does and what this project did before, written here: `kthvalue` and `masked_fill`
for Wanda's mask; for SparseGPT two Cholesky factorisations with an inverse between them, and three tensor operations
for each column; one matrix product for the Hessian. Shapes are SmolLM2-135M's. Medians of pairs that take turns.
`--threads 1` measures seconds of the processor, which other jobs on the machine lengthen less.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from atp_tune.pruners.magnitude import Magnitude
from atp_tune.pruners.selection import lowest_in_matrix, lowest_in_rows, ranks
from atp_tune.pruners.sparsegpt import SparseGPT
from atp_tune.pruners.statistics import Hessian, InputNorms
from atp_tune.pruners.wanda import Wanda

LINEARS = [(576, 576), (192, 576), (1536, 576), (576, 1536)]  # [out, in]
TOKENS, SPARSITY, DAMPING, COLUMNS = 2048, 0.6, 0.01, 128
CPU = torch.device("cpu")
Way = Callable[[], object]


def lowest(scores: Tensor, count: int) -> Tensor:
    """The mask of each row's lowest scores, by torch's own selection; the sum is the look for ties."""
    mask = scores <= scores.kthvalue(count, dim=1, keepdim=True).values
    int(mask.sum())
    return mask


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """Pruned weight [out, in]."""
    scores = weight.float().abs() * norms
    return weight.masked_fill(lowest(scores, int(scores.shape[1] * SPARSITY)), 0)


def magnitude(weight: Tensor) -> Tensor:
    """Pruned weight [out, in]; of equals more go than were asked for."""
    scores = weight.float().abs().reshape(1, -1)
    mask = scores <= scores.kthvalue(int(scores.numel() * SPARSITY)).values
    return weight.masked_fill(mask.reshape(weight.shape), 0)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with UᵀU the inverse of the damped Hessian."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    lower = torch.linalg.cholesky_ex(damped).L
    upper: Tensor = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True).L
    return upper


def sparsegpt(weight: Tensor, U: Tensor) -> Tensor:
    """Pruned weight [out, in]."""
    W = weight.float().clone()
    for start in range(0, W.shape[1], COLUMNS):
        here = slice(start, start + COLUMNS)
        W[:, here], errors = block(W[:, here], U[here, here])
        W[:, here.stop :] -= errors @ U[here, here.stop :]
    return W.to(weight.dtype)


def block(W: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """A block's pruned columns [out, B] and errors [out, B]."""
    pivots, columns = U.diagonal(), W.T.contiguous()
    scores = (W / pivots).square().reshape(1, -1)
    gone = (scores <= scores.kthvalue(int(scores.numel() * SPARSITY)).values).reshape(W.shape).T.contiguous()
    errors = torch.empty_like(columns)
    for j, pivot in enumerate(pivots.tolist()):
        torch.mul(columns[j], gone[j], out=errors[j]).div_(pivot)
        columns[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return columns.masked_fill_(gone, 0).T, errors.T


def of_inputs(width: int) -> Iterator[tuple[str, tuple[int, ...], Way, Way]]:
    """What is computed once for all linears that read the same tensor."""
    x = torch.randn(TOKENS, width).bfloat16()
    gram, ours = torch.zeros(width, width), Hessian(width, CPU)
    yield "Hessian", (TOKENS, width), lambda: gram.addmm_(x.float().T, x.float()), lambda: ours.add(x)
    once = Hessian(width, CPU)
    once.add(x)
    matrix = once.matrix()

    def factor() -> Tensor:
        once._factors.clear()
        return once.factor(DAMPING)

    yield "factor", (width, width), lambda: inverse_factor(matrix), factor


def of_linear(out: int, width: int) -> Iterator[tuple[str, tuple[int, ...], Way, Way]]:
    """What is computed for each linear; its statistics are there."""
    shape, weight, x = (out, width), torch.randn(out, width).bfloat16(), torch.randn(TOKENS, width)
    norms, hessian, scores = InputNorms(width, CPU), Hessian(width, CPU), torch.randn(out, width).abs()
    norms.add(x)
    hessian.add(x)
    U, count = inverse_factor(hessian.matrix()), int(width * SPARSITY)
    hessian.factor(DAMPING)
    yield "mask, rows", shape, lambda: lowest(scores, count), lambda: lowest_in_rows(scores, SPARSITY)
    flat = scores.reshape(1, -1)
    yield (
        "mask, matrix",
        shape,
        lambda: flat <= flat.kthvalue(int(flat.numel() * SPARSITY)).values,
        lambda: lowest_in_matrix(scores, SPARSITY),
    )
    yield "ranks", shape, lambda: scores.argsort(dim=1, stable=True), lambda: ranks(scores)
    yield "magnitude", shape, lambda: magnitude(weight), lambda: Magnitude().prune(weight, SPARSITY, None)
    yield "wanda", shape, lambda: wanda(weight, norms.norms()), lambda: Wanda().prune(weight, SPARSITY, norms)
    yield "sparsegpt", shape, lambda: sparsegpt(weight, U), lambda: SparseGPT().prune(weight, SPARSITY, hessian)


def milliseconds(ways: list[Way], clock: Callable[[], float], pairs: int) -> list[float]:
    """Median of each way; the first round is not counted."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(pairs + 1):
        for way, times in zip(ways, taken, strict=True):
            start = clock()
            way()
            times.append(1000 * (clock() - start))
    return [statistics.median(times[1:]) for times in taken]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    cases = [case for width in (576, 1536) for case in of_inputs(width)]
    cases += [case for shape in LINEARS for case in of_linear(*shape)]
    print("| kernel | shape | plain ms | ours ms | ratio |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for name, shape, plain, ours in sorted(cases, key=lambda case: case[0]):
            before, after = milliseconds([plain, ours], clock, options.pairs)
            print(f"| {name} | {' × '.join(map(str, shape))} | {before:.2f} | {after:.2f} | {before / after:.1f} |")


if __name__ == "__main__":
    main()
