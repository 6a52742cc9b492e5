"""Sizes of a model, from the headers of its safetensors, before it is loaded."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from atp_tune.checkpoints.trust import read_table
from atp_tune.errors import UserError

LONGEST = 100 * 2**20  # maximum bytes of a header, as in safetensors
TOWERS = ("vision", "visual", "image", "audio", "speech")  # in names of blocks outside the language model
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIDES = ("vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "ffn_hidden_size")
NUMBERED = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True)
class ModelSizes:
    """Number of values in all tensors (`total`) and in each block; bytes of all tensors in the files, and of a value.

    `itemsize`: of the number format that most values of the blocks have.
    """

    total: int
    blocks: tuple[int, ...]
    bytes: int
    itemsize: int

    @property
    def shell(self) -> int:
        """Values outside the blocks: embeddings, final norm, head."""
        return self.total - sum(self.blocks)


def read_sizes(folder: Path) -> ModelSizes:
    """The sizes of a model in a folder; UserError if a file has no header or there are no blocks."""
    tensors = {
        name: entry for file in sorted(folder.glob("*.safetensors")) for name, entry in read_header(file).items()
    }
    counts = {name: prod(entry["shape"]) for name, entry in tensors.items()}
    stored = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in tensors.items()}
    lists: dict[str, Counter[int]] = {}
    for name, count in counts.items():
        if found := NUMBERED.match(name):
            lists.setdefault(found["list"], Counter())[int(found["index"])] += count
    if not lists:
        raise UserError(f"model {folder}: its files name no blocks; only transformer models can be pruned")
    spoken = {name: sizes for name, sizes in lists.items() if not any(tower in name for tower in TOWERS)} or lists
    blocks = max(spoken.values(), key=lambda sizes: sizes.total())
    formats = Counter[int]()
    for name, count in counts.items():
        formats[stored[name] // max(1, count)] += count * bool(NUMBERED.match(name))
    (itemsize, _), *_ = formats.most_common()
    return ModelSizes(
        sum(counts.values()), tuple(blocks[index] for index in sorted(blocks)), sum(stored.values()), itemsize
    )


def has_experts(folder: Path) -> bool:
    """Whether a model has mixtures of experts, by the numbers of experts in its config."""
    return _counts_experts(read_table(folder / "config.json"))


def _counts_experts(table: dict[str, Any]) -> bool:
    counts = (value for key, value in table.items() if "expert" in key and type(value) is int)
    return any(count > 1 for count in counts) or any(
        _counts_experts(value) for value in table.values() if isinstance(value, dict)
    )


def check_claims(folder: Path) -> None:
    """UserError if a config has more blocks than there are tensors, or a dimension larger than all values together.

    transformers would allocate such a model before it notices that weights are missing. Also if two files have a tensor
    of one name, of which it would load one.
    """
    config = read_table(folder / "config.json")
    tensors, files = list[Any](), dict[str, Path]()
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            tensors.append(entry)
            if (other := files.setdefault(name, file)) != file:
                raise UserError(
                    f"model {folder}: {name} is in {other.name} and in {file.name}, of which one is loaded; give a "
                    "folder without the other"
                )
    values = sum(prod(entry["shape"]) for entry in tensors)
    for table in (config, *(one for one in config.values() if isinstance(one, dict))):
        for keys, most, what in ((_COUNTS, len(tensors), "tensors"), (_SIDES, values, "values")):
            if key := next((key for key in keys if type(table.get(key)) is int and table[key] > most), None):
                raise UserError(
                    f"model {folder}: {key} is {table[key]:.3g}, but its files hold {most} {what}; download it again"
                )


def places(file: Path) -> dict[str, int]:
    """Offset in the file of each tensor's bytes; UserError if the file has no header."""
    with file.open("rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
    return {name: data + entry["data_offsets"][0] for name, entry in read_header(file).items()}


def read_header(file: Path) -> dict[str, Any]:
    """Dtype, shape and offsets of each tensor of a file; UserError if the file has no header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, LONGEST))
    return parse_header(text, file)


def parse_header(text: bytes, file: Path) -> dict[str, Any]:
    """Dtype, shape and offsets of each tensor by the header of a file; UserError if it is none."""
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if all(_is_entry(entry) for entry in entries.values()):
            return entries
        raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"model {file}: is no safetensors file; download it again") from None


def _is_entry(entry: Any) -> bool:
    lists = [entry.get(key) for key in ("shape", "data_offsets")] if isinstance(entry, dict) else [None]
    return all(isinstance(one, list) and all(type(n) is int and n >= 0 for n in one) for one in lists) and (
        len(entry["data_offsets"]) == 2
    )
