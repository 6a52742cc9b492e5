"""The report for programs: a published JSON format (`atp_tune.report/2`); keys are added, never renamed or removed.

    format, made            `atp_tune.report/2`; local time, ISO 8601
    studies[]
      name, description     of the study
      sparsity              target and realised of the best (share of zeros, null if unknown); interval: the lowest and
                            highest target, null in a study at one sparsity
      bits                  target in bits per weight, of a study that has it in the place of a sparsity
      state                 done, total, running, failed: numbers of trials
      dense, uniform, best  validation and test: {value, stderr} of a perplexity, or null
      best_trial            its number, or null
      change                {value, stderr, on}: the best against uniform, relative and paired by windows; or null
      ranks[]               the best of each allocation: trial, pruner, allocation, validation, test, change
      objective, front      what is minimised; of two, the numbers of the trials on the Pareto front
      limit                 of the quality of the best, as in the study file; or null
      points[]              over an interval of sparsities, the plans to choose from: trial, sparsity, method,
                            validation, test, against_dense, against_uniform, uniform (number of the uniform trial at
                            the same sparsity), kl, kl_against_uniform, excess (over the limit; at most 0: within),
                            best, packed_bytes (of all weights in a packed folder), tokens_per_second (decoded one at
                            a time, weights not rounded, by the fastest engine that `speedup` measured),
                            images_per_second (of an image classifier, in its place)
      kl                    uniform and best: validation and test: {value, stderr} of a KL divergence; null where
                            the study does not minimise it. ranks[] have `kl` and `kl_change`, trials[] have `kl`
      zero_shot             what `evaluate` measured of the best trial, as in its configuration; or null
      speed                 what `speedup`, or the end of a study, measured of it, likewise; or null
      recovered             training of the best's kept weights, as in its configuration; or null
      continuations         prompts, and what dense, uniform, best and `others`, the best of each other allocation,
                            make of each; or null
      draws                 uniform and best: perplexities on the test text by draw of the calibration text, and
                            changes from uniform's, with mean and sd; or null. `fitted_to`: tokens (images) that
                            each draw's plan was fitted anew to, and the plan itself. ranks[] have `draws` too
      windows               their numbers in the validation and the test text
      kinds                 perplexities by kind of a mixed test text, of `dense`, of trials by number, and `trained`
      importance            parameter → share of 1; empty with too few trials
      trials[]              number, state, plan, sparsity (its target, where that is searched), pruner, allocation,
                            parameters, levels (of each block, as `plan.py` stores them), perplexity, realised,
                            errors, seconds (phase → s), device, dtype, remark; of a study with `bits` also
                            effective_bits (a weight, with scales) and quantized_bytes (of all weights)
      seconds, devices      of all trials
      study_file            name and settings, as the study was made; or null
      fingerprint, versions facts that the values depend on, and versions of libraries

Numbers that are not finite are null.
"""

import json
from collections.abc import Sequence
from math import isfinite
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel

from atp_tune.measures import Change
from atp_tune.plan import method_in
from atp_tune.report.contents import Contents
from atp_tune.results.formatting import plan_of, remark_of
from atp_tune.results.status_points import point_of
from atp_tune.results.summary import Rank, Summary
from atp_tune.results.trials import allocation_of, parameters_of, score_of
from atp_tune.spec.studyfile import settings
from atp_tune.storage.progress import sparsity_of

FORMAT = "atp_tune.report/2"


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
    summary, both = contents.summary, {"uniform": contents.summary.uniform_trial, "best": contents.summary.best_trial}
    draws = {name: _dumped(summary.over_draws.get(trial.number if trial else -1)) for name, trial in both.items()}
    return {
        "name": summary.name,
        "description": contents.description,
        "sparsity": {"target": contents.target, "realised": contents.realised, "interval": summary.interval},
        **({} if summary.bits is None else {"bits": summary.bits}),
        "state": {
            "done": summary.done,
            "total": summary.total,
            "running": contents.count(TrialState.RUNNING),
            "failed": contents.count(TrialState.FAIL),
        },
        **{name: getattr(summary, name).model_dump() for name in ("dense", "uniform", "best")},
        "best_trial": summary.best_trial.number if summary.best_trial else None,
        "change": _change(summary.ranks[0].against, summary.ranks[0].on) if summary.ranks else None,
        "ranks": [_rank(rank, summary) for rank in summary.ranks],
        "objective": list(summary.objectives),
        "front": [trial.number for trial in summary.front],
        "limit": dict(summary.limit) if summary.limit else None,
        "points": [point_of(summary, point).model_dump() for point in summary.points],
        "kl": {name: summary.kl(trial).model_dump() for name, trial in both.items()}
        if "kl" in summary.objectives
        else None,
        "zero_shot": _dumped(summary.zero_shot),
        "speed": _dumped(summary.speed),
        "recovered": _dumped(summary.recovered),
        "continuations": _dumped(summary.continuations),
        "draws": draws if summary.over_draws else None,
        "windows": dict(summary.windows),
        "kinds": {row: {kind: _dumped(own) for kind, own in found.items()} for row, found in summary.kinds.items()},
        "importance": contents.importance,
        "trials": [_trial(trial, summary) for trial in summary.trials],
        "seconds": contents.seconds,
        "devices": contents.devices,
        "study_file": settings(summary.made_from) if summary.made_from else None,
        "fingerprint": contents.facts,
        "versions": contents.versions,
    }


def _rank(rank: Rank, summary: Summary) -> dict[str, Any]:
    return {
        "trial": rank.trial.number,
        "pruner": method_in(rank.trial.params) or None,
        "allocation": allocation_of(rank.trial),
        **rank.scores.model_dump(),
        "change": _change(rank.against, rank.on),
        "kl": _dumped(summary.kls.get(rank.trial.number)),
        "kl_change": _change(rank.kl_against, rank.on),
        "draws": _dumped(summary.over_draws.get(rank.trial.number)),
    }


def _change(against: Change | None, on: str) -> dict[str, Any] | None:
    return {**against.model_dump(), "on": on} if against else None


def _dumped(found: BaseModel | None) -> dict[str, Any] | None:
    return found.model_dump() if found else None


def _trial(trial: FrozenTrial, summary: Summary) -> dict[str, Any]:
    attrs = trial.user_attrs
    kept = ("realised", "errors", "seconds", "device", "dtype")
    rounded = ("effective_bits", "quantized_bytes") if summary.bits is not None else ()
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "plan": plan_of(trial),
        "sparsity": sparsity_of(trial),
        "pruner": method_in(trial.params) or None,
        "allocation": trial.params.get("allocation"),
        "parameters": parameters_of(trial),
        "levels": attrs.get("plan", {}).get("levels"),
        "perplexity": _dumped(score_of(trial)),
        **{key: attrs.get(key) for key in (*kept, *rounded)},
        "remark": remark_of(trial, summary),
        "kl": _dumped(summary.kls.get(trial.number)),
    }


def finite(value: Any) -> Any:
    """The value with None for infinite numbers and NaN, which JSON cannot hold."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value
