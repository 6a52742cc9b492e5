"""The JSON documents of `status` and `studies`, which their screen output is made from too.

The format is published (`atp_tune.status/2`): keys are added under the same number, never renamed or removed. A value
that is unknown or not finite is null. Perplexities are on the validation text unless named `test`.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Literal

from optuna.trial import FrozenTrial
from pydantic import Field

from atp_tune.frozen import FrozenModel
from atp_tune.measures import Accuracies
from atp_tune.metrics.draws import OverDraws
from atp_tune.plan import Plan, method_in
from atp_tune.results.accuracies import accuracies_of
from atp_tune.results.formatting import dense_speed, plan_of, remark_of
from atp_tune.results.status_points import Against, Number, PointStatus, against_of, point_of, rate_of
from atp_tune.results.summary import Rank, ScreeningProgress, Summary
from atp_tune.results.trials import allocation_of, parameters_of, score_of
from atp_tune.spec.config import Divergences, ModelAccuracies, Score, Scores, dumps
from atp_tune.spec.studyfile import StudyFile
from atp_tune.storage.fingerprint import PERPLEXITY
from atp_tune.storage.lost_trials import cut_offs_of
from atp_tune.storage.process import is_dead
from atp_tune.storage.progress import counts, sparsity_of

FORMAT: Literal["atp_tune.status/2"] = "atp_tune.status/2"

State = Literal["not started", "unfinished", "complete", "unknown", "invalid"]


class Running(FrozenModel):
    """A running trial; `lost`: its process ran on this host and has ended."""

    trial: int
    plan: str
    seconds: float
    host: str | None
    lost: bool


class Best(FrozenModel):
    """The best trial of one allocation.

    `kl`, `kl_change`: its KL from the dense model. `draws`: its test perplexity and change over draws of the
    calibration text. `sparsity`: its target, where the study searches for it.
    """

    trial: int
    pruner: str
    allocation: str
    parameters: dict[str, float]
    validation: Score
    test: Score
    change: Against | None
    kl: Divergences | None = None
    kl_change: Against | None = None
    draws: OverDraws | None = None
    sparsity: float | None = None


class TrialStatus(FrozenModel):
    """One trial, with Optuna's state and `params`; `plan`: the params as a short text.

    `value`, `stderr`: perplexity on the validation text. `realised`: the counted share of zeros. `kl`: null if not
    minimised. `cut_off`: how often this trial and those that it repeats were lost with their process. `sparsity`: its
    target, where the study searches for it. `packed_bytes`: of all weights in a packed folder. `accuracy`: of an image
    classifier, as in `Status`. Where weights are rounded, `bits`: of each block, `effective_bits`: a weight with
    scales, `quantized_bytes`: of all weights so stored.
    """

    number: int
    state: str
    params: dict[str, float | str]
    plan: str
    value: Number
    stderr: Number
    test: Score
    realised: float | None
    seconds: float | None
    remark: str | None
    kl: Divergences | None = None
    cut_off: int = 0
    sparsity: float | None = None
    packed_bytes: int | None = None
    accuracy: Accuracies | None = None
    bits: tuple[int | float, ...] | None = None
    effective_bits: float | None = None
    quantized_bytes: int | None = None


class Status(FrozenModel):
    """A study's present state; `uniform` has the best trial's pruner, `best` is the first of `ranks`.

    `uniform_draws`: uniform over draws of the calibration text. `windows`: number of windows by text, over which errors
    are computed. `objective`: `perplexity`, `kl` or both. `front`: with both, the numbers of the Pareto front's trials,
    the lowest perplexity (`best`) first. `bos`: windows begin with BOS. `sparsity`: a number, or the interval in which
    the study searches; then `points` are the plans to choose from, and `limit` bounds the quality of the best.
    `dense_bytes`: of all weights in the dense model's files. `dense_tokens_per_second`: decoded one at a time by torch,
    where `speedup` measured points; of an image classifier `dense_images_per_second`. `requested`: trials
    that were asked for, if the study ended after fewer.
    `accuracy`, `sign`: of an image classifier, the shares of right answers, and which sign of β is better. `bits`:
    target in bits per weight, in the place of a sparsity. `kinds`: test perplexity by kind of a mixed text, of `dense`,
    of trials by number, and of the best one `trained`.
    """

    format: Literal["atp_tune.status/2"] = FORMAT
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
    limit: dict[str, float | dict[str, float]] | None = None
    points: tuple[PointStatus, ...] = ()
    dense_bytes: int | None = None
    dense_tokens_per_second: float | None = None
    dense_images_per_second: float | None = None
    requested: int | None = None
    accuracy: ModelAccuracies | None = None
    sign: str | None = None
    bits: float | None = None
    kinds: dict[str, dict[str, Score]] = Field({})

    def without_clock(self) -> "Status":
        """The status without times, to compare for changes."""
        running = tuple(one.model_copy(update={"seconds": 0.0}) for one in self.running)
        return self.model_copy(update={"running": running, "seconds_left": None})


class Listed(FrozenModel):
    """One study that can be run by name; its state is `unknown` if its database is not a file."""

    name: str
    state: State
    done: int
    total: int | None
    best: Score
    description: str
    path: str
    error: str | None


def to_json(what: FrozenModel | Sequence[FrozenModel], indent: int | None = 2) -> str:
    """One JSON document without a final line break; in one line if `indent` is None."""
    if isinstance(what, FrozenModel):
        return dumps(what.model_dump(mode="json"), indent)
    return dumps([part.model_dump(mode="json") for part in what], indent)


def status_of(summary: Summary, now: datetime) -> Status:
    """A study's status at a local time."""
    running = tuple(_running(trial, now) for trial in summary.trials if trial.state.name == "RUNNING")
    ranks = tuple(_best(rank, summary) for rank in summary.ranks)
    return Status(
        study=summary.name,
        sparsity=summary.sparsity,
        done=summary.done,
        total=summary.total,
        complete=summary.complete,
        seconds_left=seconds_left(summary, running),
        running=running,
        dense=summary.dense,
        uniform=summary.uniform,
        best=ranks[0] if ranks else None,
        ranks=ranks,
        trials=tuple(_trial(summary, trial) for trial in summary.trials),
        screening=summary.screening,
        objective=summary.objectives,
        front=tuple(trial.number for trial in summary.front),
        bos=summary.bos,
        uniform_draws=summary.over_draws.get(summary.uniform_trial.number) if summary.uniform_trial else None,
        windows=dict(summary.windows),
        limit=None if summary.limit is None else dict(summary.limit),
        points=tuple(point_of(summary, point) for point in summary.points),
        dense_bytes=summary.dense_bytes,
        **{f"dense_{key}": rate for key, rate in rate_of(summary, dense_speed(summary)).items()},
        requested=summary.requested,
        accuracy=accuracies_of(summary),
        sign=summary.sign or None,
        bits=summary.bits,
        kinds={row: dict(found) for row, found in summary.kinds.items()},
    )


def seconds_left(summary: Summary, running: Iterable[Running]) -> float | None:
    """Seconds until the total is reached, at the measured trials' mean and the present number of running trials.

    None if no trial is measured or none runs. Without the final scores on the test text.
    """
    took = [seconds for trial in summary.trials if (seconds := _duration(trial)) is not None]
    alive = [one.seconds for one in running if not one.lost]
    if summary.total is None or not took or not alive:
        return None
    mean = fmean(took)
    work = (summary.total - summary.done) * mean - sum(min(seconds, mean) for seconds in alive)
    return max(0.0, work / len(alive))


def _duration(trial: FrozenTrial) -> float | None:
    """A trial's wall time in seconds; None if it was not measured, is a repetition, or the clock was set back."""
    if trial.values is None or trial.duration is None or "repeats" in trial.user_attrs or not counts(trial):
        return None
    seconds = trial.duration.total_seconds()
    return seconds if seconds >= 0 else None


def _running(trial: FrozenTrial, now: datetime) -> Running:
    began = trial.datetime_start or now
    return Running(
        trial=trial.number,
        plan=plan_of(trial),
        seconds=round(max(0.0, (now - began).total_seconds()), 1),
        host=trial.user_attrs.get("host"),
        lost=is_dead(trial.user_attrs),
    )


def _best(rank: Rank, summary: Summary) -> Best:
    against, kl_against = (against_of(change, rank.on) for change in (rank.against, rank.kl_against))
    return Best(
        trial=rank.trial.number,
        pruner=method_in(rank.trial.params),
        allocation=allocation_of(rank.trial),
        parameters=parameters_of(rank.trial),
        validation=rank.scores.validation,
        test=rank.scores.test,
        change=against,
        kl=summary.kls.get(rank.trial.number),
        kl_change=kl_against,
        draws=summary.over_draws.get(rank.trial.number),
        sparsity=sparsity_of(rank.trial),
    )


def _trial(summary: Summary, trial: FrozenTrial) -> TrialStatus:
    attrs, score = trial.user_attrs, score_of(trial)
    plan = Plan.stored_in(attrs)
    return TrialStatus(
        number=trial.number,
        state=trial.state.name.lower(),
        params=trial.params,
        plan=plan_of(trial),
        value=score.value if score else None,
        stderr=(score.stderr or None) if score and ("stderr" in attrs or "kls" in attrs or "misses" in attrs) else None,
        test=summary.reports.get(trial.number),
        realised=attrs.get("realised"),
        seconds=round(sum(attrs["seconds"].values()), 3) if "seconds" in attrs else None,
        remark=remark_of(trial, summary) or None,
        kl=summary.kls.get(trial.number),
        cut_off=len(cut_offs_of(trial)),
        sparsity=sparsity_of(trial),
        packed_bytes=trial.user_attrs.get("packed_bytes"),
        accuracy=summary.hits.trial(trial) if summary.hits else None,
        bits=plan.amounts if plan and plan.by_bits else None,
        effective_bits=attrs.get("effective_bits"),
        quantized_bytes=attrs.get("quantized_bytes"),
    )


def listed(file: StudyFile, summary: Summary | None) -> Listed:
    """A row of the list of studies; without a summary for a study that is not stored, or not in a file.

    A study whose name is not its file's was created with `--study-name`.
    """
    name = summary.name if summary else file.name
    state: State = "not started" if file.database else "unknown"
    if summary is not None:
        state = "complete" if summary.complete else "unfinished"
    best = summary.best_trial if summary else None
    return Listed(
        name=name,
        state=state,
        done=summary.done if summary else 0,
        total=(summary.total if summary else None) or file.study.search.trials,
        best=score_of(best) if best else None,
        description=file.study.description if name == file.name else f"--study {file.name} --study-name {name}",
        path=str(file.path),
        error=None,
    )


def invalid(path: Path, error: str) -> Listed:
    """The row of a study file that cannot be read."""
    return Listed(
        name=path.stem, state="invalid", done=0, total=None, best=None, description="", path=str(path), error=error
    )
