"""The stored study of a study file, and the settings that it was run with."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from atp_tune.config.best import (
    BothDraws,
    Config,
    Sparsity,
)
from atp_tune.config.facts import facts
from atp_tune.config.finding import known
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.measures import MEASURES, Accuracy
from atp_tune.plan import Plan
from atp_tune.results.annotations import with_attached
from atp_tune.results.goals import best_trial
from atp_tune.results.results import DENSE
from atp_tune.results.summary import made_from, summarise
from atp_tune.storage import fingerprint, progress
from atp_tune.storage.attributes import StudySnapshot
from atp_tune.storage.fingerprint import check_facts
from atp_tune.storage.opening import find_study, open_storage

# --- The configuration of a study's best trial, from which `apply` makes a checkpoint.


def best_config(file: StudyFile, study: optuna.Study, out: Path, number: int | None = None) -> Config:
    """The configuration, to be written to `out`, of the best trial or of trial `number`; UserError without one."""
    study = StudySnapshot(study)
    best = best_trial(study)
    if number is not None and best is not None:
        best = next((trial for trial in progress.measured(study) if trial.number == number), None)
        if best is None:
            raise UserError(f"study {study.study_name}: trial {number} is not measured in full; `status` lists all")
    if best is None:
        raise UserError(f"study {study.study_name}: no trial has a value yet; run: python tune.py --study {file.name}")
    try:
        return with_attached(_config(file, study, best, out), study, out)
    except (KeyError, ValueError):  # pydantic's are of this kind
        raise UserError(
            f"study {study.study_name}: trial {best.number} lacks what a configuration needs; "
            "start another study with --study-name NAME"
        ) from None


def _config(file: StudyFile, study: optuna.Study, best: FrozenTrial, out: Path) -> Config:
    summary, spec, facts, attrs = summarise(study), file.study, study.user_attrs["fingerprint"], best.user_attrs
    plan, uniform, results = Plan.model_validate(attrs["plan"]), summary.results.uniform(best), summary.results
    if plan.is_uniform:  # with β = 0, as every allocation has such a point
        plan = plan.model_copy(update={"allocation": "uniform", "parameters": {}})
    number, draws = uniform.number if uniform else -1, None
    if best.number in summary.over_draws:
        draws = BothDraws(best=summary.over_draws[best.number], uniform=summary.over_draws.get(number))
    return Config.of_study(
        spec,
        plan,
        {"fingerprint": facts["model.content"], "dtype": attrs.get("dtype") or facts[fingerprint.DTYPE]},
        summary.sizes,
        attrs["effective_bits"] if spec.bits is not None else None,
        study=study.study_name,
        trial=best.number,
        blocks=study.user_attrs.get("blocks"),
        linears=study.user_attrs.get("linears") if plan.by_linear or plan.by_bits else None,
        conv1d=study.user_attrs.get("conv1d", False),
        sparsity=Sparsity(target=best.params.get("sparsity", spec.sparsity or 0.0), realised=attrs["realised"]),
        scores={"dense": results.scores(DENSE), "uniform": results.scores(uniform), "best": results.scores(best)},
        batches=fingerprint.batches_in(best),
        draws=draws,
        plugins=study.user_attrs.get("plugins", {}),
        bos=summary.bos,
        versions=attrs["versions"],
    ).seen_from(file.folder, out.parent)


def stored_study(file: StudyFile, study_name: str | None) -> optuna.Study:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    db = open_storage(file.storage_url, create=False)
    study = find_study(db, study_name or file.name) if db else None
    if study is None:
        by_name = file.path.absolute() in [path.absolute() for path in known()]
        other = ["--study-name", study_name] if study_name else []
        command = shlex.join(["python", "tune.py", "--study", file.name if by_name else str(file.path), *other])
        raise UserError(f"study {study_name or file.name}: has no trials yet; run: {command}")
    return study


def file_as_run(study: optuna.Study, file: StudyFile, is_overridden: bool = False) -> StudyFile:
    """The study file with the settings that the study was run with, as far as they are stored.

    `is_overridden`: other settings are asked for; UserError if the study's values depend on one of them.
    """
    made = None if is_overridden else made_from(study.user_attrs.get("made_from"))
    if made is None:
        check_facts(study, facts(file.study, file.folder), partly=True)
        return file
    return replace(made, path=file.path)


# --- The columns of Optuna's dashboard: numbers that sort, stored beside the details that only the program reads.


def measured_columns(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a trial's measurement, which are stored too."""
    found: dict[str, Any] = {}
    if attrs.get("stderr"):
        found["± stderr"] = round(attrs["stderr"], 4 if "misses" in attrs else 2)
    for by in MEASURES.values():
        if by.kind is Accuracy and (items := attrs.get(by.items)):
            found[f"{by.column} %"] = round(100 * by.score(items).value, 2)
    if "effective_bits" in attrs and "quantized_bytes" in attrs:
        found["bits with scales"] = round(attrs["effective_bits"], 2)
        found["quantized MB"] = round(attrs["quantized_bytes"] / 1e6, 1)
    plan = Plan.stored_in(attrs)
    if "realised" in attrs and not (plan and plan.by_bits):
        found["zeros %"] = round(100 * attrs["realised"], 2)
    if "packed_bytes" in attrs and "effective_bits" not in attrs:
        found["packed MB"] = round(attrs["packed_bytes"] / 1e6, 1)
    if "seconds" in attrs:
        found["time (s)"] = round(sum(attrs["seconds"].values()), 1)
    if attrs.get("peak_bytes"):
        found["peak GB"] = round(max(attrs["peak_bytes"].values()) / 1e9, 2)
    return found


def facts_of(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A study's attributes for the dashboard: its main settings, and no long lists."""
    known = attrs.get("fingerprint", {})
    sources = [f"{table}.{role}.source" for table in ("texts", "images") for role in ("validation", "test")]
    names = ("model.source", "model.dtype", "sparsity", "bits", "protocol", *sources)
    return {**{name: known[name] for name in names if name in known}, "trials": attrs.get("total", "not known yet")}
