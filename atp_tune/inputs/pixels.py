"""From pictures to a model's pixels and classes, by the image processor and the class names of its folder.

The processor is that of transformers with Pillow, which needs no torchvision and gives the same numbers on all
machines.
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.cache import cache_dir, file_atomically, sha256_of
from atp_tune.cache_keys import key
from atp_tune.checkpoints.convert import one_line
from atp_tune.checkpoints.trust import CODE
from atp_tune.errors import UserError, did_you_mean
from atp_tune.extras import require
from atp_tune.inputs.pictures import Pictures
from atp_tune.spec.images import ImageSet
from atp_tune.storage.process import version_of

LARGEST_SIDE = 8192  # pixels: a processor may ask for pictures that fill the memory
UNNAMED = "LABEL_"  # before the number of a class without a name


@dataclass(frozen=True)
class ImageProcessor:
    """The image processor of a folder."""

    own: Any
    folder: Path
    trusted: bool = False  # code in the folder may run

    @classmethod
    def of(cls, folder: Path, trusted: bool) -> "ImageProcessor":
        """Loads it; UserError if the folder has none that transformers can run with Pillow.

        `trusted`: code in the folder may run.
        """
        require("images", "source")
        from transformers import AutoImageProcessor

        try:
            own: Any = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                str(folder), local_files_only=True, trust_remote_code=trusted, backend="pil"
            )
        except Exception as error:  # processors raise many types
            raise UserError(
                f"source: the image processor of the model in {folder} cannot be loaded: {one_line(error)}"
            ) from error
        for side_of in ("size", "crop_size"):
            given = getattr(own, side_of, None) or {}
            largest = max((side for side in dict(given).values() if isinstance(side, int | float)), default=0)
            if largest > LARGEST_SIDE:
                raise UserError(
                    f"source: the image processor of the model in {folder} asks for a {side_of} of {largest:.6g}, and "
                    f"{LARGEST_SIDE} is the largest; correct its preprocessor_config.json"
                )
        return cls(own, folder, trusted)

    @property
    def settings(self) -> dict[str, Any]:
        """What it does, as JSON."""
        return json.loads(self.own.to_json_string())  # type: ignore[no-any-return]

    def pixels(self, found: Pictures) -> Tensor:
        """Pixels float32 [images, channels, height, width]; UserError for a picture that cannot be read."""
        whole = torch.empty(0)
        for index in range(len(found)):
            part = self._one(found, index)
            whole = whole if index else part.new_empty(len(found), *part.shape)  # once: it may be most of the memory
            if part.shape != whole.shape[1:]:
                raise UserError(
                    f"{found.key}: {found.name(index)} is {_size(part)} after the model's processor, others are "
                    f"{_size(whole[0])}; a preprocessor_config.json with one size is needed"
                )
            whole[index] = part
        return whole

    def colours(self, pixels: Tensor) -> Any:
        """The picture of pixels [channels, height, width]: an array [height, width, 3] of uint8, for people.

        Without normalisation, as far as the processor says what its own is; else from the darkest to the brightest.
        """
        mean, deviation = (getattr(self.own, key, None) for key in ("image_mean", "image_std"))
        if getattr(self.own, "do_normalize", False) and mean is not None and deviation is not None:
            pixels = pixels * _by_channel(deviation) + _by_channel(mean)  # numbers of each channel, or of all
        else:
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-6)
        shown = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        return shown.expand(-1, -1, 3).contiguous().numpy()

    def _one(self, found: Pictures, index: int) -> Tensor:
        picture = found.picture(index)
        try:
            pixels = self.own(picture, return_tensors="pt")["pixel_values"]
        except Exception as error:  # processors raise many types
            raise UserError(f"{found.key}: the processor cannot read {found.name(index)}: {one_line(error)}") from error
        return torch.as_tensor(pixels, dtype=torch.float32)[0]


def class_indices(found: Pictures, wanted: ImageSet, config: Any) -> list[int]:
    """The model's class of each picture: by name where both have names, else by number.

    A name may belong to several of the model's classes, as `crane` in ImageNet: then the number decides, if the source
    numbers its classes as the model does. UserError for a label that the model lacks.
    """
    names = {index: str(name) for index, name in config.id2label.items()}
    is_named = not all(name.startswith(UNNAMED) for name in names.values())
    numbered = (wanted.labels or found.names) if is_named else ()
    known = _by_name(names) if is_named else _unnamed(found, names) if found.classes else {}
    result = []
    for index, label in enumerate(found.labels):
        if isinstance(label, int) and numbered and not 0 <= label < len(numbered):
            raise UserError(f"labels: {found.name(index)} has class {label}, and there are {len(numbered)} names")
        own = _class_of(label, numbered, names, known)
        if own is None:
            shown = numbered[label] if isinstance(label, int) and numbered else label
            raise UserError(
                f"source: {found.name(index)} has the class {shown!r}, the model's {len(names)} classes are "
                f"{', '.join(list(names.values())[:3])}, …{did_you_mean(str(shown), list(names.values()))}"
            )
        result.append(own)
    return result


def _class_of(label: str | int, numbered: Sequence[str], names: dict[int, str], known: dict[str, int]) -> int | None:
    """The model's class of a label; None if it has none, or several."""
    if isinstance(label, str):
        return known.get(_plain(label))
    if not numbered or _plain(names.get(label, "")) == _plain(numbered[label]):
        return label if label in names else None
    return known.get(_plain(numbered[label]))


def _by_name(names: dict[int, str]) -> dict[str, int]:
    """Class by name, without regard to case; of ImageNet's lists of synonyms each. Not names of several classes."""
    whole, synonyms = Counter(map(_plain, names.values())), Counter[str]()
    for name in names.values():
        synonyms.update({_plain(part) for part in name.split(",")})
    found = {
        _plain(part): index for index, name in names.items() for part in name.split(",") if synonyms[_plain(part)] == 1
    }
    return found | {_plain(name): index for index, name in names.items() if whole[_plain(name)] == 1}


def _unnamed(found: Pictures, names: dict[int, str]) -> dict[str, int]:
    """Class by name for a model whose classes have no names: LABEL_0, by number, else in alphabetical order."""
    classes, own = sorted(found.classes), {_plain(name): index for index, name in names.items()}
    if all(_plain(name) in own for name in classes):
        return own
    if all(name.isdecimal() for name in classes):
        if all(int(name) in names for name in classes):
            return {_plain(name): int(name) for name in classes}
        raise UserError(f"source: its classes are numbers to {max(map(int, classes))}, the model's 0 to {max(names)}")
    if len(classes) != len(names):
        raise UserError(
            f"source: has {len(classes)} classes, and the model has {len(names)} without names; give config.json an "
            "id2label"
        )
    found_by_name = {_plain(name): index for index, name in enumerate(classes)}
    if len(found_by_name) != len(classes):
        raise UserError("source: two classes have one name but for case and spaces; rename one")
    return found_by_name


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def _by_channel(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1)


def _size(shape: Any) -> str:
    return "×".join(map(str, getattr(shape, "shape", shape)))


def class_name(names: Mapping[int, Any], index: int) -> str:
    """The name of a class in a model's config, `id2label`, which may have gaps."""
    return str(names.get(index, f"{UNNAMED}{index}"))


# --- Pixels of labelled images, kept on disk as a model's image processor made them.
#
#     key   SHA-256 of each picture's own bytes, in order; the processor's class and settings; versions of the libraries
#
# So another selection, another file of the same name or another processor are other keys. A file holds float32 [images,
# channels, height, width] in numpy's format, and their CRC-32, which finds damage and takes half the time of a
# SHA-256; a damaged one is made anew.

LARGEST = 4 << 30  # bytes of one set of images that is kept: 7,000 images of 224 × 224
LIBRARIES = ("numpy", "pillow", "torch", "transformers")
DECODERS = ("jpg", "libtiff", "webp", "zlib")  # of Pillow
CHECK = 4  # bytes of the CRC-32, after the array in a file


def cached_pixels(processor: ImageProcessor, found: Pictures) -> Tensor:
    """`processor.pixels(found)`, from the cache if possible; UserError as there."""
    file = cache_dir("pixels") / f"{_key(processor, found)}.npy"
    pixels = _stored(file)
    if pixels is None:
        pixels = processor.pixels(found)
        if pixels.nbytes <= LARGEST:
            _keep(file, pixels.numpy())
    return pixels


def _key(processor: ImageProcessor, found: Pictures) -> str:
    return key("pixels", pictures=_content(found), processor=made_by(processor), libraries=libraries())


def made_by(processor: ImageProcessor) -> list[Any]:
    """What a processor makes pixels by, as JSON."""
    kind = type(processor.own)
    code = {file.name: sha256_of(file) for file in processor.folder.glob(CODE)} if processor.trusted else {}
    return [kind.__module__, kind.__qualname__, processor.settings, code]


def libraries() -> list[str | None]:
    """Versions of all that decodes and resizes pictures."""
    from PIL import features

    return [version_of(name) for name in LIBRARIES] + [features.version(name) for name in DECODERS]


def _content(found: Pictures) -> str:
    """SHA-256 of all pictures as their source holds them: encoded, or arrays."""
    whole = hashlib.sha256()
    for index in range(len(found)):
        picture = found.read(index)
        is_array = isinstance(picture, np.ndarray)
        whole.update(f"{picture.shape if is_array else len(picture)} ".encode())
        whole.update(np.ascontiguousarray(picture).data if is_array else picture)
    return whole.hexdigest()


def _stored(file: Path) -> Tensor | None:
    """The pixels in a file, or None if it is missing or damaged."""
    try:
        with file.open("rb") as stream:
            pixels, check = np.load(stream, allow_pickle=False), stream.read()
    except (OSError, ValueError, EOFError):
        return None
    is_whole = pixels.dtype == np.float32 and _check(pixels) == check
    return torch.from_numpy(pixels) if is_whole else None


def _keep(file: Path, pixels: np.ndarray) -> None:
    """Writes a file, if it can be written: without it the next process makes the pixels again."""
    with suppress(OSError), file_atomically(file) as place, place.open("wb") as stream:
        np.save(stream, pixels, allow_pickle=False)
        stream.write(_check(pixels))


def _check(pixels: np.ndarray) -> bytes:
    head = zlib.crc32(f"{pixels.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(pixels).reshape(-1).data, head).to_bytes(CHECK, "big")
