"""Statistics of the dense model, kept on the disk: measured once for a model, a text and a pruner, whoever asks again.

One file of safetensors for each block, in a folder of the cache; a block's file is read when its turn comes, so that
Hessians, which are larger than the weights, need room for one block in memory.
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
from atp_tune.pruners import Statistics

SHARE = 0.5  # of the free disk may be taken
SMALL = 1 << 20  # bytes of a block's file: it stays in memory once it is read


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


def save_all(folder: Path, measured: Iterable[BlockStatistics]) -> None:
    """Writes statistics block by block as they are measured; the folder is there when all are. OSError if it cannot."""
    with folder_atomically(folder) as temporary:
        for index, statistics in enumerate(measured):
            _write(place_of(temporary, index), statistics)


def is_room(folder: Path, needed: int) -> bool:
    """Whether the disk of a folder has room for so many bytes, and as much again."""
    return needed <= SHARE * shutil.disk_usage(folder).free


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
