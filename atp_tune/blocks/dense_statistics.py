"""Statistics of the dense model, in the two forms in which trials come to them: kept on the disk, and as ranks.

On the disk they are measured once for a model, a text and a pruner, whoever asks again: one file of safetensors for
each block, in a folder of the cache. A block's file is read when its turn comes, so that Hessians, which are larger
than the weights, need room for one block in memory.

Where the statistics are those of the dense model, so are Wanda's scores, and only the number of weights that go changes
with the plan: weights are ranked once, then a mask is a comparison. Selecting them anew takes a screening trial as long
as the evaluation of its few windows.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from atp_tune.blocks.prune_pass import BlockStatistics
from atp_tune.cache import folder_atomically
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.devices import free_memory
from atp_tune.pruners import Pruner, Statistics
from atp_tune.pruners.wanda import Ranks, Wanda

DISK_SHARE = 0.5  # of the free disk may be taken
SMALL = 1 << 20  # bytes of a block's file: it stays in memory once it is read
RANK_SHARE = 0.3  # of the free memory may be taken by ranks
RANK_BYTES = 2  # of a rank, in rows of up to 32,768 weights; twice as many beyond


class PerBlock(Sequence[BlockStatistics], ABC):
    """Statistics of all blocks, each found when it is asked for."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    @abstractmethod
    def of(self, index: int) -> BlockStatistics:
        """Those of a block that there is."""

    def __len__(self) -> int:
        return self._blocks

    @overload
    def __getitem__(self, index: int) -> BlockStatistics: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[BlockStatistics]: ...
    def __getitem__(self, index: Any) -> Any:
        found = range(self._blocks)[index]  # IndexError where there is none
        return self.of(found) if isinstance(found, int) else [self.of(each) for each in found]


class CachedStatistics(PerBlock):
    """Statistics that are read from the disk."""

    def __init__(self, folder: Path, kind: type[Statistics], blocks: int, device: torch.device) -> None:
        super().__init__(blocks)
        self._folder, self._kind, self._device = folder, kind, device
        self._small: dict[int, BlockStatistics] = {}

    def of(self, index: int) -> BlockStatistics:
        """Those of a block, from its file."""
        if index not in self._small:
            file = place_of(self._folder, index)
            found = _read(file, self._kind, self._device)
            if file.stat().st_size > SMALL:
                return found
            self._small[index] = found
        return self._small[index]


class Ranked(PerBlock):
    """Statistics of all blocks: as they are when a block is asked for first, as ranks of its weights from then on.

    A plan that is pruned once has no use for ranks, which take as long to find as two or three masks.
    """

    def __init__(self, statistics: Sequence[BlockStatistics], checkpoint: Checkpoint) -> None:
        super().__init__(len(statistics))
        self._statistics = statistics
        self._checkpoint = checkpoint
        self._ranks: dict[int, BlockStatistics | None] = {}

    def of(self, index: int) -> BlockStatistics:
        """Those of a block."""
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
        return {x.name: Ranks.of(x.matrix(weights[x.key]), found[x.name]) for x in linears}


def save_all(folder: Path, measured: Iterable[BlockStatistics]) -> None:
    """Writes statistics block by block as they are measured; the folder is there when all are. OSError if it cannot."""
    with folder_atomically(folder) as temporary:
        for index, statistics in enumerate(measured):
            _write(place_of(temporary, index), statistics)


def is_room(folder: Path, needed: int) -> bool:
    """Whether the disk of a folder has room for so many bytes, and as much again."""
    return needed <= DISK_SHARE * shutil.disk_usage(folder).free


def place_of(folder: Path, index: int) -> Path:
    """The file of one block."""
    return folder / f"{index}.safetensors"


def _write(file: Path, statistics: BlockStatistics) -> None:
    """Linears that share an object share its tensors."""
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
    except SafetensorError as error:  # a full disk, say
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
    """Whether ranks say all that a pruner needs to know, and there is room for them beside the weights."""
    is_by_row = isinstance(pruner, Wanda) and pruner.compare == "row" and pruner.group is None
    needed = RANK_BYTES * sum(checkpoint.sizes)
    return is_by_row and checkpoint.offload == "none" and needed < RANK_SHARE * free_memory(checkpoint.device)
