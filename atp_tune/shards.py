"""Writing a sparse checkpoint: the source's own safetensors shards, with the pruned linears put in.

Shards keep the names, tensors and number formats of the source, so that every tensor that was not pruned is equal to
the source's byte for byte. A shard is written as soon as its last pruned tensor has come.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from atp_tune.cache import folder_atomically
from atp_tune.convert import WEIGHTS
from atp_tune.errors import UserError
from atp_tune.trust import small_files


class Shards:
    """The shards of a source folder and where each tensor lies; `prefix` is the model's `base_model_prefix`."""

    def __init__(self, source: Path, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self._keys = {shard.name: _keys(shard) for shard in sorted(source.glob("*.safetensors"))}

    def find(self, name: str) -> tuple[str, str]:
        """Shard and key of a tensor, whose name may lack the prefix; UserError if the source does not have it."""
        names = (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}")
        for shard, keys in self._keys.items():
            for key in names:
                if key in keys:
                    return shard, key
        raise UserError(f"model {self._source}: has no tensor for {name}; save it with this transformers version first")

    def write(self, out: Path, names: set[str], pruned: Iterator[tuple[str, Tensor, Tensor]]) -> None:
        """Writes all shards into `out`; `pruned` yields name, dense and pruned weight for each of `names`."""
        places = {name: self.find(name) for name in names}
        waiting = {shard: {key for where, key in places.values() if where == shard} for shard in self._keys}
        ready: dict[str, dict[str, Tensor]] = {shard: {} for shard in self._keys}
        for shard in [shard for shard, keys in waiting.items() if not keys]:
            shutil.copyfile(self._source / shard, out / shard)
        for name, dense, sparse in pruned:
            shard, key = places[name]
            ready[shard][key] = self._merge(shard, key, dense, sparse)
            waiting[shard].remove(key)
            if not waiting[shard]:
                self._write_shard(out, shard, ready.pop(shard))

    def _merge(self, shard: str, key: str, dense: Tensor, sparse: Tensor) -> Tensor:
        """The source's tensor with the weights that pruning changed, in the source's number format."""
        with safe_open(self._source / shard, framework="pt") as tensors:
            source = tensors.get_tensor(key)
        if source.shape != dense.shape or not torch.equal(source.to(dense.dtype), dense.cpu()):
            raise UserError(f"model {self._source}: {key} in {shard} is not what transformers loaded for it")
        return torch.where((sparse != dense).cpu(), sparse.cpu().to(source.dtype), source)

    def _write_shard(self, out: Path, shard: str, pruned: dict[str, Tensor]) -> None:
        with safe_open(self._source / shard, framework="pt") as tensors:
            merged = {key: pruned[key] if key in pruned else tensors.get_tensor(key) for key in self._keys[shard]}
            save_file(merged, out / shard, metadata=tensors.metadata())
        (out / shard).chmod(0o644)


def check_free(out: Path) -> None:
    """UserError if something is at `out` already; asked before any work is done."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"--out {out}: is there already; choose another folder or remove it")


@contextmanager
def sparse_folder(source: Path, out: Path) -> Iterator[Path]:
    """Yields a temporary folder with everything of the source but its weights; it becomes `out` at the end."""
    try:
        with folder_atomically(out) as folder:
            for file in small_files(source, WEIGHTS):
                shutil.copyfile(file, folder / file.name)
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from None


def _keys(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as tensors:
        return list(tensors.keys())
