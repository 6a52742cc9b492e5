"""Statistics of the dense model, on disk and as ranks.

On disk they are kept in the cache per model, text and pruner, with one safetensors file per block. The file of a block
is read when the block is pruned, so that Hessians, which are larger than the weights, are in memory for one block only.

With statistics of the dense model, Wanda's scores are the same in all trials; only the number of zeros changes. So
weights are ranked once, and a mask is a comparison, which saves half the time of a screening trial.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.cache import folder_atomically
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.wanda import Ranks, Wanda

DISK_SHARE = 0.5  # maximum share of the free disk space for statistics
SMALL = 1 << 20  # bytes of a file up to which its statistics stay in memory
RANK_SHARE = 0.3  # maximum share of the free memory for ranks
RANK_BYTES = 2  # bytes of a rank, in rows of up to 32,768 weights (longer rows: 4)


class PerBlock(Sequence[BlockStatistics], ABC):
    """A sequence of the statistics of each block, computed on access."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    @abstractmethod
    def of(self, index: int) -> BlockStatistics:
        """The statistics of block `index`, from 0."""

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, index: Any) -> Any:
        found = range(self._blocks)[index]  # raises IndexError
        return self.of(found) if isinstance(found, int) else [self.of(each) for each in found]


class CachedStatistics(PerBlock):
    """Statistics that are read from disk."""

    def __init__(self, folder: Path, kind: type[Statistics], blocks: int, device: torch.device) -> None:
        super().__init__(blocks)
        self._folder, self._kind, self._device = folder, kind, device
        self._small: dict[int, BlockStatistics] = {}

    def of(self, index: int) -> BlockStatistics:
        """The statistics of a block, read from its file."""
        if index not in self._small:
            file = place_of(self._folder, index)
            found = _read(file, self._kind, self._device)
            if file.stat().st_size > SMALL:
                return found
            self._small[index] = found
        return self._small[index]


class Ranked(PerBlock):
    """Statistics of all blocks: plain on the first access of a block, ranks of its weights from then on.

    Ranking takes as long as two or three masks, so it is not worthwhile for a single plan.
    """

    def __init__(self, statistics: Sequence[BlockStatistics], checkpoint: Checkpoint, group: int | None = None) -> None:
        super().__init__(len(statistics))
        self._statistics = statistics
        self._checkpoint = checkpoint
        self._group = group
        self._ranks: dict[int, BlockStatistics | None] = {}

    def of(self, index: int) -> BlockStatistics:
        """The statistics of a block, plain or as ranks."""
        if index not in self._ranks:
            plain = self._statistics[index]
            self._ranks[index] = None
            return plain
        found = self._ranks[index]
        if found is None:
            found = self._ranks[index] = self._ranked(index)
        return found

    def _ranked(self, index: int) -> BlockStatistics:
        found, weights = self._statistics[index], self._checkpoint.weights(index)
        linears = [linear for linear in self._checkpoint.linears[index] if linear.name in found]
        return {x.name: Ranks.of(x.matrix(weights[x.key]), found[x.name], self._group) for x in linears}


def save_all(folder: Path, measured: Iterable[BlockStatistics]) -> None:
    """Writes statistics block by block as they are measured; the folder appears when complete. May raise OSError."""
    with folder_atomically(folder, shared=True) as temporary:
        for index, statistics in enumerate(measured):
            _write(place_of(temporary, index), statistics)


def is_room(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes are at most the share `DISK_SHARE` of the free disk space of a folder."""
    return needed <= DISK_SHARE * shutil.disk_usage(folder).free


def place_of(folder: Path, index: int) -> Path:
    """The file of block `index`."""
    return folder / f"{index}.safetensors"


def _write(file: Path, statistics: BlockStatistics) -> None:
    """Writes statistics; linears that share an object share its tensors."""
    distinct = {id(each): each for each in statistics.values()}
    numbers = {known: number for number, known in enumerate(distinct)}
    tensors = {
        f"{numbers[known]} {name}": tensor.cpu().contiguous()
        for known, each in distinct.items()
        for name, tensor in each.tensors().items()
    }
    linears = {name: numbers[id(each)] for name, each in statistics.items()}
    try:
        save_file(tensors, file, {"linears": json.dumps(linears)})
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from error


def _read(file: Path, kind: type[Statistics], device: torch.device) -> BlockStatistics:
    parts: dict[int, dict[str, torch.Tensor]] = {}
    with safe_open(file, "pt", device=str(device)) as stored:
        for key in stored.keys():  # noqa: SIM118 - it is no mapping
            number, _, name = key.partition(" ")
            parts.setdefault(int(number), {})[name] = stored.get_tensor(key)
        linears = json.loads(stored.metadata()["linears"])
    found = {number: kind.restored(tensors) for number, tensors in parts.items()}
    return {name: found[number] for name, number in linears.items()}


def can_rank(pruner: Pruner, checkpoint: Checkpoint) -> bool:
    """Whether ranks are sufficient for a pruner, and fit in memory beside the weights."""
    is_by_row = isinstance(pruner, Wanda) and pruner.goes_by_row
    needed = RANK_BYTES * sum(checkpoint.sizes)
    return is_by_row and checkpoint.offload == "none" and needed < RANK_SHARE * free_memory(checkpoint.device)
