"""Products with packed weights on a GPU, by Triton, against cuBLAS with dense ones: `scripts/gpu` runs it.

    python benchmarks/packed_gpu.py           on CUDA, under a minute; nothing is downloaded
    python benchmarks/packed_gpu.py --tiny    the same code on a tiny shape, on a CPU with TRITON_INTERPRET=1

Weights are random numbers in bfloat16. A CUDA graph multiplies the same tokens by copies of a matrix that together do
not fit into the cache of the GPU, so that each is read from memory and no launch is waited for. Of each sparsity the
table has the kernel, whether or not `gpu.is_faster` takes it, and behind it what is done else: unpacking and cuBLAS.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from gpu import head, line, seconds_of
from torch import Tensor
from torch.nn import functional

from atp_tune.checkpoints.devices import device_name, find_device
from atp_tune.packed.gpu import GpuMatrix, has_kernel
from atp_tune.packed.layout import pack
from atp_tune.packed.modeling_atp_sparse import BITMASK, VALUES

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))  # [out, in]
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
TOKENS = (1, 4, 16)
READ = 256 << 20  # bytes of all copies of a matrix; an H100 caches 50 MB
Way = Callable[[], object]


def copies(weight: Tensor, least: int) -> list[GpuMatrix]:
    """A packed weight, as often as it takes to make up so many bytes."""
    parts = pack(weight, "same")
    values, bitmask = parts[VALUES], parts[BITMASK]
    count = max(1, least // (values.nbytes + bitmask.nbytes))
    return [GpuMatrix(values.clone(), bitmask.clone(), weight.shape[1]) for _ in range(count)]


def unpacked(matrix: GpuMatrix, x: Tensor) -> Tensor:
    """The product where the kernel is not taken."""
    return functional.linear(x, matrix.rows(0, matrix.shape[0]))


def microseconds(ways: list[Way], device: torch.device) -> float:
    """Of one of the ways, which take turns."""

    def all_of_them() -> None:
        for way in ways:
            way()

    if device.type != "cuda":
        return 1e6 * seconds_of(all_of_them, device) / len(ways)
    all_of_them()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return 1e6 * seconds_of(graph.replay, device) / len(ways)


def show(shape: tuple[int, int], tokens: tuple[int, ...], least: int, device: torch.device) -> None:
    """A row for each number of tokens: dense, and packed at each sparsity; in brackets how many times as fast."""
    torch.manual_seed(0)
    weight, chance = torch.randn(shape, dtype=torch.bfloat16, device=device), torch.rand(shape, device=device)
    dense = [weight.clone() for _ in range(max(1, least // weight.nbytes))]
    packed = [copies(weight.masked_fill(chance < sparsity, 0), least) for sparsity in SPARSITIES]
    for count in tokens:
        x = torch.randn(count, shape[1], dtype=torch.bfloat16, device=device)
        whole = microseconds([partial(functional.linear, x, each) for each in dense], device)
        cells = []
        for matrices in packed:
            own = microseconds([partial(each.product, x, forced=True) for each in matrices], device)
            other = microseconds([partial(unpacked, each, x) for each in matrices], device)
            cells.append(f"{own:.1f} ({whole / own:.2f}×), {other:.1f}")
        line(" × ".join(map(str, shape)), count, f"{whole:.1f}", f"{weight.nbytes / whole / 1e3:.0f}", *cells)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = find_device("auto")
    if device.type != "cuda" and not tiny:
        raise SystemExit("no CUDA device here; --tiny runs the same code in Triton's interpreter, TRITON_INTERPRET=1")
    if not has_kernel(device):
        raise SystemExit(f"the kernels do not run on {device_name(device)}")
    columns = (f"packed, {sparsity:.0%} zeros" for sparsity in SPARSITIES)
    head("Products with packed weights, µs", "shape", "tokens", "cuBLAS", "its GB/s", *columns)
    for shape in ((16, 64),) if tiny else SHAPES:
        show(shape, (1, 2) if tiny else TOKENS, 1 if tiny else READ, device)


if __name__ == "__main__":
    main()
