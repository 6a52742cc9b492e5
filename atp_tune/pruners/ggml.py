"""Rounding by ggml itself, the library of llama.cpp: the values of a .gguf file's types, bit for bit.

Each type minimises squared errors of blocks of a row, weighted by the importance of each column: the mean of the
squares of its inputs, as llama.cpp's importance matrix has it. The package `gguf` reads the bytes back.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from atp_tune.errors import UserError
from atp_tune.pruners import Measures, Statistics, Unprepared
from atp_tune.pruners.statistics import InputMoments
from atp_tune.utils.system import require

LEAST = 1e-8  # importance of a column without inputs, as a share of the mean
LARGEST = 65504  # of 16 bits
KEPT = 2**30  # bytes that are kept of what was rounded: a search asks for a few types of each matrix again and again
_KEPT: Any = {}  # by type, shape, weights and importance, of which 64 bits each


class GGML(Unprepared):
    """Rounds weights to a type of ggml; the settings of other quantizers do nothing."""

    measures: ClassVar[Measures] = InputMoments

    def __init__(self, *settings: object) -> None:
        require("gguf", "quantize.quantizers", "llama_cpp_py_sync")

    def quantize(self, weight: Tensor, bits: int | str, statistics: Statistics | None, zeros: object = None) -> Tensor:
        """The values of weight [out, in] at the type `bits`; statistics are the inputs' `InputMoments`."""
        assert isinstance(bits, str)
        importance = importances(statistics) if isinstance(statistics, InputMoments) else None
        return rounded(weight, bits, importance)


def importances(statistics: InputMoments) -> Tensor:
    """The mean square of each input [in], float32; of inputs that were always 0 a little."""
    means = statistics.mean_squares().cpu()
    return means.clamp(min=LEAST * float(means.mean()))


def rounded(weight: Tensor, name: str, importance: Tensor | None) -> Tensor:
    """The values of weight [rows, columns] at a type, in its dtype, see `encoded`."""
    from gguf import GGMLQuantizationType, quants

    values = quants.dequantize(encoded(weight, name, importance), GGMLQuantizationType[name])
    return torch.from_numpy(values).to(weight.device, weight.dtype)


def encoded(weight: Tensor, name: str, importance: Tensor | None) -> Any:
    """Weight [rows, columns] as bytes [rows, bytes] of a type; without importance [columns] columns count alike.

    UserError for what ggml ends the process at: rows that are no whole blocks, and weights that are not finite, or
    beyond its scales of 16 bits.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values = np.ascontiguousarray(weight.detach().float().cpu().numpy())
    block, size = GGML_QUANT_SIZES[number := GGMLQuantizationType[name]]
    if values.shape[1] % block:
        raise UserError(f"levels: a row of {values.shape[1]} weights cannot be of type {name}")
    if not np.abs(values).max() <= LARGEST:  # nor NaN
        raise UserError(
            f"quantize.quantizers: ggml rounds finite weights up to {LARGEST:g}, not one of {[*weight.shape]}"
        )
    given = np.ones(values.shape[1], np.float32) if importance is None else np.ascontiguousarray(importance.numpy())
    key = name, values.shape, hash(values.tobytes()), hash(given.tobytes())
    if key in _KEPT:
        return _KEPT[key]
    stored, threads = np.empty((len(values), values.shape[1] // block * size), np.uint8), torch.get_num_threads()

    def part(dense: Any, there: Any) -> None:
        _function()(int(number), dense.ctypes.data, there.ctypes.data, 0, len(dense), dense.shape[1], given.ctypes.data)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, np.array_split(values, threads), np.array_split(stored, threads)))
    if sum(each.nbytes for each in _KEPT.values()) > KEPT:
        _KEPT.clear()
    _KEPT[key] = stored
    return stored


@cache
def _function() -> Any:
    """`ggml_quantize_chunk`: type, values, bytes, first row, rows, columns, importance."""
    import llama_cpp_py_sync

    folder = Path(llama_cpp_py_sync.__path__[0])
    function = ctypes.CDLL(str(next(folder.glob("*ggml-base*")))).ggml_quantize_chunk
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    return function
