"""What zeros do to files: bytes dense, with zeros, compressed; and where the zeros are."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.errors import UserError
from atp_tune.events import Step, Watch
from atp_tune.metrics.speed import Sizes
from atp_tune.pruners.selection import nonzeros

CHUNK = 16 << 20  # bytes read at a time
LEVEL = 3  # of zstd, its default


def zeros_by_kind(checkpoint: Checkpoint) -> dict[str, float]:
    """Share of zeros of each kind of linear, by its name in a block, over all blocks."""
    zeros, sizes = Counter[str](), Counter[str]()
    for index, linears in enumerate(checkpoint.linears):
        weights = checkpoint.weights(index)
        for linear in linears:
            kind = re.sub(r"\[\d+\]$", "", linear.name)
            zeros[kind] += linear.size - int(nonzeros(linear.matrix(weights[linear.key])))
            sizes[kind] += linear.size
    return {kind: zeros[kind] / size for kind, size in sizes.items()}


def sizes(dense: Path, sparse: Path, watch: Watch) -> Sizes:
    """Bytes of the weight files of two folders; UserError where zstd is not installed."""
    zstd = _zstd()
    files = {folder: sorted(folder.glob("*.safetensors")) for folder in (dense, sparse)}
    total = sum(file.stat().st_size for found in files.values() for file in found)
    done, plain, packed = 0, Counter[Path](), Counter[Path]()
    for folder, found in files.items():
        for file in found:
            compress = zstd()
            for chunk in _chunks(file):
                packed[folder] += len(compress(chunk))
                plain[folder] += len(chunk)
                done += len(chunk)
                watch(Step("compress", done, total))
            packed[folder] += len(compress(None))
    return Sizes(
        dense=plain[dense], sparse=plain[sparse], dense_zstd=packed[dense], sparse_zstd=packed[sparse]
    )  # fmt: skip


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def _zstd() -> Callable[[], Callable[[bytes | None], bytes]]:
    """Makes compressors that take chunks, and None at the end."""
    try:
        from zstandard import ZstdCompressor
    except ModuleNotFoundError:
        raise UserError("speedup: zstandard is not installed; run: pip install 'atp-tune[speed]'") from None

    def compressor() -> Callable[[bytes | None], bytes]:
        made = ZstdCompressor(level=LEVEL).compressobj()
        return lambda chunk: made.flush() if chunk is None else made.compress(chunk)

    return compressor
