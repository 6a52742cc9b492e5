"""What lies beside the weights of a sparse checkpoint: how it was pruned, and how it was fine-tuned after that."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from atp_tune.config import Config
from atp_tune.errors import UserError
from atp_tune.perplexity import Change, Perplexity
from atp_tune.study import Study, Text

DType = Literal["auto", "float32", "bfloat16", "float16"]
PRUNED, FINETUNED = "atp_tune.json", "atp_tune.finetune.json"


@dataclass(frozen=True)
class Origin:
    """The texts that a checkpoint was pruned with, and its number format."""

    calibration: Text
    search: Text
    report: Text
    dtype: DType
    dense: Perplexity | None  # of the dense model on the report text


def origin(folder: Path) -> Origin | None:
    """What `apply` (a configuration) or `prune` (a study) wrote down in a folder; None if neither made it.

    UserError if the file is there and is neither.
    """
    file = folder / PRUNED
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        return _of_config(value, folder) if "format" in value else _of_study(value)
    except (ValueError, TypeError, RecursionError, ValidationError):
        raise UserError(f"{file}: is no configuration or study of atp_tune; remove it, then give --text") from None


def _of_config(value: object, folder: Path) -> Origin:
    made = Config.model_validate(value)
    base, texts, dense = folder / made.folder, made.texts, made.baselines.dense.report
    return _origin(base, (made.calibration, texts.search, texts.report), made.model.dtype, dense)


def _of_study(value: object) -> Origin:
    """A study does not say where its relative paths start: they do where the user stands."""
    made = Study.model_validate(value)
    texts = (made.texts.calibration, made.texts.search, made.report_text)
    return _origin(Path(), texts, made.model.dtype, None)


def _origin(base: Path, texts: tuple[Text, Text, Text], dtype: DType, dense: Perplexity | None) -> Origin:
    calibration, search, report = (rooted(text, base) for text in texts)
    return Origin(calibration, search, report, dtype, dense)


def rooted(text: Text, base: Path) -> Text:
    """The same text, with the absolute path of its file."""
    if not text.source.startswith("file:"):
        return text
    path = (base / Path(text.source.removeprefix("file:")).expanduser()).resolve()
    return text.model_copy(update={"source": f"file:{path}"})


def read_text(option: str, value: str, tokens: int) -> Text:
    """A text by its source, or by a table of a study file on one line; paths start where the user stands.

    `tokens` per window where the table does not say. UserError in one line that names the option.
    """
    try:
        table = tomllib.loads(f"text = {value}")["text"] if value.startswith("{") else {"source": value}
        return rooted(Text.model_validate({"tokens": tokens, **table}), Path())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{option}: {value} is no table: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "text"
        raise UserError(f"{option}: {place}: {first['msg']}") from None


class Settings(BaseModel):
    """How to fine-tune: what decides the weights beside model and text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    rank: int
    alpha: int
    learning_rate: float
    tokens: int
    batch: int
    seed: int


class Zeros(BaseModel):
    """Zeros of the linears that were fine-tuned, and their weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    before: int
    after: int
    weights: int


class Finetuned(BaseModel):
    """What `finetune` did: a published JSON format, to which keys are added under the same number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["atp_tune.finetune/1"] = "atp_tune.finetune/1"
    model: str
    fingerprint: str
    text: Text
    windows: int
    report: Text
    settings: Settings
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
