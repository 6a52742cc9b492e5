"""Products with a weight that is not packed, by the loops of the kernel, as of the head of a packed model.

Up to BATCH tokens read each weight once, so that bytes are time, and these loops read them faster than torch's.
"""

import ctypes

import torch
from torch import Tensor

from atp_tune.packed.kernel import BATCH, FLOATS, product
from atp_tune.packed.library import ALONE, VARIANTS, Weight, kernel_name, library, parallel

DENSE = {torch.bfloat16: 5, torch.float32: 6}  # the numbers are those of kernel.c
BLOCK = 64  # columns that it reads at once; a row of another length would be multiplied with what follows it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The product y [..., R] of x [..., C] and the transpose of a weight [R, C], plus the bias, all of one type.

    Sums are in float32; the same input gives the same bits. None where the loops are not for it: without the library,
    for more than BATCH tokens, on another device, of another type than bfloat16 or float32, or if C is no multiple of
    BLOCK.
    """
    rows, columns = weight.shape
    flat = x.reshape(-1, columns) if x.shape[-1] == columns else None
    if flat is None or not 1 <= len(flat) <= BATCH or not (x.is_cpu and weight.is_cpu) or columns % BLOCK:
        return None
    if x.dtype != weight.dtype or x.dtype not in DENSE or not weight.is_contiguous():
        return None
    name, loaded = kernel_name(), library()
    if name is None or loaded is None or (bias is not None and not (bias.dtype == x.dtype and bias.is_contiguous())):
        return None
    places = (weight.data_ptr(), None, None, None, None if bias is None else bias.data_ptr(), parallel())
    kinds = (DENSE[x.dtype], FLOATS[x.dtype], VARIANTS[name], ALONE)
    fields = Weight(*places, rows, columns, weight.numel(), 1, *kinds)
    y = product(loaded, ctypes.addressof(fields), flat, FLOATS[x.dtype], rows)
    assert y is not None  # few tokens have no other way
    return y.view(*x.shape[:-1], rows)
