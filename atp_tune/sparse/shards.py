"""Writes a sparse checkpoint: copies the source's safetensors shards, and overwrites the pruned tensors in them.

All other tensors stay equal to the source's byte for byte. Only one tensor at a time is in memory, however the source
distributes its blocks over shards. A disk that is too small shows before anything is pruned.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atp_tune.cache import folder_atomically
from atp_tune.checkpoints.convert import WEIGHTS
from atp_tune.checkpoints.headers import places, read_header
from atp_tune.checkpoints.trust import copy_small, is_slim, read_table
from atp_tune.checkpoints.unpacking import bytes_of, dtypes
from atp_tune.errors import UserError
from atp_tune.sparse.own_code import bring_own_code


class Shards:
    """The shards of a source folder with the offsets of their tensors.

    prefix: the model's `base_model_prefix`; whole: all weights of a pruned tensor are written, not only changed ones;
    dtype: all floats are written in this number format, None: in that of the source.
    """

    def __init__(self, source: Path, prefix: str, whole: bool = False, dtype: torch.dtype | None = None) -> None:
        self._whole = whole
        self._dtype = dtype
        self._source = source
        self._prefix = prefix
        self._places = {shard.name: places(shard) for shard in sorted(source.glob("*.safetensors"))}

    def find(self, name: str) -> tuple[str, str]:
        """Shard and key of a tensor, with or without the prefix; UserError if the source lacks it."""
        names = (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}")
        for shard, keys in self._places.items():
            for key in names:
                if key in keys:
                    return shard, key
        raise UserError(f"model {self._source}: has no tensor for {name}; save it with this transformers version first")

    def write(self, out: Path, names: set[str], pruned: Iterator[tuple[str, Tensor, Tensor]]) -> None:
        """Writes all shards into `out`; `pruned` yields name, dense and pruned weight for each of `names`."""
        found = {name: self.find(name) for name in names}
        for shard in self._places:
            if self._dtype is None:
                shutil.copyfile(self._source / shard, out / shard)
            else:
                cast(self._source / shard, out / shard, self._dtype)
            (out / shard).chmod(0o644)
        there = {shard: places(out / shard) for shard in self._places}
        with ExitStack() as stack:
            shards = {shard for shard, _ in found.values()}
            files = {shard: stack.enter_context((out / shard).open("r+b")) for shard in shards}
            for name, dense, sparse in pruned:
                shard, key = found.pop(name)
                files[shard].seek(there[shard][key])
                files[shard].write(self._merge(shard, key, dense, sparse).view(torch.uint8).numpy().data)
        assert not found

    def _merge(self, shard: str, key: str, dense: Tensor, sparse: Tensor) -> Tensor:
        """The source's tensor with the weights that pruning changed."""
        with safe_open(self._source / shard, framework="pt") as tensors:
            source = tensors.get_tensor(key)
        if source.shape != dense.shape or not torch.equal(source.to(dense.dtype), dense.cpu()):
            raise UserError(f"model {self._source}: {key} in {shard} is not what transformers loaded for it")
        written = sparse.cpu().to(source.dtype)
        if not self._whole:
            written = torch.where((sparse != dense).cpu(), written, source)
        return written.to(self._dtype or source.dtype).contiguous()


def cast(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes a file of weights with all its floats in a number format, one tensor at a time; UserError on overflow."""
    kinds, header, end = dtypes(), dict[str, Any](), 0
    name_of = {kind: name for name, kind in kinds.items()}
    for name, entry in read_header(source).items():
        (start, stop), kind = entry["data_offsets"], kinds.get(entry["dtype"])
        size = stop - start if kind is None else (stop - start) // kind.itemsize * dtype.itemsize
        header[name] = {**entry, "data_offsets": [end, end := end + size]}
        if kind is not None:
            header[name]["dtype"] = name_of[dtype]
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with safe_open(source, framework="pt") as tensors, out.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            stored = tensors.get_tensor(name)
            written = stored.to(dtype) if entry["dtype"] == name_of[dtype] else stored
            if written.is_floating_point() and stored.isfinite().all() and not written.isfinite().all():
                raise UserError(f"--dtype: {name} has values that {dtype} cannot hold; take bfloat16")
            stream.write(bytes_of(written))


def declare(folder: Path, dtype: torch.dtype) -> None:
    """Says in the config of a folder in which number format its weights are, and in their index how large they are."""
    table = read_table(folder / "config.json")
    for part in (table, *(value for value in table.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & part.keys():
            part[key] = str(dtype).removeprefix("torch.")
    table.setdefault("dtype", str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    for index in folder.glob("*.safetensors.index.json"):
        named = read_table(index)
        headers = [read_header(folder / file) for file in {*named["weight_map"].values()}]
        sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for each in headers for entry in each.values()]
        named["metadata"] = {**named.get("metadata", {}), "total_size": sum(sizes)}
        index.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


@contextmanager
def sparse_folder(source: Path, out: Path) -> Iterator[Path]:
    """Yields a temporary folder with all files of the source but its weights; it becomes `out` at the end.

    Of a slim source no code is copied: the folder gets that of this package.
    """
    try:
        with folder_atomically(out) as folder:
            copy_small(source, folder, WEIGHTS)
            if is_slim(source):
                bring_own_code(folder)
            yield folder
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out}: cannot be written: {error}") from None
