"""Unpacks a packed folder, as `sparse.packing` writes it, to the sparse checkpoint that it was made from.

The shards get the same bytes again, each checked by its SHA-256. What was rounded stays rounded, and has the SHA-256 of
its tensors only. One tensor at a time is in memory. Layout: docs/formats.md.
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from atp_tune.cache import check_room, folder_atomically, write_out
from atp_tune.checkpoints.convert import WEIGHTS
from atp_tune.checkpoints.headers import parse_header
from atp_tune.checkpoints.trust import copy_small, read_table
from atp_tune.errors import UserError
from atp_tune.paths import check_writable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ABOUT, CODE, PACKED_INDEX = "atp_sparse.json", "modeling_atp_sparse.py", "model.safetensors.index.packed.json"
MODEL_TYPE = "atp_sparse"  # as in packed.modeling_atp_sparse, which imports torch


@dataclass(frozen=True)
class Original:
    """What `ABOUT` keeps of the folder that was packed.

    headers: of each shard as it stands in the file; sha256: of each shard, None if its values were rounded; tensors:
    SHA-256 of each packed tensor, unpacked, and of all of rounded shards; names: of tensors that got another one;
    files: texts of small files that packing changed; added: names of small files that it added.
    """

    version: int
    headers: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str | None] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes it into a packed folder."""
        write_out(folder / ABOUT, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "Original":
        """What a packed folder says; UserError if it is no such file, or names files outside its folder."""
        table = read_table(folder / ABOUT)
        try:
            found = cls(**table)
            kinds = {"headers": str, "sha256": str | None, "tensors": str, "names": str, "files": str}
            right = all(isinstance(value, kind) for key, kind in kinds.items() for value in table[key].values())
            names = (*found.headers, *found.files, *found.added)
            plain = [PurePath(name).name == name and name not in (".", "..") for name in names]
            right = right and found.version == 1 and all(plain) and found.headers.keys() == found.sha256.keys()
        except (TypeError, KeyError, AttributeError):
            right = False
        if not right:
            raise UserError(f"{folder / ABOUT}: is not what `pack` writes; download the folder again")
        return found


def is_packed(folder: Path) -> bool:
    """Whether a folder is a packed one, by its config."""
    file = folder / "config.json"
    return file.is_file() and read_table(file).get("model_type") == MODEL_TYPE


def unpack_folder(source: Path, out: Path, shared: bool = False) -> None:
    """Writes the checkpoint that `source` was packed from into the new folder `out`; `shared`: in the cache.

    A folder that `save_pretrained` wrote has no `ABOUT`: its shards get names and headers anew. Errors: UserError if
    `source` is no packed folder, if a part of it is damaged, or if `out` cannot be written.
    """
    if not is_packed(source):
        raise UserError(f"{source}: is no packed folder, by its config.json; `tune.py pack` writes one")
    original = Original.read(source) if (source / ABOUT).is_file() else None
    added = [ABOUT, *(original.added if original else (CODE, PACKED_INDEX))]
    headers = original.headers.items() if original else ()
    entries = [entry for shard, text in headers for entry in parse_header(text.encode(), source / shard).values()]
    size = sum(end - start for start, end in (entry["data_offsets"] for entry in entries))
    check_room(out, size) if shared else check_writable(out, size)
    try:
        with folder_atomically(out, shared) as folder, ExitStack() as stack:
            copy_small(source, folder, WEIGHTS, tuple(f"/{name}" for name in added))
            tensors = _Tensors(source, stack)
            if original is None:
                tensors.save(folder)
            else:
                for name, text in original.files.items():
                    (folder / name).write_bytes(as_bytes(text))
                for shard in original.headers:
                    _write_shard(folder / shard, shard, original, tensors)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{source}: cannot be unpacked: {error}") from None


class _Tensors:
    """The tensors of a packed folder, unpacked."""

    def __init__(self, source: Path, stack: ExitStack) -> None:
        from atp_tune.packed.modeling_atp_sparse import checked_table

        self._config = read_table(source / "config.json")
        self._table = checked_table(self._config)
        self._packed = {**self._table["stored"], **self._table["linears"]}
        files = sorted(source.glob("model.packed*.safetensors"))
        self._files = {file.name: stack.enter_context(safe_open(file, framework="pt")) for file in files}
        self._place: dict[str, Any] = {name: tensors for tensors in self._files.values() for name in tensors.keys()}  # noqa: SIM118

    def read(self, name: str, dtype: str | None = None) -> "Tensor":
        """A tensor [...] by its name, as a dtype of safetensors; ValueError if it is not there, or damaged."""
        from atp_tune.packed.modeling_atp_sparse import read_packed

        if name in self._place:
            stored: Tensor = self._place[name].get_tensor(name)
            return stored
        if name not in self._packed:
            raise ValueError(f"it has no tensor {name}")
        dense = read_packed(self._place, name, self._packed[name])
        if dtype is not None and dtype not in dtypes():
            raise ValueError(f"{name} cannot be {dtype}")
        return dense if dtype is None else dense.to(dtypes()[dtype])

    def save(self, folder: Path) -> None:
        """Writes config and weights of a folder that does not say how they stood before it was packed."""
        import torch
        from safetensors.torch import save_file

        from atp_tune.packed.modeling_atp_sparse import CODES, PARTS, VALUES

        kept = {key: value for key, value in self._config.items() if key not in (MODEL_TYPE, "auto_map")}
        classes = [str(name).removeprefix("Packed") for name in self._config.get("architectures") or ()]
        kept |= {"model_type": self._table["family"], "architectures": classes}
        (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        dtype = getattr(torch, str(kept.get("dtype")), None)
        parts = {f"{name}{end}" for name in self._packed for end in PARTS}
        ends = {f"{name}{end}": name for name in self._packed for end in (VALUES, CODES)}
        places: dict[str, str] = {}
        for number, opened in enumerate(self._files.values(), 1):
            shard = "model.safetensors"
            if len(self._files) > 1:
                shard = f"model-{number:05}-of-{len(self._files):05}.safetensors"
            names = [ends.get(name, name) for name in opened.keys() if name in ends or name not in parts]  # noqa: SIM118
            found = {name: self.read(name) for name in names}
            if isinstance(dtype, torch.dtype):  # of what was rounded too
                found = {name: one.to(dtype) if name in self._packed else one for name, one in found.items()}
            save_file(found, folder / shard, metadata={"format": "pt"})
            places.update(dict.fromkeys(found, shard))
        if len(self._files) > 1:
            index = {"metadata": {}, "weight_map": dict(sorted(places.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def as_text(file: Path) -> str:
    """The text of a file, by which `as_bytes` gives the same bytes again, whatever they are."""
    return file.read_bytes().decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The bytes of a text that `as_text` read."""
    return text.encode("utf-8", "surrogateescape")


def dtypes() -> dict[str, "torch.dtype"]:
    """The dtypes that can be packed, by their names in safetensors."""
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def sha256_of_tensor(tensor: "Tensor") -> str:
    """SHA-256 (hex) of the values of a tensor as they stand in a file."""
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def bytes_of(tensor: "Tensor") -> memoryview:
    """The values of a tensor as they stand in a file; a view."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_shard(file: Path, shard: str, original: Original, tensors: _Tensors) -> None:
    """Writes a shard with the header that it had; ValueError if a SHA-256 differs."""
    header = original.headers[shard].encode()
    whole = hashlib.sha256()
    with file.open("wb") as out:

        def write(data: bytes | memoryview) -> None:
            out.write(data)
            whole.update(data)

        write(len(header).to_bytes(8, "little"))
        write(header)
        end = 0
        for name, entry in sorted(parse_header(header, file).items(), key=lambda item: item[1]["data_offsets"]):
            data = bytes_of(tensors.read(original.names.get(name, name), entry["dtype"]))
            if entry["data_offsets"] != [end, end := end + len(data)]:
                raise ValueError(f"{name} has another size than the header of {shard} says")
            promised = original.tensors.get(name)
            if promised is not None and hashlib.sha256(data).hexdigest() != promised:
                raise ValueError(f"{name} is not what was packed (SHA-256)")
            write(data)
    if original.sha256[shard] not in (None, whole.hexdigest()):
        raise ValueError(f"{shard} is not what was packed (SHA-256)")
