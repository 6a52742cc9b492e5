"""Pixels of labelled images, kept on disk as a model's image processor made them.

    key   SHA-256 of each picture's own bytes, in order; the processor's class and settings; versions of the libraries

So another selection, another file of the same name or another processor are other keys. A file holds float32 [images,
channels, height, width] in numpy's format, and their CRC-32, which finds damage and takes half the time of a
SHA-256; a damaged one is made anew.
"""

import hashlib
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.cache import cache_dir, file_atomically, sha256_of
from atp_tune.cache_keys import key
from atp_tune.checkpoints.trust import CODE
from atp_tune.inputs.pictures import Pictures
from atp_tune.inputs.pixels import ImageProcessor
from atp_tune.storage.process_identity import version_of

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
