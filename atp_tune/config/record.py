"""What a study keeps of each trial, and of itself, as attributes in Optuna's storage: a field for each, with its type.

The database may be a stranger's, or a later version's: `storage.attributes` validates each attribute alone, and those
of the wrong type count as missing. Optuna's dashboard has a column for each that is `Shown`; the others lie apart.
"""

from collections.abc import Mapping
from math import inf, isnan
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BaseModel, Field, TypeAdapter

from atp_tune.config.best import Batch, Found
from atp_tune.config.plugged import PluginRef
from atp_tune.measures import MEASURES
from atp_tune.metrics import BosEffect
from atp_tune.plan import Plan, Share
from atp_tune.utils.registry import Table


def _written(text: str) -> str:
    text.encode()  # UnicodeEncodeError, a ValueError, for a lone surrogate
    return text


def _nll(value: float) -> float:
    if not (isnan(value) or value == inf or -1 < value < 1e6):
        raise ValueError
    return value


def _effect(effect: Table) -> Table:
    _written(BosEffect.model_validate(effect).token)  # ValidationError is a ValueError
    return effect


def _plugged(rows: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    for row in rows.values():
        PluginRef.model_validate(row)
    return rows


def _planned(fields: Table) -> Table:
    plan = Plan.model_validate(fields)
    _written(plan.method + plan.allocation + "".join(plan.parameters))
    return fields


SHOWN = "shown"
Words = Annotated[str, AfterValidator(_written)]
ShownWords = Annotated[Words, SHOWN]
Count = Annotated[int, Field(ge=0, lt=2**63)]
ShownCount = Annotated[Count, SHOWN]
Size = Annotated[int, Field(ge=1, lt=2**63)]
Amount = Annotated[float, Field(ge=0, lt=1e15)]
Positive = Annotated[float, Field(gt=0, lt=1e15)]
Total = Annotated[int, Field(ge=0, lt=10**9)]
Nlls = Annotated[list[Annotated[float, AfterValidator(_nll)]], Field(min_length=1)]
Kls = Annotated[list[Amount], Field(min_length=1)]
Ranks = Annotated[list[Annotated[int, Field(ge=0, lt=10**6)]], Field(min_length=1)]
Role = Annotated[str, Field(pattern=r"^(dense|[0-9]{1,9})$")]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Batches: TypeAlias = dict[Words, Batch]
CutOff: TypeAlias = dict[Words, Words | bool]
FOUND = ("zero_shot", "speed", "continuations", "answers", "recovered")
ITEMS: Table = {by.items: {"nlls": Nlls, "ranks": Ranks}.get(by.items, Kls) for by in MEASURES.values()}
SCORES: Table = {  # of a study: the dense model's items, and by trial those of the test text, and findings
    **{by.dense_items: ITEMS[by.items] for by in MEASURES.values()},
    **{f"test_{key}": dict[Role, kind] for key, kind in ITEMS.items()},  # type: ignore[valid-type]
    **dict.fromkeys(FOUND, dict[Role, Found]),
}
TABLES = (*(f"test_{key}" for key in ITEMS), "draws", "refits", *FOUND)  # by trial, each row stored apart


class TrialRecord(BaseModel):
    """Attributes of a trial: its plan, what was measured beside `ITEMS`, and who ran it."""

    plan: Annotated[Table, AfterValidator(_planned)]
    realised: Share
    packed_bytes: Count
    quantized_bytes: Count
    effective_bits: Annotated[float, Field(ge=0, le=64), SHOWN]
    stderr: Annotated[float, Field(ge=0)]
    errors: list[float]
    misses: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(min_length=1)]
    accuracies: dict[Words, Annotated[list[Amount], Field(min_length=2, max_length=2)]]
    experts_without_tokens: list[Words]
    # The run.
    device: ShownWords
    host: ShownWords
    dtype: Words
    versions: dict[Words, Words]
    batches: Batches
    seconds: dict[Words, Amount]
    peak_bytes: dict[Words, Count]
    start: bool
    pid: Annotated[int, Field(ge=0, lt=2**31)]
    process_started: Amount
    booted: Amount
    # Why it has no value, or another trial's.
    failure: ShownWords
    lost: ShownWords
    cut_off: CutOff
    repeats: ShownCount
    stopped_after: ShownCount


class StudyRecord(BaseModel):
    """Attributes of a study beside `SCORES`: facts of its model and texts, and how far it is."""

    fingerprint: dict[Words, Words | int | float | bool | list[Words] | list[float]]
    made_from: Table
    sizes: Annotated[list[Size], Field(min_length=1)]
    dense_bytes: Count
    blocks: Words
    linears: list[list[Words]]
    conv1d: bool
    bos: Annotated[dict[Words, Any], AfterValidator(_effect)]
    batches: Batches
    kinds: Annotated[list[Words], Field(min_length=1)]
    limit: Annotated[dict[Words, Positive | dict[Words, Share]], Field(min_length=1, max_length=1)]
    plugins: Annotated[dict[Words, dict[Words, Words]], AfterValidator(_plugged), SHOWN]
    screens: Words
    total: Total
    terminated_early: Annotated[list[Total], Field(min_length=2, max_length=2)]
    gp_posterior: Table
    training: dict[Words, Words | int | float]
    draws: dict[Number, dict[Number, Nlls]]
    refits: dict[Number, dict[Number, dict[Number, Nlls]]]  # by trial, number of draws, and draw
    fitted_to: dict[Number, Annotated[list[Count], Field(min_length=2, max_length=2)]]  # by number of draws


class SystemRecord(BaseModel):
    """System attributes of a trial: what Optuna says of its repetition, and our own."""

    fixed_params: dict[Words, Any]
    failed_trial: Count
    retry_history: list[Count]
    cut_offs: list[CutOff]


Interval = Annotated[list[Share], Field(min_length=2, max_length=2)]
FACTS: dict[str, TypeAdapter[Any]] = {  # of a fingerprint, of the facts that others read
    "sparsity": TypeAdapter(Share | Interval),
    "bits": TypeAdapter(Annotated[float, Field(ge=2, le=8)]),
    "model.content": TypeAdapter(Words),
    "model.dtype": TypeAdapter(Words),
}


def kinds(model: type[BaseModel], more: Mapping[str, Any]) -> dict[str, TypeAdapter[Any]]:
    """The type of each attribute: the fields of a model, and `more` by name."""
    own = {name: field.rebuild_annotation() for name, field in model.model_fields.items()}
    return {name: TypeAdapter(kind) for name, kind in {**own, **more}.items()}


def shown(model: type[BaseModel]) -> set[str]:
    """The attributes that people read."""
    return {name for name, field in model.model_fields.items() if SHOWN in field.metadata}
