"""Products with a packed weight on a GPU; `kernel` says what a packed weight is, `kernel_triton` has the loops."""

from functools import cache, partial

import torch
from torch import Tensor

from atp_tune.packed import kernel
from atp_tune.utils.system import launches

FLOATS = (torch.bfloat16, torch.float16)  # of x
MOST_VALUES = 1 << 32  # places are numbers of 32 bits


class GpuMatrix(kernel.PackedParts):
    """A packed weight [R, C] on a GPU that has the kernel, checked once, and the product with it.

    Raises ValueError as `kernel.PackedMatrix` does, whose methods it has.
    """

    device = None

    def _begin(self) -> None:
        if (count := len(self.values)) >= MOST_VALUES:
            raise ValueError(f"packed weight: has {count} values, a GPU's kernel takes fewer than {MOST_VALUES}")

    def product(self, x: Tensor, forced: bool = False) -> Tensor | None:
        """The product y [M, R] of x [M, C] and the weight's transpose, plus the bias.

        None of more than 16 tokens, of x of another type than bfloat16 and float16, and unless `forced` where the
        product with the unpacked weight is expected to be faster.
        """
        if x.dim() != 2 or x.shape[1] != self.shape[1] or x.device != self.bitmask.device:
            raise ValueError(f"packed weight: x is {list(x.shape)} on {x.device}; needed: [tokens, {self.shape[1]}]")
        from atp_tune.packed import kernel_triton

        if not 1 <= len(x) <= kernel_triton.BATCH or x.dtype not in FLOATS:
            return None
        if not forced:
            is_nvidia = x.is_cuda and torch.version.hip is None
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count if is_nvidia else None
            if not is_faster(len(x), self.shape[0], processors):
                return None
        return kernel_triton.product(x, self.values, self.bitmask, self.offsets, self.scales, self.bias)

    def rows(self, first: int, last: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows `first` to `last` with their zeros, [last - first, C]; as of `kernel.PackedMatrix`."""
        from atp_tune.packed import kernel_triton

        if not 0 <= first <= last <= self.shape[0]:
            raise ValueError(f"packed weight: has {self.shape[0]} rows, not {first} to {last}")
        dtype = dtype or (torch.float32 if self.scales is not None else self.values.dtype)
        scales, offsets = None if self.scales is None else self.scales[first:last], self.offsets[first : last + 1]
        return kernel_triton.unpacked(self.values, self.bitmask[first:last], offsets, scales, self.shape[1], dtype)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether the kernels compile and run on a device; they are launched once, and a warning says why they do not."""

    def launch() -> None:
        bits = torch.full((2, 16), 0b01010101, dtype=torch.uint8, device=device)  # a value, a zero, a value …
        x = torch.ones(2, 128, dtype=torch.bfloat16, device=device)
        matrix = GpuMatrix(x.flatten()[:128], bits, 128)
        products = [matrix.product(x[:tokens], forced=True) for tokens in (1, 2)]
        rows = matrix.rows(0, 2)
        if any(y is None or bool((y != 64).any()) for y in products) or not rows.equal(1 - rows.roll(1, dims=1)):
            raise RuntimeError("it computes something else")

    return launches(launch, "packed weights without their Triton kernel, unpacked for each product")


def is_faster(tokens: int, rows: int, processors: int | None) -> bool:
    """Whether the product of so many tokens is expected to take less time than unpacking and cuBLAS.

    processors: multiprocessors of an NVIDIA GPU; None: unknown. An estimate from compiled code that no GPU has timed:
    one token decodes the bits that unpacking decodes, and writes no weight, so it cannot lose. With more, programs of
    32 rows wait 5,600 clocks for 256 columns, alone or four to a processor: 22 clocks a column. Unpacking decodes 8.5
    weights a clock and processor; then 4 bytes a weight are written and read, 14.5 bytes a clock on an H100 (A100 13,
    H200 21): 13 clocks a column for each program that a processor has. So two programs each pay, fewer do not.
    """
    return tokens == 1 or (processors is not None and rows >= 2 * 32 * processors)


linear = partial(kernel.linear, kind=GpuMatrix)  # the operator atp_sparse::product on a GPU
kernel.OPERATORS.impl("product", linear, "CUDA")  # type: ignore[no-untyped-call]
