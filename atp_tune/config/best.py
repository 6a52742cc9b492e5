"""The best configuration: a JSON file with all that is needed to prune the model again, and its scores.

The format `atp_tune.config/4` is published: keys may be added, but are never renamed or removed.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    FiniteFloat,
    JsonValue,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from atp_tune.allocations.bits import share_at
from atp_tune.config.manifest import Manifest
from atp_tune.config.plugged import PluginRef, check_known
from atp_tune.config.prune import Bits, PruneConfig, QuantizeConfig, Recovered
from atp_tune.config.search import NEXT_TOKEN
from atp_tune.config.study import Data, ModelConfig, Study, of_model
from atp_tune.errors import UserError
from atp_tune.measures import MEASURES, PERPLEXITY, TEXTS, Estimate, Measure, Role, TaskScore
from atp_tune.metrics import Continuations, OverDraws, Speed
from atp_tune.plan import Plan, Share
from atp_tune.utils.cache import write_out
from atp_tune.utils.registry import STORED, FrozenModel, Table

FORMAT: Literal["atp_tune.config/4"] = "atp_tune.config/4"
OLDER = tuple(f"atp_tune.config/{number}" for number in (1, 2, 3))


Baseline = Literal["dense", "uniform", "best"]


def dumps(value: Any, indent: int | None) -> str:
    """JSON with all control characters escaped, so that it is safe to show on a terminal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text)


def _finite(score: Estimate | None) -> Estimate | None:
    return score if score and math.isfinite(score.value + score.stderr) else None


def _by_measure(rows: dict[str, dict[Role, Estimate | None]]) -> dict[str, dict[Role, Estimate | None]]:
    for name, scores in rows.items():
        if name not in MEASURES:
            raise ValueError(f"{name}: must be one of {', '.join(MEASURES)}")
        for text, score in scores.items():
            if score and not (score.value >= 0 and score.stderr >= 0):
                raise ValueError(f"{text}: must be at least 0")
    return {
        name: {text: score and MEASURES[name].kind(**dict(score)) for text, score in scores.items()}
        for name, scores in rows.items()
    }


# JSON has no infinity: it is written as null
Score = Annotated[Estimate | None, PlainSerializer(_finite)]
Scores = Annotated[dict[str, dict[Role, Score]], AfterValidator(_by_measure)]  # by measure, then by text


def _storable(value: Any) -> Any:
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # ValueError for NaN or an unpaired surrogate
    return value


def _a_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("must be a path")
    return text


Found = Annotated[dict[str, JsonValue], AfterValidator(_storable)]


Batch = Annotated[int, Field(ge=1, le=2**20)]


class ModelRef(FrozenModel, use_attribute_docstrings=True):
    """The dense checkpoint, and the SHA-256 of its content (`fingerprint`)."""

    id: str
    revision: str | None
    sha256: str | None = None
    fingerprint: str
    dtype: Literal["float32", "bfloat16", "float16"]
    prune: tuple[str, ...] = ("language",)
    """the parts that are pruned, of a model that reads images"""

    @model_validator(mode="after")
    def _loadable(self) -> Self:
        self.model()
        return self

    def model(self, allowed: Mapping[str, bool] | None = None) -> ModelConfig:
        """The model as in a study file, with `allowed` keys that a configuration cannot set; ValueError if invalid."""
        keys = self.model_dump(include={"revision", "sha256", "dtype", "prune"})
        try:
            return ModelConfig.model_validate({"source": self.id, **keys, **of_model(allowed or {})})
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"]) from None

    @model_serializer(mode="wrap")
    def _without_default(self, inner: SerializerFunctionWrapHandler) -> Table:
        """Leaves `prune` out where the language model alone is pruned, so that files stay as they were."""
        return {key: value for key, value in inner(self).items() if key != "prune" or self.prune != ("language",)}


class Sparsity(FrozenModel):
    """Target and realised share of zeros over all linears of all blocks."""

    target: Share
    realised: Share


class BothDraws(FrozenModel):
    """Test scores of the best plan over draws of the calibration text, and of uniform with the same pruner."""

    best: OverDraws
    uniform: OverDraws | None


class EvaluationTexts(FrozenModel):
    """The validation and test texts; they are the same with the paper's protocol."""

    validation: Data
    test: Data


Compared = Literal["dense", "uniform", "best", "model"]  # "model": a single model folder
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are accuracies; tables show the first that a task has


class TaskScores(FrozenModel):
    """Scores on one task of lm-eval, of each model by metric; tables show `metric`.

    `best_minus_uniform` is the difference in `metric`, paired by items.
    """

    task: str
    items: int
    num_fewshot: int
    version: str
    metric: str
    scores: dict[Compared, dict[str, TaskScore]]
    best_minus_uniform: TaskScore | None = None


class ZeroShot(FrozenModel):
    """Scores on tasks of lm-eval of the models dense, uniform and best, or of one folder.

    `mean` is over tasks whose metric is an accuracy; `missing` holds the reason for each task that could not be run.
    """

    tasks: tuple[TaskScores, ...]
    mean: dict[Compared, TaskScore]
    mean_best_minus_uniform: TaskScore | None = None
    missing: dict[str, str] = Field({})
    limit: int | None = None
    dtype: str
    device: str
    seconds: dict[Compared, FiniteFloat]
    versions: dict[str, str]


class Config(FrozenModel, use_attribute_docstrings=True):
    """The best configuration of a study."""

    format: Literal["atp_tune.config/4"] = FORMAT
    study: str
    trial: int | None
    """null for a single plan without a search"""
    model: ModelRef
    plan: Plan
    """method, allocation and its parameters, and the level of each block or linear"""
    prune: PruneConfig
    """settings of the pruners and the source of their statistics"""
    blocks: str | None = None
    """name of the module list of blocks, such as model.layers"""
    linears: tuple[tuple[str, ...], ...] | None = None
    """names within their block of the linears, where they differ or weights are only rounded"""
    conv1d: bool = False
    """where weights are rounded: whether linears are `Conv1D`, as GPT-2's"""
    sparsity: Sparsity
    quantize: QuantizeConfig | None = None
    """where weights are rounded: settings of the quantizer: the method, else `quantizers`"""
    bits: Bits | None = None
    """bits per weight, where weights are rounded"""
    scores: dict[Baseline, Scores] = Field({})
    """of dense, uniform with the same pruner and the best plan: by measure, then by text"""
    calibration: Data
    batches: dict[str, Batch] = Field({})
    """windows per batch, by role of the text; they affect near-ties in the masks"""
    draws: BothDraws | None = None
    """if the calibration text was drawn more than once"""
    texts: EvaluationTexts
    score: str = NEXT_TOKEN
    """how windows are scored"""
    plugins: dict[str, PluginRef] = Field({})
    """by short name; relative files start at `folder`"""
    bos: bool = False
    """whether all windows begin with BOS; false in files without the key"""
    seed: int
    versions: dict[str, str]
    folder: Annotated[str, AfterValidator(_a_path)] = "."
    """folder, relative to this file, that relative paths of model and texts start at"""
    zero_shot: ZeroShot | None = None
    """results of the command `evaluate`"""
    speed: Speed | None = None
    """results of `speedup`, or of the end of a study with `speed`"""
    continuations: Continuations | None = None
    """of prompts, by a study or the command `generate`"""
    recovered: Recovered | None = None
    """training of the kept weights, by a study with `recover`: `apply` does it again if `kept`"""
    slim: bool = False
    """of a folder: whether the pruned channels are cut off, not zero"""
    manifest: Manifest | None = None
    """of a sparse folder: hashes of its files, and its environment"""

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        """Checks that the names of methods are known, and that the plan's levels have what belongs to them."""
        check_known(self.plan.method, self.plan.allocation, self.score, self.plugins, self.by_bits)
        if len({self.quantize is None, self.plan.levels[0].bits is None, self.bits is None}) > 1:
            raise ValueError("quantize: is needed with bits and a plan that has bits, and they with it")
        counts = [*map(len, self.linears or ())]
        fit = [len(level.linears) in (0, own) for level, own in zip(self.plan.levels, counts, strict=False)]
        if counts and not (len(counts) == len(self.plan.levels) and all(fit)):
            raise ValueError("linears: not one name for each linear of the plan's levels")
        return self

    @classmethod
    def of_study(
        cls,
        study: Study,
        plan: Plan,
        model: dict[str, str],
        sizes: Sequence[int],
        effective: float | None,
        /,
        **own: Any,
    ) -> Self:
        """The configuration of a study's plan, with `own` keys that the study does not say, such as scores.

        `model`: fingerprint and dtype of the model. `sizes`: weights of each block. `effective`: bits of a weight with
        scales, where weights are rounded.
        """
        bits = None
        if study.rounds:
            bits = Bits(target=study.bits, size=study.size, nominal=plan.mean_bits(sizes), effective=effective)
        keys = study.model.model_dump(include={"revision", "sha256", "prune"})
        return cls(
            model=ModelRef.model_validate({"id": study.model.source, **keys, **model}),
            plan=plan,
            prune=study.prune,
            quantize=study.methods.quantize,
            bits=bits,
            calibration=study.data.calibration.text,
            texts=EvaluationTexts(validation=study.data.validation, test=study.test_text),
            score=study.score,
            seed=study.search.seed,
            **own,
        )

    @property
    def trained(self) -> Recovered | None:
        """How the kept weights are to be trained after pruning; None if they stay as they were pruned."""
        return self.recovered if self.recovered and self.recovered.kept else None

    @property
    def is_trained(self) -> bool:
        """Whether the kept weights are to be trained after pruning."""
        return self.trained is not None

    def scored(self, model: Baseline = "best", text: Role = "test", measure: Measure = PERPLEXITY) -> Estimate | None:
        """The score of a model on a text; None if it was not measured."""
        return self.scores.get(model, {}).get(measure.name, {}).get(text)

    def final(self, text: Role) -> Estimate | None:
        """Perplexity of the model that `apply` writes: after training, where the kept weights are trained."""
        if self.trained is None:
            return self.scored("best", text)
        scores = self.trained.validation if text == "validation" else self.trained.test
        return scores.perplexity if scores else None

    @property
    def by_bits(self) -> bool:
        """Whether weights are rounded and nothing is pruned: the plan's method is a quantizer."""
        return self.plan.by_bits

    @property
    def only_rounds(self) -> bool:
        """Whether its plan has no zeros: bits are shared out alone, or within a size no zeros were best."""
        return self.bits is not None and (self.by_bits or self.sparsity.target == 0)

    @property
    def amounts(self) -> tuple[float, ...]:
        """The sparsity of each block; its bits where the plan has no zeros."""
        return tuple(level.bits or 0 for level in self.plan.levels) if self.only_rounds else self.plan.amounts

    @property
    def quantizer(self) -> str:
        """The name of the quantizer, where weights are rounded."""
        return self.quantize.quantizers[0] if self.quantize and not self.by_bits else self.plan.method

    @property
    def target(self) -> float:
        """The amount that the allocation shared out: the target sparsity, or a share between most and fewest bits."""
        if self.by_bits and self.bits is not None and self.quantize is not None:
            return share_at(-(self.bits.target or self.bits.nominal), self.quantize.widths)
        return self.sparsity.target

    @property
    def weights_id(self) -> Table:
        """All that decides the weights of its pruned model, before any training."""
        return self.model_dump(
            mode="json",
            include={
                **dict.fromkeys(("plan", "prune", "quantize", "calibration", "plugins", "bos"), True),
                "model": {"fingerprint", "dtype", "prune"},
            },
        )

    def seen_from(self, base: Path, folder: Path) -> Self:
        """The configuration for a file in `folder`, with relative paths that start at `base`."""
        return self.model_copy(update={"folder": os.path.relpath(os.path.realpath(base), os.path.realpath(folder))})

    def __str__(self) -> str:
        """The plan and its perplexities in a line."""
        parameters = " ".join(f"{name}={value:.4g}" for name, value in self.plan.parameters.items())
        plan = f"{self.plan.method} {self.plan.allocation} {parameters}".rstrip() + ", trained" * self.is_trained
        scores = [f"{text} perplexity {score}" for text in TEXTS if (score := self.final(text))]
        amount = f"{self.sparsity.realised:.2%} zeros"
        if self.by_bits and self.bits is not None:
            amount = f"{self.bits.nominal:.2f} bits"
        return ", ".join([f"{amount} by {plan}", *scores])

    def __repr__(self) -> str:
        return f"<Config {self}>"  # pydantic's has thousands of characters

    def to_json(self) -> str:
        """The text of the file, indented by two spaces."""
        return dumps(self.model_dump(mode="json"), 2) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file atomically; UserError if that fails."""
        write_out(path, self.to_json().encode())


def read_config(path: Path) -> Config:
    """Reads a configuration; UserError if it is missing or invalid."""
    try:
        data = _storable(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write one with: python tune.py export --study NAME") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not JSON ({str(error).splitlines()[0]}); write one with: python tune.py export --study NAME"
        ) from None
    if isinstance(data, dict) and data.get("format") in OLDER:
        raise UserError(
            f"{path}: is of an older format, {data['format']}; search again with another "
            "--study-name, or take the version of atp_tune that wrote it"
        )
    try:
        return Config.model_validate(data, context=STORED)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        rule = "is needed" if first["type"] == "missing" else first["msg"]
        raise UserError(f"{path}: {key}: {rule}; is it a configuration of atp_tune ({FORMAT})?") from None
