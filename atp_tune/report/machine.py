"""The report for programs: a published JSON format (`atp_tune.report/3`); keys are added, never renamed or removed.

    format, made            `atp_tune.report/3`; local time, ISO 8601
    studies[]               the document of `status --json` of each study, without its clock, and:
      description           of the study
      state                 running, failed: numbers of trials
      realised              share of zeros counted in the best, null if unknown
      zero_shot             what `evaluate` measured of the best trial, as in its configuration; or null
      speed                 what `speedup`, or the end of a study, measured of it, likewise; or null
      recovered             training of the best's kept weights, as in its configuration; or null
      continuations         prompts, and what dense, uniform, best and `others`, the best of each other allocation,
                            make of each; or null
      importance            parameter → share of 1; empty with too few trials
      trials[]              also levels (of each block, as `plan.py` stores them, without those of rows), errors (by
                            block), times (phase → s), device, dtype
      time, devices         of all trials: seconds, names
      study_file            name and settings, as the study was made; or null
      fingerprint, versions facts that the values depend on, and versions of libraries

Numbers that are not finite are null.
"""

import json
from collections.abc import Sequence
from math import isfinite
from typing import Any

from optuna.trial import TrialState
from pydantic import BaseModel

from atp_tune.config.studyfile import settings
from atp_tune.report.contents import Contents
from atp_tune.results.status import status_of

FORMAT = "atp_tune.report/3"
KEPT = ("errors", "device", "dtype")  # attributes of trials


def make(studies: Sequence[Contents]) -> bytes:
    """The JSON document."""
    made = max((contents.made for contents in studies), default=None)
    document = {
        "format": FORMAT,
        "made": made.isoformat(timespec="seconds") if made else None,
        "studies": [_study(contents) for contents in studies],
    }
    return (json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _study(contents: Contents) -> dict[str, Any]:
    summary = contents.summary
    status = status_of(summary, contents.made).without_clock().model_dump(exclude={"format"})
    for trial, row in zip(summary.trials, status["trials"], strict=True):
        attrs = trial.user_attrs
        stored = json.dumps(attrs.get("plan", {}).get("levels"))
        row["levels"] = json.loads(stored, object_hook=lambda level: level.pop("rows", level) and level)
        row["times"] = attrs.get("seconds")
        row.update({key: attrs.get(key) for key in KEPT})
    return {
        **status,
        "description": contents.description,
        "state": {"running": contents.count(TrialState.RUNNING), "failed": contents.count(TrialState.FAIL)},
        "realised": contents.realised,
        "zero_shot": _dumped(summary.zero_shot),
        "speed": _dumped(summary.speed),
        "recovered": _dumped(summary.recovered),
        "continuations": _dumped(summary.continuations),
        "importance": contents.importance,
        "time": contents.seconds,
        "devices": contents.devices,
        "study_file": settings(summary.made_from) if summary.made_from else None,
        "fingerprint": contents.facts,
        "versions": contents.versions,
    }


def _dumped(found: BaseModel | None) -> dict[str, Any] | None:
    return found.model_dump() if found else None


def finite(value: Any) -> Any:
    """The value with None for infinite numbers and NaN, which JSON cannot hold."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
