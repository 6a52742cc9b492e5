"""The JSON documents of `status` and `studies`, which their screen output is made from too.

The format is published (`atp_tune.status/3`): keys are added under the same number, never renamed or removed. A value
that is unknown or not finite is null. `scores` are by measure (`perplexity`, `kl`, `accuracy`), then by text
(`validation`, `test`): {value, stderr}, or null. The report's JSON has the same keys for each study, and more.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import optuna
from optuna.trial import FrozenTrial
from pydantic import Field, PlainSerializer
from pydantic_core import to_jsonable_python

from atp_tune.config.best import BothDraws, Config, Score, Scores, Sparsity, dumps
from atp_tune.config.studyfile import StudyFile
from atp_tune.errors import UserError
from atp_tune.measures import MEASURES, Accuracy, Limit
from atp_tune.metrics import OverDraws
from atp_tune.plan import Plan, amount_of, method_in, target_in
from atp_tune.results.formatting import dense_speed, is_known, method_words, plan_words, sign_of_beta, trial_remark
from atp_tune.results.goals import Point, best_trial
from atp_tune.results.results import DENSE, Model, allocation_name, allocation_parameters, with_attached
from atp_tune.results.results import Against as Change
from atp_tune.results.summary import ScreeningProgress, Summary, made_from, summarise
from atp_tune.storage import fingerprint, progress
from atp_tune.storage.attributes import StudySnapshot
from atp_tune.storage.fingerprint import PERPLEXITY, check_facts, facts
from atp_tune.storage.opening import stored
from atp_tune.storage.progress import all_cut_offs, counts, is_dead
from atp_tune.utils.registry import FrozenModel

# --- The stored study of a study file, and the settings that it was run with.

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
    spec = spec.model_copy(update=amount_of(target_in(best.params)))  # at one target
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
        attrs.get("effective_bits"),
        study=study.study_name,
        trial=best.number,
        blocks=study.user_attrs.get("blocks"),
        linears=study.user_attrs.get("linears") if plan.tells_linears else None,
        conv1d=study.user_attrs.get("conv1d", False),
        sparsity=Sparsity(target=spec.sparsity or plan.parameters.get("zeros", 0.0), realised=attrs["realised"]),
        scores={"dense": results.scores(DENSE), "uniform": results.scores(uniform), "best": results.scores(best)},
        batches=fingerprint.stored_batches(best),
        draws=draws,
        plugins=study.user_attrs.get("plugins", {}),
        bos=summary.bos,
        versions=attrs["versions"],
    ).seen_from(file.folder, out.parent)


def stored_study(file: StudyFile, study_name: str | None) -> optuna.Study:
    """The Optuna study of a study file; UserError if it has no trials yet."""
    study = stored(file.storage_url, study_name or file.name)
    if study is None:
        other = ["--study-name", study_name] if study_name else []
        command = shlex.join(
            ["python", "tune.py", "--study", file.name if is_known(file.path) else str(file.path), *other]
        )
        raise UserError(f"study {study_name or file.name}: has no trials yet; run: {command}")
    return study


def file_as_run(study: optuna.Study, file: StudyFile, is_overridden: bool = False) -> StudyFile:
    """The study file with the settings that the study was run with, as far as they are stored.

    `is_overridden`: other settings are asked for; UserError if the study's values depend on one of them.
    """
    original = None if is_overridden else made_from(study)
    if original is None:
        check_facts(study, facts(file.study, file.folder), partly=True)
        return file
    return replace(original, path=file.path)


# --- The columns of Optuna's dashboard: numbers that sort, stored beside the details that only the program reads.


def measured_columns(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a trial's measurement, which are stored too."""
    columns = dict[str, Any]()
    if attrs.get("stderr"):
        columns["± stderr"] = round(attrs["stderr"], 4 if "misses" in attrs else 2)
    for by in MEASURES.values():
        if by.kind is Accuracy and (items := attrs.get(by.items)):
            columns[f"{by.column} %"] = round(100 * by.score(items).value, 2)
    if "effective_bits" in attrs and "quantized_bytes" in attrs:
        columns["bits with scales"] = round(attrs["effective_bits"], 2)
        columns["quantized MB"] = round(attrs["quantized_bytes"] / 1e6, 1)
    plan = Plan.stored_in(attrs)
    if "realised" in attrs and not (plan and plan.by_bits):
        columns["zeros %"] = round(100 * attrs["realised"], 2)
    if "packed_bytes" in attrs and "effective_bits" not in attrs:
        columns["packed MB"] = round(attrs["packed_bytes"] / 1e6, 1)
    if "seconds" in attrs:
        columns["time (s)"] = round(sum(attrs["seconds"].values()), 1)
    if attrs.get("peak_bytes"):
        columns["peak GB"] = round(max(attrs["peak_bytes"].values()) / 1e9, 2)
    return columns


def study_columns(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """A study's attributes for the dashboard: its main settings, and no long lists."""
    facts = attrs.get("fingerprint", {})
    sources = [f"{table}.{role}.source" for table in ("texts", "images") for role in ("validation", "test")]
    names = ("model.source", "model.dtype", "sparsity", "bits", "size", "protocol", *sources)
    return {**{name: facts[name] for name in names if name in facts}, "trials": attrs.get("total", "not known yet")}


State = Literal["not started", "unfinished", "complete", "unknown", "invalid"]


Number = Annotated[float | None, PlainSerializer(lambda x: x if x is not None and isfinite(x) else None)]


class Against(FrozenModel):
    """A change from uniform with the same pruner (or from dense), paired by items of one text."""

    value: Number
    stderr: Number
    on: Literal["validation", "test"]

    @classmethod
    def of(cls, other: Change | None) -> "Against | None":
        """None without a change."""
        return None if other is None else cls(value=other.change.value, stderr=other.change.stderr or None, on=other.on)


class PointStatus(FrozenModel):
    """A point of a study over an interval: a trial, its sparsity or bits, and method, and whether it is the best.

    `against_dense`: of the perplexity; `against_uniform`: by measure.
    `uniform`: number of the uniform trial at the same target. `excess`: over the limit; at most 0 within it.
    `packed_bytes`: of all weights in a packed folder. `tokens_per_second`: decoded one at a time, weights not rounded,
    by the fastest engine that `speedup` measured; of an image classifier `images_per_second`, one at a time.
    """

    trial: int
    sparsity: float | None = None
    bits: float | None = None
    method: str
    scores: Scores
    against_dense: Against | None
    against_uniform: dict[str, Against | None]
    uniform: int | None
    excess: Number
    best: bool
    packed_bytes: int | None = None
    tokens_per_second: float | None = None
    images_per_second: float | None = None


class Running(FrozenModel):
    """A running trial; `lost`: its process ran on this host and has ended."""

    trial: int
    plan: str
    seconds: float
    host: str | None
    lost: bool


class Best(FrozenModel):
    """The best trial of one allocation: its pruner, allocation and parameters.

    `against_uniform`: by measure. `draws`: its test perplexity and change over draws of the calibration text.
    `sparsity` or `bits`: its target, where the study searches for it.
    """

    trial: int
    pruner: str
    allocation: str
    parameters: dict[str, float]
    scores: Scores
    against_uniform: dict[str, Against | None]
    draws: OverDraws | None = None
    sparsity: float | None = None
    bits: float | None = None


class TrialStatus(FrozenModel):
    """One trial, by number, with Optuna's state and `params`; `plan`: the params as a short text.

    `parameters`: of the allocation; over an interval of sparsities its params are shares of their bounds.

    `seconds`: of all phases. `remark`: why it has no value, or what is unusual.
    `realised`: the counted share of zeros. `cut_off`: how often this trial and those that it repeats were lost with
    their process. `sparsity`: its target, where the study searches for it. `packed_bytes`: of all weights in a packed
    folder. Where weights are rounded, `bits`: of each block, `effective_bits`: a weight with scales,
    `quantized_bytes`: of all weights so stored.
    """

    number: int
    state: str
    params: dict[str, float | str]
    parameters: dict[str, float]
    plan: str
    scores: Scores
    realised: float | None
    seconds: float | None
    remark: str | None
    cut_off: int = 0
    sparsity: float | None = None
    packed_bytes: int | None = None
    bits: tuple[int | float, ...] | None = None
    effective_bits: float | None = None
    quantized_bytes: int | None = None


class Status(FrozenModel):
    """The present state of a study, with scores of `dense` and of `uniform`, which has the pruner of `best`.

    `best` is the first of `ranks`. `done` of `total` trials are; `complete`: with their final numbers. `seconds_left`:
    until then; `running`, `trials`: see below. `screening`: the progress of the study that comes before.
    `uniform_draws`: uniform over draws of the calibration text. `windows`: number of windows by text, over which errors
    are computed. `objective`: what trials minimise. `front`: with two measures, the numbers of the Pareto front's
    trials, the lowest perplexity (`best`) first. `bos`: windows begin with BOS. `sparsity`: a number, or the interval
    in which the study searches; then `points` are the plans to choose from, and `limit` bounds the quality of the best.
    `dense_bytes`: of all weights in the dense model's files. `dense_tokens_per_second`: decoded one at a time by torch,
    where `speedup` measured points; of an image classifier `dense_images_per_second`. `requested`: trials that were
    asked for, if the study ended after fewer. `sign`: of an image classifier, which sign of β is better. `bits`: a
    weight, likewise, in the place of a sparsity. `kinds`: test perplexity by kind of a mixed text, of `dense`, of
    trials by number, and of the best one `trained`.
    """

    format: Literal["atp_tune.status/3"] = "atp_tune.status/3"
    study: str
    sparsity: float | tuple[float, float] | None
    done: int
    total: int | None
    complete: bool
    seconds_left: float | None
    running: tuple[Running, ...]
    dense: Scores
    uniform: Scores
    best: Best | None
    ranks: tuple[Best, ...]
    trials: tuple[TrialStatus, ...]
    screening: ScreeningProgress | None = None
    objective: tuple[str, ...] = PERPLEXITY
    front: tuple[int, ...] = ()
    bos: bool = False
    uniform_draws: OverDraws | None = None
    windows: dict[str, int] = Field({})
    limit: Limit | None = None
    points: tuple[PointStatus, ...] = ()
    dense_bytes: int | None = None
    dense_tokens_per_second: float | None = None
    dense_images_per_second: float | None = None
    requested: int | None = None
    sign: str | None = None
    bits: float | tuple[float, float] | None = None
    kinds: dict[str, dict[str, Score]] = Field({})

    def without_clock(self) -> "Status":
        """The status without times, to compare for changes."""
        running = tuple(one.model_copy(update={"seconds": 0.0}) for one in self.running)
        return self.model_copy(update={"running": running, "seconds_left": None})


class Listed(FrozenModel):
    """One study that can be run by name; its state is `unknown` if its database is not a file."""

    name: str
    state: State
    done: int = 0
    total: int | None = None
    best: Score = None
    description: str = ""
    path: str
    error: str | None = None


def to_json(what: FrozenModel | Sequence[FrozenModel], indent: int | None = 2) -> str:
    """One JSON document without a final line break; in one line if `indent` is None."""
    return dumps(to_jsonable_python(what), indent)


def make_status(summary: Summary, now: datetime) -> Status:
    """A study's status at a local time."""
    results, uniform = summary.results, summary.uniform_trial
    running = tuple(
        Running(
            trial=trial.number,
            plan=plan_words(trial),
            seconds=round(max(0.0, (now - (trial.datetime_start or now)).total_seconds()), 1),
            host=trial.user_attrs.get("host"),
            lost=is_dead(trial.user_attrs),
        )
        for trial in summary.trials
        if trial.state.name == "RUNNING"
    )
    ranks = tuple(
        Best(
            trial=trial.number,
            pruner=method_in(trial.params),
            allocation=allocation_name(trial),
            parameters=allocation_parameters(trial),
            scores=results.scores(trial),
            against_uniform=_against(summary, trial),
            draws=summary.over_draws.get(trial.number),
            **amount_of(target_in(trial.params)),
        )
        for trial in summary.ranks
    )
    shared = ("sparsity", "done", "total", "complete", "screening", "bos", "limit", "dense_bytes", "requested", "bits")
    return Status(
        study=summary.name,
        seconds_left=seconds_left(summary, running),
        running=running,
        dense=results.scores(DENSE),
        uniform=results.scores(uniform),
        best=next(iter(ranks), None),
        ranks=ranks,
        trials=tuple(_trial(summary, trial) for trial in summary.trials),
        objective=results.objectives,
        front=tuple(trial.number for trial in summary.front),
        uniform_draws=summary.over_draws.get(uniform.number) if uniform else None,
        windows=results.counts,
        points=tuple(_point(summary, point) for point in summary.points),
        **{f"dense_{results.words.rate}_per_second": dense_speed(summary)},
        sign=sign_of_beta(summary) or None,
        kinds={row: dict(by_kind) for row, by_kind in summary.kinds.items()},
        **{key: getattr(summary, key) for key in shared},
    )


def seconds_left(summary: Summary, running: Iterable[Running]) -> float | None:
    """Seconds until the total is reached, at the measured trials' mean and the present number of running trials.

    None if no trial is measured or none runs. Without the final scores on the test text.
    """
    # Wall times of trials that were measured; none where the clock was set back.
    took = [
        seconds
        for trial in summary.trials
        if trial.values is not None and trial.duration is not None and "repeats" not in trial.user_attrs
        if counts(trial) and (seconds := trial.duration.total_seconds()) >= 0
    ]
    alive = [one.seconds for one in running if not one.lost]
    if summary.total is None or not took or not alive:
        return None
    mean = fmean(took)
    work = (summary.total - summary.done) * mean - sum(min(seconds, mean) for seconds in alive)
    return max(0.0, work / len(alive))


def _against(summary: Summary, model: Model) -> dict[str, Against | None]:
    results = summary.results
    return {by.name: Against.of(results.against_uniform(model, by)) for by in results.measures}


def _point(summary: Summary, point: Point) -> PointStatus:
    results, trial = summary.results, point.trial
    uniform = results.uniform(trial)
    return PointStatus(
        trial=trial.number,
        **point.amount,
        method=method_words(trial),
        scores=results.scores(trial),
        against_dense=Against.of(results.change(DENSE, trial)),
        against_uniform=_against(summary, trial),
        uniform=uniform.number if uniform else None,
        excess=point.excess,
        best=point.is_best,
        packed_bytes=point.packed_bytes,
        **{f"{results.words.rate}_per_second": point.speed.fastest if point.speed else None},
    )


def _trial(summary: Summary, trial: FrozenTrial) -> TrialStatus:
    attrs = trial.user_attrs
    plan = Plan.stored_in(attrs)
    return TrialStatus(
        number=trial.number,
        state=trial.state.name.lower(),
        params=trial.params,
        parameters=allocation_parameters(trial),
        plan=plan_words(trial),
        scores=summary.results.scores(trial),
        seconds=round(sum(attrs["seconds"].values()), 3) if "seconds" in attrs else None,
        remark=trial_remark(trial, summary) or None,
        cut_off=len(all_cut_offs(trial)),
        sparsity=trial.params.get("sparsity"),
        bits=plan.amounts if plan and plan.by_bits else None,
        **{key: attrs.get(key) for key in ("realised", "packed_bytes", "effective_bits", "quantized_bytes")},
    )


def listed(file: StudyFile, summary: Summary | None) -> Listed:
    """A row of the list of studies; without a summary for a study that is not stored, or not in a file.

    A study whose name is not its file's was created with `--study-name`.
    """
    name = summary.name if summary else file.name
    state = "not started" if file.database else "unknown"
    if summary is not None:
        state = "complete" if summary.complete else "unfinished"
    return Listed(
        name=name,
        state=state,
        done=summary.done if summary else 0,
        total=(summary.total if summary else None) or file.study.search.trials,
        best=summary.results.score(summary.best_trial, "validation") if summary else None,
        description=file.study.description if name == file.name else f"--study {file.name} --study-name {name}",
        path=str(file.path),
    )
