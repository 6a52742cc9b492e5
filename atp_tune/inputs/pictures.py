"""Sources of labelled pictures: folders of classes, idx files (MNIST's format), parquet files, hub datasets, packages.

A picture is decoded when it is asked for, so that a source may hold millions.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.checkpoints.convert import as_user_error, one_line
from atp_tune.checkpoints.files import CODE
from atp_tune.config.data import ImageSet
from atp_tune.errors import UserError, did_you_mean
from atp_tune.utils.cache import cache_dir, file_atomically, key, package_version, sha256_of
from atp_tune.utils.system import is_special, require, written

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # of `SUFFIXES`: others start programs, such as EPS
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
LARGEST_IDX = 1 << 33  # bytes of an idx file
LARGEST_FILE = 1 << 30  # bytes of the file of a picture: uncompressed ones of `LARGEST` pixels fit
LARGEST = 1 << 28  # pixels of a picture; a file of a few bytes may claim more
LONGEST = 200  # times as wide as high, or the reverse: a processor may enlarge the shorter side to hundreds of pixels
DEEP = ("I", "F")  # modes of Pillow whose pixels have more than 8 bits; their conversion to RGB would clip
MAGIC = 0x800  # first four bytes of an idx file of bytes, less the number of its dimensions


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures: their labels, names by which messages call them, and how each is read.

    A label is a name or a number. `classes`: the names of all classes, if labels are names; `names`: those of the
    numbers 0, 1, …, if the source has them; `key`: of a study file, or the argument, before the colon in messages.
    """

    labels: Sequence[str | int]
    name: Callable[[int], str]
    read: Callable[[int], Any]  # bytes of a file, or an array [height, width] of uint8
    classes: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    key: str = "source"

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Sequence[int]) -> "Pictures":
        """Some of the pictures, in this order."""
        name, read = self.name, self.read
        return replace(
            self,
            labels=[self.labels[row] for row in rows],
            name=lambda index: name(rows[index]),
            read=lambda index: read(rows[index]),
        )

    def picture(self, index: int) -> Any:
        """A Pillow image in RGB; UserError if it cannot be decoded."""
        from PIL import Image, ImageOps

        content = self.read(index)
        if isinstance(content, np.ndarray):
            return Image.fromarray(content).convert("RGB")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > LARGEST or max(opened.size) > LONGEST * min(opened.size):
                    raise ValueError(f"has {opened.width}×{opened.height} pixels")
                if opened.mode.startswith(DEEP):
                    raise ValueError(f"its pixels are of mode {opened.mode}, of more than 8 bits; convert it")
                return ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # decoders raise many types
            why = "unknown format" if type(error).__name__ == "UnidentifiedImageError" else one_line(error)
            raise UserError(f"{self.key}: {self.name(index)} is no picture that can be read: {why}") from error


def pictures(wanted: ImageSet, base: Path) -> Pictures:
    """All labelled pictures of a source; relative paths start at `base`. UserError that starts with a key."""
    require("images", "source")
    kind = wanted.kind
    if kind == "hub":
        return _hub(wanted)
    if kind == "package":
        module, _, inside = wanted.place.partition("/")
        try:
            spec = find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None or not inside:
            raise UserError(f"source: package:{wanted.place}: there is no module {module}, or no path after it")
        path = Path(spec.origin).parent / inside
        kind = "folder" if path.is_dir() else "parquet" if path.suffix == ".parquet" else "idx"
    else:
        path = written(wanted.place, base, "source")
    return {"folder": _folder, "idx": _idx, "parquet": _parquet}[kind](path, wanted)


def pictures_in_files(files: Sequence[Path], key: str) -> Pictures:
    """Pictures in files, without labels; UserError that starts with `key` for a path that holds no file."""
    require("images", key)
    for file in files:
        if is_special(written(str(file), Path(), key)) or not file.is_file():
            raise UserError(f"{key}: there is no file {file}; give pictures ({', '.join(SUFFIXES)})")
    return Pictures(
        [""] * len(files), lambda index: str(files[index]), lambda index: _bytes(files[index], key), key=key
    )


def _folder(path: Path, wanted: ImageSet) -> Pictures:
    """A folder of folders, one for each class, with its pictures; other files are an error."""
    if not path.is_dir():
        raise UserError(f"source: there is no folder {path}")
    classes = sorted(inner for inner in path.iterdir() if inner.is_dir() and not inner.name.startswith("."))
    files, labels = [], []
    for inner in classes:
        for file in sorted(inner.rglob("*")):
            if file.is_dir() or file.name.startswith("."):
                continue
            if file.suffix.lower() not in SUFFIXES or is_special(file):
                raise UserError(f"source: {file} is no picture ({', '.join(SUFFIXES)}); remove it")
            files.append(file)
            labels.append(inner.name)
    if not files:
        raise UserError(f"source: {path} holds no pictures in folders of classes, as in {path.name}/CLASS/FILE.png")
    return Pictures(labels, lambda index: str(files[index]), lambda index: _bytes(files[index]), frozenset(labels))


def _bytes(path: Path, key: str = "source") -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UserError(f"{key}: {path} has {size:.4g} bytes, and {LARGEST_FILE:.4g} is the most of a picture")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from None


def _idx(path: Path, wanted: ImageSet) -> Pictures:
    """An idx file of images, and beside it the one of their labels, which has "labels" and "idx1" in its name."""
    greys = _array(path, 3)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == path:
        raise UserError(
            f'source: {path}: the name of an idx file of images holds "images", as train-images-idx3-ubyte.gz'
        )
    labels = _array(beside, 1)
    if len(labels) != len(greys):
        raise UserError(f"source: {path} has {len(greys)} images, {beside.name} has {len(labels)} labels")
    return Pictures(labels.tolist(), lambda index: f"image {index} of {path}", lambda index: greys[index])


def _array(path: Path, dimensions: int) -> np.ndarray:
    """The array of an idx file, packed by gzip or not."""
    if not path.is_file():
        raise UserError(f"source: there is no file {path}")
    start = 4 + 4 * dimensions
    try:
        with path.open("rb") as stream:
            is_packed = stream.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_packed else path.open("rb") as stream:
            head = stream.read(start)  # a packed file may hold anything: no more is read than the head says
            shape = tuple(int(size) for size in np.frombuffer(head[4:], ">u4")) if len(head) == start else ()
            count = int(np.prod(shape, dtype=object)) if shape else 0
            data = stream.read(count + 1) if 0 < count <= LARGEST_IDX else b""
    except (OSError, EOFError, zlib.error) as error:
        what = "is a damaged gzip file" if not isinstance(error, PermissionError) else "cannot be read"
        raise UserError(f"source: {path} {what}: {one_line(error)}") from None
    if int.from_bytes(head[:4], "big") != MAGIC + dimensions or not data or len(data) != count:
        what = "images" if dimensions == 3 else "labels"
        raise UserError(f"source: {path} is no idx file of {what} (MNIST's format), or not all of one")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _parquet(path: Path, wanted: ImageSet) -> Pictures:
    """A parquet file with a column of encoded images, as on the hub, and one of classes."""
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"source: there is no file {path}")
    with as_user_error(f"source: {path} is no parquet file"):
        table = pyarrow.parquet.read_table(path)
    _check_columns(wanted, table.column_names, str(path))
    column = table.column(wanted.column)
    return _rows(table.column(wanted.label).to_pylist(), f"{path}", lambda index: column[index].as_py(), wanted)


def _hub(wanted: ImageSet) -> Pictures:
    """A dataset of the hub, which stays on disk; classes by their names if it has them."""
    import datasets

    from atp_tune.inputs.sources import from_hub

    rows = from_hub(wanted.place, name=wanted.config, split=wanted.split, revision=wanted.revision)
    _check_columns(wanted, rows.column_names, wanted.source)
    encoded = rows.cast_column(wanted.column, datasets.Image(decode=False))

    def cell(index: int) -> Any:
        own = encoded[index][wanted.column]
        if isinstance(own, dict) and own.get("bytes") is None and own.get("path"):
            return _bytes(Path(own["path"]))  # of an archive that datasets unpacked
        return own

    labelled = _rows(list(rows[wanted.label]), wanted.source, cell, wanted)
    return replace(labelled, names=tuple(getattr(rows.features[wanted.label], "names", None) or ()))


def _rows(labels: list[Any], where: str, cell: Callable[[int], Any], wanted: ImageSet) -> Pictures:
    def read(index: int) -> bytes:
        own = cell(index)
        content = own.get("bytes") if isinstance(own, dict) else own
        if not isinstance(content, bytes):
            raise UserError(f"column: row {index} of {where} holds no encoded image in {wanted.column}")
        return content

    for index, label in enumerate(labels):
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise UserError(f"label: row {index} of {where} has {label!r} in {wanted.label}, not a str or an int")
    classes = frozenset(label for label in labels if isinstance(label, str))
    return Pictures(labels, lambda index: f"row {index} of {where}", read, classes)


def _check_columns(wanted: ImageSet, names: list[str], where: str) -> None:
    for option, name in (("column", wanted.column), ("label", wanted.label)):
        if name not in names:
            raise UserError(f'{option}: {where} has no "{name}"; it has {", ".join(names)}{did_you_mean(name, names)}')


# --- From pictures to a model's pixels and classes, by the image processor and the class names of its folder.
#
# The processor is that of transformers with Pillow, which needs no torchvision and gives the same numbers on all
# machines.

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

        with as_user_error(f"source: the image processor of the model in {folder} cannot be loaded"):
            own = AutoImageProcessor.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trusted, backend="pil"
            )
        for side_of in ("size", "crop_size"):
            given = getattr(own, side_of, None) or {}
            largest = max((side for side in dict(given).values() if isinstance(side, int | float)), default=0)
            if largest > LARGEST_SIDE:
                raise UserError(
                    f"source: the image processor of the model in {folder} asks for a {side_of} of {largest:.6g}, and "
                    f"{LARGEST_SIDE} is the largest; correct its preprocessor_config.json"
                )
        return cls(own, folder, trusted)

    def pixels(self, pictures: Pictures) -> Tensor:
        """Pixels float32 [images, channels, height, width]; UserError for a picture that cannot be read."""
        whole = torch.empty(0)
        for index in range(len(pictures)):
            picture = pictures.picture(index)
            with as_user_error(f"{pictures.key}: the processor cannot read {pictures.name(index)}"):
                own = self.own(picture, return_tensors="pt")["pixel_values"]
            part = torch.as_tensor(own, dtype=torch.float32)[0]
            whole = whole if index else part.new_empty(len(pictures), *part.shape)  # once: it may be most of the memory
            if part.shape != whole.shape[1:]:
                raise UserError(
                    f"{pictures.key}: {pictures.name(index)} is {sides(part)} after the model's processor, others are "
                    f"{sides(whole[0])}; a preprocessor_config.json with one size is needed"
                )
            whole[index] = part
        return whole

    def colours(self, pixels: Tensor) -> Any:
        """The picture of pixels [channels, height, width]: an array [height, width, 3] of uint8, for people.

        Without normalisation, as far as the processor says what its own is; else from the darkest to the brightest.
        """
        mean, deviation = (getattr(self.own, key, None) for key in ("image_mean", "image_std"))
        if getattr(self.own, "do_normalize", False) and mean is not None and deviation is not None:
            # Numbers of each channel, or of all.
            shift, scale = (torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 1) for x in (mean, deviation))
            pixels = pixels * scale + shift
        else:
            pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-6)
        shown = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        return shown.expand(-1, -1, 3).contiguous().numpy()


def class_indices(pictures: Pictures, wanted: ImageSet, config: Any) -> list[int]:
    """The model's class of each picture: by name where both have names, else by number.

    A name may belong to several of the model's classes, as `crane` in ImageNet: then the number decides, if the source
    numbers its classes as the model does. UserError for a label that the model lacks.
    """
    names = {index: str(name) for index, name in config.id2label.items()}
    is_named = not all(name.startswith(UNNAMED) for name in names.values())
    numbered = (wanted.labels or pictures.names) if is_named else ()
    by_name = _by_name(names) if is_named else _unnamed(pictures, names) if pictures.classes else {}

    def class_of(label: str | int) -> int | None:
        """The model's class of a label; None if it has none, or several."""
        if isinstance(label, str):
            return by_name.get(_plain(label))
        if not numbered or _plain(names.get(label, "")) == _plain(numbered[label]):
            return label if label in names else None
        return by_name.get(_plain(numbered[label]))

    result = []
    for index, label in enumerate(pictures.labels):
        if isinstance(label, int) and numbered and not 0 <= label < len(numbered):
            raise UserError(f"labels: {pictures.name(index)} has class {label}, and there are {len(numbered)} names")
        own = class_of(label)
        if own is None:
            shown = numbered[label] if isinstance(label, int) and numbered else label
            raise UserError(
                f"source: {pictures.name(index)} has the class {shown!r}, the model's {len(names)} classes are "
                f"{', '.join(list(names.values())[:3])}, …{did_you_mean(str(shown), list(names.values()))}"
            )
        result.append(own)
    return result


def _by_name(names: dict[int, str]) -> dict[str, int]:
    """Class by name, without regard to case; of ImageNet's lists of synonyms each. Not names of several classes."""
    whole, synonyms = Counter(map(_plain, names.values())), Counter[str]()
    for name in names.values():
        synonyms.update({_plain(part) for part in name.split(",")})
    by_part = {
        _plain(part): index for index, name in names.items() for part in name.split(",") if synonyms[_plain(part)] == 1
    }
    return by_part | {_plain(name): index for index, name in names.items() if whole[_plain(name)] == 1}


def _unnamed(pictures: Pictures, names: dict[int, str]) -> dict[str, int]:
    """Class by name for a model whose classes have no names: LABEL_0, by number, else in alphabetical order."""
    classes, own = sorted(pictures.classes), {_plain(name): index for index, name in names.items()}
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
    by_name = {_plain(name): index for index, name in enumerate(classes)}
    if len(by_name) != len(classes):
        raise UserError("source: two classes have one name but for case and spaces; rename one")
    return by_name


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", " ")


def sides(shape: Any) -> str:
    """The sides of a tensor, or of a shape, in words."""
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

LARGEST_KEPT = 4 << 30  # bytes of one set of images that is kept: 7,000 images of 224 × 224
LIBRARIES = ("numpy", "pillow", "torch", "transformers")
DECODERS = ("jpg", "libtiff", "webp", "zlib")  # of Pillow
CHECK = 4  # bytes of the CRC-32, after the array in a file


def cached_pixels(processor: ImageProcessor, pictures: Pictures) -> Tensor:
    """`processor.pixels(pictures)`, from the cache if possible; UserError as there."""
    # All of a processor that decides pixels, as JSON.
    kind = type(processor.own)
    code = {file.name: sha256_of(file) for file in processor.folder.glob(CODE)} if processor.trusted else {}
    made_by = [kind.__module__, kind.__qualname__, json.loads(processor.own.to_json_string()), code]
    whole = hashlib.sha256()  # of all pictures as their source holds them: encoded, or arrays
    for index in range(len(pictures)):
        picture = pictures.read(index)
        is_array = isinstance(picture, np.ndarray)
        whole.update(f"{picture.shape if is_array else len(picture)} ".encode())
        whole.update(np.ascontiguousarray(picture).data if is_array else picture)
    name = key("pixels", pictures=whole.hexdigest(), processor=made_by, libraries=libraries())
    file = cache_dir("pixels") / f"{name}.npy"
    processed = _stored(file)
    if processed is None:
        processed = processor.pixels(pictures)
        if processed.nbytes <= LARGEST_KEPT:
            # Without the file, if it cannot be written, the next process makes the pixels again.
            with suppress(OSError), file_atomically(file) as path, path.open("wb") as stream:
                np.save(stream, processed.numpy(), allow_pickle=False)
                stream.write(_check(processed.numpy()))
    return processed


def libraries() -> list[str | None]:
    """Versions of all that decodes and resizes pictures."""
    from PIL import features

    return [package_version(name) for name in LIBRARIES] + [features.version(name) for name in DECODERS]


def _stored(file: Path) -> Tensor | None:
    """The pixels in a file, or None if it is missing or damaged."""
    try:
        with file.open("rb") as stream:
            pixels, check = np.load(stream, allow_pickle=False), stream.read()
    except (OSError, ValueError, EOFError):
        return None
    is_whole = pixels.dtype == np.float32 and _check(pixels) == check
    return torch.from_numpy(pixels) if is_whole else None


def _check(pixels: np.ndarray) -> bytes:
    head = zlib.crc32(f"{pixels.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(pixels).reshape(-1).data, head).to_bytes(CHECK, "big")
