"""The configuration of a study's best trial, from which `apply` makes a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from pydantic import ValidationError

from atp_tune.allocations.bits import mean_of
from atp_tune.errors import UserError
from atp_tune.plan import method_in
from atp_tune.results.accuracies import accuracies_of
from atp_tune.results.annotations import with_attached
from atp_tune.results.summary import summarise
from atp_tune.results.trials import is_uniform, parameters_of, scores_of, uniform_of
from atp_tune.spec.config import (
    AllocationRef,
    Baselines,
    BothDivergences,
    BothDraws,
    Config,
    EvaluationTexts,
    ModelRef,
    Sparsity,
)
from atp_tune.spec.quantize import Bits
from atp_tune.spec.study import Study
from atp_tune.spec.studyfile import StudyFile
from atp_tune.storage import fingerprint, progress
from atp_tune.storage.validation import StudySnapshot


def best_config(file: StudyFile, study: optuna.Study, out: Path, number: int | None = None) -> Config:
    """The configuration, to be written to `out`, of the best trial or of trial `number`; UserError without one."""
    study = StudySnapshot(study)
    best = progress.best_trial(study)
    if number is not None and best is not None:
        best = next((trial for trial in progress.measured(study) if trial.number == number), None)
        if best is None:
            raise UserError(f"study {study.study_name}: trial {number} is not measured in full; `status` lists all")
    if best is None:
        raise UserError(f"study {study.study_name}: no trial has a value yet; run: python tune.py --study {file.name}")
    try:
        return with_attached(_config(file, study, best, out), study, out)
    except (KeyError, ValidationError):
        raise UserError(
            f"study {study.study_name}: trial {best.number} lacks what a configuration needs; "
            "start another study with --study-name NAME"
        ) from None


def _config(file: StudyFile, study: optuna.Study, best: FrozenTrial, out: Path) -> Config:
    summary, spec, facts, attrs = summarise(study), file.study, study.user_attrs["fingerprint"], best.user_attrs
    linears, uniform = attrs.get("linear_sparsities"), uniform_of(study, best)
    reports = study.user_attrs.get("test_nlls", {})
    number, kl, draws = uniform.number if uniform else -1, None, None
    if best.number in summary.kls:
        kl = BothDivergences(best=summary.kl(best), uniform=summary.kls.get(number))
    if best.number in summary.over_draws:
        draws = BothDraws(best=summary.over_draws[best.number], uniform=summary.over_draws.get(number))
    return Config(
        study=study.study_name,
        trial=best.number,
        model=ModelRef(
            id=spec.model.source,
            revision=spec.model.revision,
            sha256=spec.model.sha256,
            prune=spec.model.prune,
            fingerprint=facts["model.content"],
            dtype=attrs.get("dtype") or facts[fingerprint.DTYPE],
        ),
        pruner=method_in(best.params),
        prune=spec.prune,
        allocation=_allocation(best),
        block_sparsities=(0.0,) * len(attrs["bits"]) if spec.by_bits else tuple(attrs["sparsities"]),
        linear_sparsities=linears,
        row_offsets=attrs.get("row_offsets"),
        blocks=study.user_attrs.get("blocks"),
        linears=study.user_attrs.get("linears") if linears or spec.by_bits else None,
        conv1d=study.user_attrs.get("conv1d", False),
        sparsity=Sparsity(target=best.params.get("sparsity", spec.sparsity or 0.0), realised=attrs["realised"]),
        **_of_bits(spec, attrs, summary.sizes),
        perplexity=scores_of(best, reports),
        baselines=Baselines(dense=summary.dense, uniform=scores_of(uniform, reports)),
        kl=kl,
        accuracy=accuracies_of(summary, best),
        calibration=spec.data.calibration.text,
        batches=fingerprint.batches_in(best),
        draws=draws,
        texts=EvaluationTexts(validation=spec.data.validation, test=spec.test_text),
        score=spec.score,
        plugins=study.user_attrs.get("plugins", {}),
        bos=summary.bos,
        seed=spec.search.seed,
        versions=attrs["versions"],
    ).seen_from(file.folder, out.parent)


def _of_bits(spec: Study, attrs: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """The keys of a trial that rounded weights; none for others."""
    if spec.bits is None:
        return {}
    bits = (spec.fixed_bits,) * len(sizes) if spec.fixed_bits else tuple(attrs["bits"])
    found = Bits(target=spec.bits, nominal=mean_of(bits, sizes), effective=attrs["effective_bits"])
    linears = attrs.get("linear_bits")
    return {"quantize": spec.quantize, "block_bits": bits, "linear_bits": linears, "bits": found}


def _allocation(trial: FrozenTrial) -> AllocationRef:
    if is_uniform(trial):  # with β = 0, as every allocation has such a point
        return AllocationRef(name="uniform", beta=None)
    parameters = parameters_of(trial)
    return AllocationRef(name=trial.params["allocation"], beta=parameters.get("beta"), parameters=parameters)
