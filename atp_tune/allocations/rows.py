"""Offsets of rows: how much sparser than its linear each row (output) of a linear is, in 1/256 of its inputs.

The zeros of its rows add up to those of the linear at its sparsity. They follow from the offsets in whole numbers, the
same on every machine.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from atp_tune.allocations.budget import LinearSparsities, Shape

UNITS = 256  # offsets of 1/256 of the inputs
MOST = 127  # highest offset
LEVEL = 9  # of compression

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Zeros = NDArray[np.int64]


@dataclass(frozen=True)
class RowOffsets:
    """One number from -127 to 127 for each row of each linear of each block, as bytes of int8."""

    blocks: tuple[tuple[bytes, ...], ...]

    @classmethod
    def of(cls, blocks: Sequence[Sequence["NDArray[Any]"]]) -> "RowOffsets":
        """The nearest offsets to shares of the inputs, [rows] of each linear of each block."""
        return cls(tuple(tuple(_rounded(UNITS * row.astype("float64")) for row in block) for block in blocks))

    @classmethod
    def read(cls, text: str, shapes: Sequence[Sequence[Shape]]) -> "RowOffsets":
        """Offsets from `stored`; ValueError if they are not those of linears with these shapes."""
        rows = [[shape.rows for shape in block] for block in shapes]
        offsets, ends = read_offsets(text, sum(map(sum, rows))), accumulate(count for block in rows for count in block)
        return cls(tuple(tuple(offsets[(end := next(ends)) - count : end] for count in block) for block in rows))

    def stored(self) -> str:
        """The offsets as text: bytes of all linears one after the other, compressed, in base64."""
        return offsets_to_text(b"".join(row for block in self.blocks for row in block))

    def scaled(self, factor: float) -> "RowOffsets":
        """The offsets times a factor."""
        return RowOffsets(tuple(tuple(_rounded(factor * _numbers(row)) for row in block) for block in self.blocks))

    def towards(self, other: "RowOffsets", share: float) -> "RowOffsets":
        """The offsets at this share of the way to others."""
        return RowOffsets(
            tuple(
                tuple(_rounded((1 - share) * _numbers(a) + share * _numbers(b)) for a, b in zip(*pair, strict=True))
                for pair in zip(self.blocks, other.blocks, strict=True)
            )
        )


@dataclass(frozen=True)
class RowSparsities:
    """The sparsity of each linear of each block, and the offsets of their rows if those differ within linears."""

    linears: LinearSparsities
    offsets: RowOffsets | None = None

    def towards(self, other: "RowSparsities", share: float) -> "RowSparsities":
        """The sparsities and offsets at this share of the way to another's."""
        pairs = zip(self.linears, other.linears, strict=True)
        linears = tuple(tuple(a + share * (b - a) for a, b in zip(*pair, strict=True)) for pair in pairs)
        if self.offsets is None or other.offsets is None:
            return RowSparsities(linears)
        return RowSparsities(linears, self.offsets.towards(other.offsets, share))


def offsets_to_text(offsets: bytes) -> str:
    """Offsets as text: compressed, in base64."""
    return base64.b64encode(zlib.compress(offsets, LEVEL)).decode("ascii")


def read_offsets(text: str, rows: int) -> bytes:
    """Offsets from `offsets_to_text`; ValueError if they are not those of so many rows."""
    try:
        unpacking = zlib.decompressobj()
        offsets = unpacking.decompress(base64.b64decode(text, validate=True), rows + 1)
    except (ValueError, zlib.error):
        raise ValueError("rows: no offsets of rows in base64") from None
    if len(offsets) != rows or not unpacking.eof:
        raise ValueError(f"rows: not one offset for each of the {rows} rows")
    return offsets


def zeros_of_rows(columns: int, sparsity: float, offsets: bytes) -> "Zeros":
    """The number of zeros [rows] of each row of a linear with so many inputs: ⌊rows · columns · s⌋ in all.

    Rows get ⌊(columns · offset + c) / 256⌋, in [0, columns], with the highest whole number c that makes not too many
    zeros; the first rows that c + 1 would give one more get what is left.
    """
    import numpy as np

    wanted = np.frombuffer(offsets, np.int8).astype(np.int64) * columns
    total = int(len(wanted) * columns * sparsity)

    def rows_at(shift: int) -> "Zeros":
        return np.clip((wanted + shift) // UNITS, 0, columns)

    low, high = -UNITS * columns, 2 * UNITS * columns  # at which all rows are dense, and all are zero
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int(rows_at(middle).sum()) <= total else (low, middle)
    zeros = rows_at(low)
    zeros[np.flatnonzero(rows_at(low + 1) - zeros)[: total - int(zeros.sum())]] += 1
    return zeros


def _numbers(row: bytes) -> "NDArray[Any]":
    import numpy as np

    return np.frombuffer(row, np.int8).astype(np.float64)


def _rounded(values: "NDArray[Any]") -> bytes:
    import numpy as np

    return bytes(np.clip(np.rint(values), -MOST, MOST).astype(np.int8))
