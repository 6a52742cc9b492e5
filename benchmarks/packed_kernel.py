"""Products with packed weights against dense ones: `python benchmarks/packed_kernel.py`, two minutes.

Each way goes through as many matrices of a shape as fill 768 MB, more than the last cache, so that weights come from
memory, as they do in a model. The ways take turns; the numbers are medians: of the processor's time with one thread,
which other jobs on the machine lengthen less, else of time on the wall. Ratios are times of torch's own dense product,
bfloat16 or float32, over the packed one's; "dense" is the packed kernel's loop over a dense weight, tuned alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from atp_tune.packed import kernel
from atp_tune.packed.kernel import BLOCK, CodedMatrix, PackedMatrix, kernel_name
from atp_tune.packed.modeling_atp_sparse import bitmask_of

SHAPES = [(2048, 5632), (5632, 2048), (576, 1536)]  # [out, in]
BYTES = 768 << 20
Way = Callable[[Tensor], object]


def packed(weight: Tensor, dtype: torch.dtype) -> PackedMatrix:
    """A weight as the kernel has it; int8 with one scale per row."""
    kept = weight != 0
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    if dtype != torch.int8:
        return PackedMatrix(weight[kept].to(dtype), bitmask, weight.shape[1])
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    return PackedMatrix((weight / scales).round()[kept].to(dtype), bitmask, weight.shape[1], scales)


def ways(shape: tuple[int, int], sparsity: float) -> Iterator[tuple[str, torch.dtype, list[Way]]]:
    """Name, type of x, and a product for each matrix."""
    weight = torch.randn(shape) * (torch.rand(shape) >= sparsity)

    def copies(size: float) -> range:
        return range(max(2, int(BYTES / (size * weight.numel()))))

    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        weights = [weight.to(dtype).clone() for _ in copies(size)]
        yield "torch", dtype, [partial(functional.linear, weight=w) for w in weights]
        yield "dense", dtype, [partial(kernel.dense_linear, weight=w) for w in weights]
    density = 1 - sparsity
    for dtype, size, inputs in (
        (torch.bfloat16, 2, torch.bfloat16), (torch.float32, 4, torch.float32), (torch.int8, 1, torch.bfloat16)
    ):  # fmt: skip
        name = f"packed {str(dtype).removeprefix('torch.')}"
        yield name, inputs, [packed(weight, dtype).product for _ in copies(size * density + 1 / 8)]
    if kernel.multiplies_codes(shape[1], BLOCK):
        for name, kept in (("codes, 4 bits", weight != 0), ("codes, no zeros", weight > -torch.inf)):
            masked = bool((~kept).any())
            yield (
                name,
                torch.bfloat16,
                [coded(kept, masked).product for _ in copies(4 / 8 * float(kept.float().mean()) + masked / 8)],
            )


def coded(kept: Tensor, masked: bool) -> CodedMatrix:
    """Random codes of 4 bits of the weights that are kept, with scales of groups of BLOCK columns."""
    groups = kept.shape[0], kept.shape[1] // BLOCK
    codes = torch.randint(0, 256, (-(-int(kept.sum()) // 2),), dtype=torch.uint8)
    scales, zeros = torch.rand(groups).half(), torch.randint(0, 16, groups, dtype=torch.uint8)
    return CodedMatrix(codes, 4, scales, zeros, 0, kept.shape[1], bitmask_of(kept) if masked else None)


def microseconds(
    all_ways: list[tuple[str, torch.dtype, list[Way]]], columns: int, M: int, seconds: float
) -> list[float]:
    """Median of each way; they take turns until the time is over."""
    inputs = {dtype: torch.randn(M, columns).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    turns = [(cycle(products), inputs[dtype], list[float]()) for _, dtype, products in all_ways]
    for products, x, _ in turns:
        assert next(products)(x) is not None, "a way has no product of so many tokens"
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for products, x, taken in turns:
            product = next(products)
            start = clock()
            product(x)
            taken.append(clock() - start)
    return [1e6 * statistics.median(taken) for _, _, taken in turns]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--seconds", type=float, default=5, help="of each line of the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"kernel: {kernel_name()}; sparsity {options.sparsity}\n")
    print("| shape | threads | tokens | way | x | µs | over torch bf16 | over torch fp32 | over dense, same x |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        all_ways = list(ways(shape, options.sparsity))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for M in options.tokens:
                times = microseconds(all_ways, shape[1], M, options.seconds)
                of = {(name, dtype): taken for (name, dtype, _), taken in zip(all_ways, times, strict=True)}
                for (name, dtype), taken in of.items():
                    ratios = (of["torch", torch.bfloat16], of["torch", torch.float32], of["dense", dtype])
                    cells = [f"{other / taken:.2f}" for other in ratios]
                    start = [f"{shape[0]} × {shape[1]}", threads, M, name, str(dtype).removeprefix("torch.")]
                    print("|", " | ".join(map(str, [*start, f"{taken:.0f}", *cells])), "|", flush=True)


if __name__ == "__main__":
    main()
