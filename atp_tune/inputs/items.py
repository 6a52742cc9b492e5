"""The ordered items of one role: windows of a text, pairs of an image and a text, or labelled images."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IDS, PIXELS, LABELS = "input_ids", "pixel_values", "labels"  # arguments of models


@dataclass(frozen=True, eq=False)
class Items:
    """Tensors [items, …] by the name of the model's argument, in host memory; also a batch of them on a device.

    Windows have `input_ids` int64 [windows, tokens], pairs the tensors of their images too, and labelled images
    `pixel_values` float32 [images, channels, height, width] and `labels` int64 [images]. `positions`: hidden states of
    an item in the first block; `content`: SHA-256 of all tensors, "" of a batch; `bos`: windows begin with BOS;
    `image`: the id of the tokens that stand for images.
    """

    tensors: Mapping[str, Tensor]
    positions: int
    content: str = ""
    bos: bool = False
    image: int | None = None

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], positions: int | None = None, bos: bool = False, image: int | None = None
    ) -> "Items":
        """Makes items, with their SHA-256; `positions`: by default the number of ids."""
        sha = hashlib.sha256(f"{tuple(next(iter(tensors.values())).shape)}".encode())
        for tensor in tensors.values():
            sha.update(tensor.contiguous().numpy().reshape(-1).data)
        return cls(tensors, positions or tensors[IDS].shape[1], sha.hexdigest(), bos, image)

    @classmethod
    def windows(cls, ids: np.ndarray, bos: bool = False) -> "Items":
        """Makes windows of ids [windows, tokens]."""
        return cls.of({IDS: torch.from_numpy(ids)}, bos=bos)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor) -> "Items":
        return replace(self, tensors={name: tensor[rows] for name, tensor in self.tensors.items()}, content="")

    @property
    def ids(self) -> np.ndarray:
        """The ids [items, tokens], those of image tokens among them."""
        return self.tensors[IDS].numpy()

    def batch(self, device: torch.device) -> Any:
        """All items on a device; of a text the ids alone."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return tensors[IDS] if [*tensors] == [IDS] else replace(self, tensors=tensors)

    def selected(self, rows: slice | Tensor) -> "Items":
        """Some of the items, with their SHA-256."""
        tensors = {name: tensor[rows].contiguous() for name, tensor in self.tensors.items()}
        return Items.of(tensors, self.positions, self.bos, self.image)

    def thinned(self, stride: int, start: int = 0, end: int | None = None) -> "Items":
        """Every stride-th item of those from `start` to `end`, from the first."""
        return self.selected(slice(start, end, stride))

    def without(self, rows: Collection[int]) -> "Items":
        """All items but these."""
        if not rows:
            return self
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[list(rows)] = False
        return self.selected(kept)

    def digests(self) -> list[bytes]:
        """A SHA-256 of each item, without its label."""
        parts = [self.tensors[name].contiguous().flatten(1).numpy() for name in sorted(self.tensors) if name != LABELS]
        return [hashlib.sha256(b"".join(part.tobytes() for part in row)).digest() for row in zip(*parts, strict=True)]

    def in_dtype(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors but the labels, pixels in a model's number format."""
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
            if name != LABELS
        }


ByRole = Mapping[str, Items]  # of each role, or text


def shared(items: ByRole) -> dict[str, dict[int, str]]:
    """The index of each item that an earlier role has too, with that role, by role."""
    seen = dict[bytes, str]()
    doubles = dict[str, dict[int, str]]()
    for role, own in items.items():
        digests = own.digests() if len(items) > 1 else []
        doubles[role] = {index: seen[digest] for index, digest in enumerate(digests) if digest in seen}
        seen |= dict.fromkeys(digests, role)
    return doubles
