"""Sources of labelled pictures: folders of classes, idx files (MNIST's format), parquet files, hub datasets, packages.

A picture is decoded when it is asked for, so that a source may hold millions.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from atp_tune.checkpoints.convert import one_line, quiet
from atp_tune.errors import UserError, did_you_mean
from atp_tune.extras import require
from atp_tune.paths import is_special, written
from atp_tune.spec.images import ImageSet

NO_CLASS = "no class"  # of a label in a message
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # of `SUFFIXES`: others start programs, such as EPS
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
LARGEST_IDX = 1 << 33  # bytes of an idx file
LARGEST_FILE = 1 << 30  # bytes of the file of a picture: uncompressed ones of `LARGEST` pixels fit
LARGEST = 1 << 28  # pixels of a picture; a file of a few bytes may claim more
LONGEST = 200  # times as wide as high, or the reverse: a processor may enlarge the shorter side to hundreds of pixels
DEEP = ("I", "F")  # modes of Pillow whose pixels have more than 8 bits; their conversion to RGB would clip
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # first four bytes of idx files of images and of labels


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
        labels, name, read = self.labels, self.name, self.read
        return replace(
            self,
            labels=[labels[row] for row in rows],
            name=lambda index: name(rows[index]),
            read=lambda index: read(rows[index]),
        )

    def picture(self, index: int) -> Any:
        """A Pillow image in RGB; UserError if it cannot be decoded."""
        from PIL import Image, ImageOps

        found = self.read(index)
        if isinstance(found, np.ndarray):
            return Image.fromarray(found).convert("RGB")
        try:
            with Image.open(io.BytesIO(found), formats=FORMATS) as opened:
                if opened.width * opened.height > LARGEST or max(opened.size) > LONGEST * min(opened.size):
                    raise ValueError(f"has {opened.width}×{opened.height} pixels")
                if opened.mode.startswith(DEEP):
                    raise ValueError(f"its pixels are of mode {opened.mode}, of more than 8 bits; convert it")
                return ImageOps.exif_transpose(opened).convert("RGB")
        except Exception as error:  # decoders raise many types
            raise UserError(f"{self.key}: {self.name(index)} is no picture that can be read: {_why(error)}") from error


def pictures(wanted: ImageSet, base: Path) -> Pictures:
    """All labelled pictures of a source; relative paths start at `base`. UserError that starts with a key."""
    require("images", "source")
    kind = wanted.kind
    if kind == "hub":
        return _hub(wanted)
    path = _in_package(wanted.place) if kind == "package" else written(wanted.place, base, "source")
    if kind == "package":
        kind = "folder" if path.is_dir() else "parquet" if path.suffix == ".parquet" else "idx"
    return {"folder": _folder, "idx": _idx, "parquet": _parquet}[kind](path, wanted)


def pictures_of(files: Sequence[Path], key: str) -> Pictures:
    """Pictures in files, without labels; UserError that starts with `key` for a path that holds no file."""
    require("images", key)
    for file in files:
        if is_special(written(str(file), Path(), key)) or not file.is_file():
            raise UserError(f"{key}: there is no file {file}; give pictures ({', '.join(SUFFIXES)})")
    names = list(map(str, files))
    return Pictures([""] * len(files), lambda index: names[index], lambda index: _bytes(files[index], key), key=key)


def _in_package(place: str) -> Path:
    module, _, inside = place.partition("/")
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not inside:
        raise UserError(f"source: package:{place}: there is no module {module}, or no path after it")
    return Path(spec.origin).parent / inside


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
    images = _array(path, IMAGES_MAGIC, 3)
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == path:
        raise UserError(
            f'source: {path}: the name of an idx file of images holds "images", as train-images-idx3-ubyte.gz'
        )
    labels = _array(beside, LABELS_MAGIC, 1)
    if len(labels) != len(images):
        raise UserError(f"source: {path} has {len(images)} images, {beside.name} has {len(labels)} labels")
    return Pictures(labels.tolist(), lambda index: f"image {index} of {path}", lambda index: images[index])


def _array(path: Path, magic: int, dimensions: int) -> np.ndarray:
    """The array of an idx file, packed by gzip or not."""
    if is_special(path) or not path.is_file():
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
    if int.from_bytes(head[:4], "big") != magic or not data or len(data) != count:
        what = "images" if dimensions == 3 else "labels"
        raise UserError(f"source: {path} is no idx file of {what} (MNIST's format), or not all of one")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _parquet(path: Path, wanted: ImageSet) -> Pictures:
    """A parquet file with a column of encoded images, as on the hub, and one of classes."""
    import pyarrow.parquet

    if is_special(path) or not path.is_file():
        raise UserError(f"source: there is no file {path}")
    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # readers raise many types
        raise UserError(f"source: {path} is no parquet file: {one_line(error)}") from error
    for key, name in (("column", wanted.column), ("label", wanted.label)):
        _check_column(key, name, table.column_names, str(path))
    column, labels = table.column(wanted.column), table.column(wanted.label).to_pylist()

    def read(index: int) -> bytes:
        found = column[index].as_py()
        content = found.get("bytes") if isinstance(found, dict) else found
        if not isinstance(content, bytes):
            raise UserError(f"column: row {index} of {path} holds no encoded image in {wanted.column}")
        return content

    return _rows(labels, f"{path}", read, wanted)


def _hub(wanted: ImageSet) -> Pictures:
    """A dataset of the hub, which stays on disk; classes by their names if it has them."""
    import datasets

    from atp_tune.inputs.hub import hub_error

    try:
        with quiet("datasets", "huggingface_hub"):
            rows = datasets.load_dataset(wanted.place, name=wanted.config, split=wanted.split, revision=wanted.revision)
    except Exception as error:  # network and readers raise many types
        raise hub_error(wanted.place, error) from error
    for key, name in (("column", wanted.column), ("label", wanted.label)):
        _check_column(key, name, rows.column_names, wanted.source)
    feature, labels = rows.features[wanted.label], list(rows[wanted.label])
    encoded = rows.cast_column(wanted.column, datasets.Image(decode=False))

    def read(index: int) -> bytes:
        found = encoded[index][wanted.column]
        content = found.get("bytes") if isinstance(found, dict) else None
        if content is None and isinstance(found, dict) and found.get("path"):
            content = _bytes(Path(found["path"]))  # of an archive that datasets unpacked
        if not isinstance(content, bytes):
            raise UserError(f"column: row {index} of {wanted.source} holds no encoded image in {wanted.column}")
        return content

    names = tuple(getattr(feature, "names", None) or ())
    return replace(_rows(labels, wanted.source, read, wanted), names=names)


def _rows(labels: list[Any], where: str, read: Callable[[int], bytes], wanted: ImageSet) -> Pictures:
    for index, label in enumerate(labels):
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise UserError(f"label: row {index} of {where} has {label!r} in {wanted.label}, {NO_CLASS}")
    classes = frozenset(label for label in labels if isinstance(label, str))
    return Pictures(labels, lambda index: f"row {index} of {where}", read, classes)


def _check_column(key: str, name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        raise UserError(f'{key}: {where} has no "{name}"; it has {", ".join(known)}{did_you_mean(name, list(known))}')


def _why(error: Exception) -> str:
    return "unknown format" if type(error).__name__ == "UnidentifiedImageError" else one_line(error)
