"""The best configuration: one JSON file that says how to prune the model again, and what to expect of it.

The format is published (`atp_tune.config/2`): keys are added under the same number, never renamed or removed.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    JsonValue,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from atp_tune.cache import write_out
from atp_tune.errors import UserError
from atp_tune.frozen import FrozenModel
from atp_tune.metrics.draws import OverDraws
from atp_tune.metrics.kl import Divergence
from atp_tune.metrics.perplexity import Estimate, Perplexity
from atp_tune.metrics.speed import Speed
from atp_tune.spec.former import present_config
from atp_tune.spec.prune import PruneConfig, PrunerName
from atp_tune.spec.study import AllocationName, ModelConfig, Share, Text

FORMAT: Literal["atp_tune.config/2"] = "atp_tune.config/2"


def dumps(value: Any, indent: int | None) -> str:
    """JSON that a terminal shows and does not act on."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text)


def _finite(score: Estimate | None) -> Estimate | None:
    return score if score and math.isfinite(score.value + score.stderr) else None


def _positive(score: Perplexity | None) -> Perplexity | None:
    if score and not (score.value > 0 and score.stderr >= 0):
        raise ValueError("must be a perplexity")
    return score


Score = Annotated[
    Perplexity | None, AfterValidator(_positive), PlainSerializer(_finite)
]  # JSON has no infinity: it is written as null


def _storable(found: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # ValueError for NaN and half a character
    return found


def _a_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("must be a path")
    return text


Found = Annotated[dict[str, JsonValue], AfterValidator(_storable)]


def _at_least_zero(score: Divergence | None) -> Divergence | None:
    if score and not (score.value >= 0 and score.stderr >= 0):
        raise ValueError("must be a divergence")
    return score


KL = Annotated[Divergence | None, AfterValidator(_at_least_zero), PlainSerializer(_finite)]
Batch = Annotated[int, Field(ge=1, le=2**20)]


class ModelRef(FrozenModel):
    """The dense checkpoint, and the SHA-256 that names its content."""

    id: str
    revision: str | None
    sha256: str | None = None
    fingerprint: str
    dtype: Literal["float32", "bfloat16", "float16"]

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        self.model()
        return self

    def model(self, allowed: Mapping[str, bool] | None = None) -> ModelConfig:
        """The model as a study would name it, with the keys that a configuration cannot set; ValueError if none."""
        keys = {"source": self.id, "revision": self.revision, "sha256": self.sha256, "dtype": self.dtype}
        try:
            return ModelConfig.model_validate({**keys, **(allowed or {})})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from None


class AllocationRef(FrozenModel):
    """How the sparsities came about; `beta` is null for allocations without it, `parameters` holds all."""

    name: AllocationName
    beta: FiniteFloat | None
    parameters: dict[str, FiniteFloat] = Field({})


class Sparsity(FrozenModel):
    """Share of zeros over all linears of all blocks: asked for, and counted."""

    target: Share
    realised: Share


class Scores(FrozenModel):
    """Perplexities on the validation text and, once measured, on the test text."""

    validation: Score
    test: Score


class Divergences(FrozenModel):
    """KL divergences from the dense model (nats per token) on the validation text and, once measured, the test text."""

    validation: KL
    test: KL


class BothDivergences(FrozenModel):
    """Those of the plan itself, and of the same pruner with the uniform allocation."""

    best: Divergences
    uniform: Divergences | None


class BothDraws(FrozenModel):
    """The plan itself over several draws of the calibration text, on the test text, and uniform with its pruner."""

    best: OverDraws
    uniform: OverDraws | None


class Baselines(FrozenModel):
    """The dense model, and the same pruner with the uniform allocation."""

    dense: Scores
    uniform: Scores


class EvaluationTexts(FrozenModel):
    """The texts that were searched and reported on; with the paper's protocol they are the same."""

    validation: Text
    test: Text


Compared = Literal["dense", "uniform", "best", "model"]  # the last one is a folder's, alone
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are accuracies; tables show the first one that a task has


class Measure(FrozenModel):
    """A mean over items with its standard error, where there is one."""

    value: FiniteFloat
    stderr: FiniteFloat | None


class TaskScores(FrozenModel):
    """One task of lm-eval: the scores of each model by metric, and the metric that tables show.

    `best_minus_uniform` is of that metric, paired by items.
    """

    task: str
    items: int
    num_fewshot: int
    version: str
    metric: str
    scores: dict[Compared, dict[str, Measure]]
    best_minus_uniform: Measure | None = None


class ZeroShot(FrozenModel):
    """Scores of the models dense, uniform and best (or of one folder) on tasks of lm-eval.

    `mean` is over the tasks whose metric is an accuracy; `missing` says which tasks could not be run, and why.
    """

    tasks: tuple[TaskScores, ...]
    mean: dict[Compared, Measure]
    mean_best_minus_uniform: Measure | None = None
    missing: dict[str, str] = Field({})
    limit: int | None = None
    dtype: str
    device: str
    seconds: dict[Compared, FiniteFloat]
    versions: dict[str, str]


class Config(FrozenModel):
    """The best configuration of a study."""

    format: Literal["atp_tune.config/2"] = FORMAT
    study: str
    trial: int | None = Field(description="null for one plan without a search")
    model: ModelRef
    pruner: PrunerName
    prune: PruneConfig = Field(description="settings of the pruners, and where their statistics come from")
    allocation: AllocationRef
    block_sparsities: tuple[Share, ...] = Field(min_length=1)
    linear_sparsities: tuple[tuple[Share, ...], ...] | None = Field(
        None, description="one per linear of each block, where they differ within blocks"
    )
    blocks: str | None = Field(None, description="name of the list of blocks in the model, as in model.layers")
    linears: tuple[tuple[str, ...], ...] | None = Field(
        None, description="names within their block of what `linear_sparsities` are of"
    )
    sparsity: Sparsity
    perplexity: Scores
    baselines: Baselines
    kl: BothDivergences | None = Field(None, description="where the study minimised it")
    calibration: Text
    batches: dict[str, Batch] = Field(
        {}, description="windows of each text that went through a block at a time: they decide near-ties in the masks"
    )
    draws: BothDraws | None = Field(None, description="where the calibration text was drawn more than once")
    texts: EvaluationTexts
    bos: bool = Field(False, description="the windows of all texts begin with BOS; not in files without the key")
    seed: int
    versions: dict[str, str]
    folder: Annotated[str, AfterValidator(_a_path)] = Field(
        ".", description="where relative paths of model and texts start, seen from this file"
    )
    zero_shot: ZeroShot | None = Field(None, description="what `evaluate` found, see `attaching`")
    speed: Speed | None = Field(None, description="what `speedup` found, see `attaching`")

    @model_validator(mode="before")
    @classmethod
    def _present(cls, value: Any) -> Any:
        return present_config(value)

    @model_validator(mode="after")
    def _named(self) -> Self:
        """Names of linears are of the sparsities of linears."""
        if self.linears and [len(row) for row in self.linears] != [len(row) for row in self.linear_sparsities or ()]:
            raise ValueError("linears: not one name for each of linear_sparsities")
        return self

    def seen_from(self, base: Path, place: Path) -> Self:
        """The same for a file in the folder `place`, where relative paths start at `base`."""
        return self.model_copy(update={"folder": os.path.relpath(os.path.realpath(base), os.path.realpath(place))})

    def to_json(self) -> str:
        """The file's text: two spaces, keys in the order of the model."""
        return dumps(self.model_dump(mode="json"), 2) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file so that it is there whole or not at all; UserError where that is not possible."""
        write_out(path, self.to_json().encode())


def read_config(path: Path) -> Config:
    """Reads a configuration; UserError in one line for whatever is wrong with it."""
    try:
        return Config.model_validate(_parse(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        rule = "is needed" if first["type"] == "missing" else first["msg"]
        raise UserError(f"{path}: {key}: {rule}; is it a configuration of atp_tune ({FORMAT})?") from None


def _parse(path: Path) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for half a character
        return value
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write one with: python tune.py export --study NAME") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON ({str(error).splitlines()[0]}); write one with: python tune.py export --study NAME"
        ) from None
