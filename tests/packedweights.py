"""Random packed weights, what their products must be close to, and memory behind which nothing may be read.

Processes import it that look at the kernel alone, under sanitizers or in emulation: it imports no test.
"""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.packed.kernel import CodedMatrix, PackedMatrix
from atp_tune.packed.layout import Coded, encode
from atp_tune.packed.modeling_atp_sparse import BITMASK, CODES, SCALES, ZEROS, zero_points
from atp_tune.pruners.rounding import RTN

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PAGE = mmap.PAGESIZE


def pack(weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> PackedMatrix:
    kept = weight != 0
    bitmask = torch.from_numpy(np.packbits(kept.numpy(), axis=-1, bitorder="little"))
    return PackedMatrix(weight[kept], bitmask, weight.shape[1], scales, bias)


def sparse(shape: tuple[int, int], dtype: torch.dtype, density: float = 0.3, seed: int = 0) -> Tensor:
    """A weight whose second row is empty, and whose third is full."""
    generator = torch.Generator().manual_seed(seed + shape[0] + 1000 * shape[1])
    weight = torch.randn(shape, generator=generator)
    kept = torch.rand(shape, generator=generator) < density
    kept[1:2], kept[2:3] = False, True
    if dtype == torch.int8:
        weight = (weight * 40).round().clamp(-127, 127)
    weight = torch.where(weight.to(dtype) == 0, 1, weight)
    return torch.where(kept, weight, 0).to(dtype)


def close(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of C sums, of the product with a scale, and of the result: to x's type, or below it."""
    x, exact = x.double(), weight.double()
    expected, sizes = x @ exact.T, x.abs() @ exact.abs().T
    if bias is not None:
        expected, sizes = expected + bias.double(), sizes + bias.double().abs()
    unit = torch.finfo(y.dtype)
    bound = (weight.shape[1] + 4) * 2.0**-24 * sizes + unit.eps * expected.abs() + unit.smallest_normal * unit.eps
    assert y.shape == expected.shape and bool(((y.double() - expected).abs() <= bound).all())


def codes(
    shape: tuple[int, int], bits: int, group_size: int = 64, symmetric: bool = False, density: float = 0.3
) -> tuple[Coded, Tensor]:
    """The codes of a random weight, and the weight that they stand for."""
    quantizer, weight = RTN(group_size, symmetric), sparse(shape, torch.float32, density)
    coded = encode(
        quantizer.quantize(weight, bits, None), quantizer.grid(weight, bits), bits, group_size, symmetric, False
    )
    return coded, coded.decoded()


def coded_matrix(coded: Coded, place: Callable[[Tensor], Tensor] = Tensor.clone, **more: Any) -> CodedMatrix:
    """As the kernel has it, with each part where it is placed."""
    form, parts = coded.about["codes"], {end: place(part) for end, part in coded.parts.items()}
    zeros = place(zero_points(parts.get(ZEROS), form["bits"], *parts[SCALES].shape).to(torch.uint8))
    columns, bits = coded.about["shape"][1], form["bits"]
    return CodedMatrix(parts[CODES], bits, parts[SCALES], zeros, form["exponent"], columns, parts.get(BITMASK), **more)


def close_rounded(y: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """As `close`, of x [tokens, C] that is rounded to 16 bits, 64 columns by their largest."""
    assert y is not None and y.shape == (len(x), len(weight))
    blocks, of_weight = x.float().abs().unflatten(1, (-1, 64)).amax(-1), weight.abs().unflatten(1, (-1, 64)).sum(-1)
    unit, expected = torch.finfo(y.dtype).eps, x.double() @ weight.double().T
    expected = expected if bias is None else expected + bias.double()
    rounding = blocks.double() @ of_weight.double().T / 32_639
    sizes = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    bound = rounding + (weight.shape[1] + 4) * 2.0**-24 * sizes + unit * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound + torch.finfo(y.dtype).smallest_normal).all())


class Guarded:
    """Tensors that end where a page ends, behind which nothing may be read."""

    def __init__(self) -> None:
        self.libc, self.maps = ctypes.CDLL(None, use_errno=True), list[tuple[mmap.mmap, int]]()

    def place(self, tensor: Tensor, offset: int = 0) -> Tensor:
        """A copy, `offset` bytes before the end."""
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        length = (len(data) + offset + PAGE - 1) // PAGE * PAGE
        pages = mmap.mmap(-1, length + PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        assert self.libc.mprotect(ctypes.c_void_p(start + length), PAGE, 0) == 0
        self.maps.append((pages, start + length))
        pages[length - len(data) - offset : length - offset] = data
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=len(data), offset=length - len(data) - offset)
        return raw.view(tensor.dtype).view(tensor.shape) if offset % tensor.element_size() == 0 else raw

    def close(self) -> None:
        """Makes them readable again; they are freed with the last tensor."""
        for _, end in self.maps:
            self.libc.mprotect(ctypes.c_void_p(end), PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
