"""The files beside the weights of a sparse checkpoint that say how it was pruned and fine-tuned."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from atp_tune.config.best import Config, read_config
from atp_tune.config.data import ImageSet, Text, is_local_text
from atp_tune.config.manifest import Manifest, environment, sha256_by_name
from atp_tune.config.recover import Training
from atp_tune.config.study import Data
from atp_tune.errors import UserError
from atp_tune.measures import Accuracy, Change, Estimate, Gain, Perplexity
from atp_tune.utils.frozen import FrozenModel
from atp_tune.utils.paths import written

ABOUT, FINETUNED = "atp_tune.json", "atp_tune.finetune.json"
CARD = "README.md"
DESCRIPTIONS = (ABOUT, FINETUNED, CARD)  # files that commands and people change later


@dataclass(frozen=True)
class PrunedWith:
    """The configuration of a checkpoint, whose paths start at `base`, and its texts, with absolute paths."""

    config: Config
    base: Path
    calibration: Data
    validation: Data
    test: Data
    dtype: Literal["float32", "bfloat16", "float16"]
    dense: Estimate | None  # of the dense model on the test text
    bos: bool  # windows begin with BOS


def origin(folder: Path) -> PrunedWith | None:
    """Reads the `atp_tune.json` of a folder; None if it has none, UserError if it is no configuration."""
    file = folder / ABOUT
    if not file.is_file():
        return None
    made = read_config(file)
    base, texts, dense = folder / made.folder, made.texts, made.scored("dense")
    calibration, validation, test = (rooted(text, base) for text in (made.calibration, texts.validation, texts.test))
    return PrunedWith(made, base, calibration, validation, test, made.model.dtype, dense, made.bos)


def manifest_of(folder: Path, device: str) -> Manifest:
    """The manifest of the files that a folder holds now."""
    return Manifest(files=sha256_by_name(folder, DESCRIPTIONS), environment=environment(device))


T = TypeVar("T", bound=Data)


def rooted(text: T, base: Path) -> T:
    """The text, or the images, with the absolute path of their file or folder."""
    if not is_local_text(text.source):
        return text
    kind, _, place = text.source.partition(":")
    path = os.path.realpath(written(place, base, "source"))  # no error for a loop of links
    moved: T = text.model_copy(update={"source": f"{kind}:{path}"})  # type: ignore[assignment]
    return moved


def read_text(option: str, value: str, seqlen: int | None) -> Data:
    """A text from an option: its source, or its table of a study file on one line; paths start at the current folder.

    `seqlen`: tokens per window, unless the table says it; None: images. UserError that names the option.
    """
    try:
        table = tomllib.loads(f"text = {value}")["text"] if value.startswith("{") else {"source": value}
        read: Data = ImageSet(**table) if seqlen is None else Text(**{"seqlen": seqlen, **table})
        return rooted(read, Path())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{option}: {value} is not a TOML table: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "text"
        raise UserError(f"{option}: {place}: {first['msg']}") from None


class Zeros(FrozenModel):
    """Numbers of zeros, before and after, and of all weights, in the linears that were fine-tuned."""

    before: int
    after: int
    weights: int


class PerplexityChange(FrozenModel):
    """Perplexity on one text before and after fine-tuning, and its change, paired by windows."""

    before: Perplexity
    after: Perplexity
    change: Change


class AccuracyChange(FrozenModel):
    """Accuracy before and after fine-tuning, and its gain, paired by image."""

    before: Accuracy
    after: Accuracy
    change: Gain


class HeldOut(FrozenModel):
    """The losses on held-out windows, or images, by step, from step 0; `best`: the step whose weights were written."""

    windows: int
    losses: tuple[tuple[int, float], ...]
    best: int


class Finetuned(FrozenModel):
    """The record of `finetune`, a published JSON format: new keys do not change its number.

    `bos`: all windows, of training too, begin with BOS. `manifest`: of the fine-tuned folder. Of an image classifier
    `text` and `test` are images, `windows` their number, and `accuracy` is on the test images. `held_out`: None if
    nothing was. `before`, `after` and `change` are on the test text; `validation` is on the study's text of that
    role, if it is another. `teacher`: the SHA-256 of the dense model whose predictions were learnt, with the loss `kl`.
    """

    format: Literal["atp_tune.finetune/2"] = "atp_tune.finetune/2"
    model: str
    fingerprint: str
    text: Data
    windows: int
    test: Data
    settings: Training
    losses: tuple[float, ...]
    before: Perplexity
    after: Perplexity
    change: Change
    dense: Perplexity | None
    zeros: Zeros
    seconds: float
    memory: int
    device: str
    versions: dict[str, str]
    bos: bool = False
    manifest: Manifest | None = None
    accuracy: AccuracyChange | None = None
    held_out: HeldOut | None = None
    validation: PerplexityChange | None = None
    teacher: str | None = None


def finetuned(folder: Path) -> Finetuned | None:
    """The record of `finetune` in a folder; None without one, UserError if it is not what that writes."""
    if not (folder / FINETUNED).is_file():
        return None
    try:
        return Finetuned.model_validate_json((folder / FINETUNED).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{folder / FINETUNED}: is no record of `finetune`; download the folder again") from None


def stored_manifest(folder: Path) -> Manifest | None:
    """The manifest that a folder carries, None if an earlier version wrote it; UserError if nothing describes it.

    Of a fine-tuned folder it is in the record of `finetune`, since its configuration describes the one before.
    """
    if (done := finetuned(folder)) is not None:
        return done.manifest
    if (folder / ABOUT).is_file():
        return read_config(folder / ABOUT).manifest
    raise UserError(f"{folder}: holds no {ABOUT}; give a folder that `apply` wrote")
