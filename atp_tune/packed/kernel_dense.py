"""Products with a weight that is not packed, by the loops of the kernel, as of the head of a packed model.

Up to BATCH tokens read each weight once, so that bytes are time, and these loops read them faster than torch's.
"""

import ctypes

import torch
from torch import Tensor

from atp_tune.packed.kernel import BATCH, FLOATS, product
from atp_tune.packed.library import ALONE, VARIANTS, Weight, kernel_name, library, parallel, watched

DENSE = {torch.bfloat16: 5, torch.float32: 6}  # the numbers are those of kernel.c
FASTER = ("amx", "avx512-vbmi2", "avx512-bf16", "avx512", "avx2")  # variants that were measured to be so
BLOCK = 64  # columns that it reads at once; a row of another length would be multiplied with what follows it


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The product y [..., R] of x [..., C] and the transpose of a weight [R, C], plus the bias, all of one type.

    Sums are in float32; the same input gives the same bits. None where the loops are not for it: by another variant
    than those in FASTER, for more than BATCH tokens, on another device, of another type than bfloat16 or float32, where
    autocast or anything else follows the operations or a gradient is wanted, or if C is no multiple of BLOCK.
    """
    learns = torch.is_grad_enabled() and x.requires_grad
    if watched(x, weight, bias) or learns or torch.is_autocast_enabled("cpu"):
        return None
    (rows, columns), tensors = weight.shape, (x, weight) if bias is None else (x, weight, bias)
    fits = all(tensor.is_cpu and tensor.dtype == x.dtype for tensor in tensors) and x.dtype in DENSE
    if not fits or x.shape[-1] != columns or columns % BLOCK or not all(part.is_contiguous() for part in tensors[1:]):
        return None
    flat, name, loaded = x.reshape(-1, columns), kernel_name(), library()
    if not 1 <= len(flat) <= BATCH or name not in FASTER or loaded is None:
        return None
    places = (weight.data_ptr(), None, None, None, None if bias is None else bias.data_ptr(), parallel())
    kinds = (DENSE[x.dtype], FLOATS[x.dtype], VARIANTS[name], ALONE)
    fields = Weight(*places, rows, columns, weight.numel(), 1, *kinds)
    y = product(loaded, ctypes.addressof(fields), flat, FLOATS[x.dtype], rows)
    assert y is not None  # few tokens have no other way
    return y.view(*x.shape[:-1], rows)
