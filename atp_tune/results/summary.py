"""The summary of a study, read from its storage alone, finished or running."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from atp_tune.allocations import is_fitted
from atp_tune.config.best import ZeroShot
from atp_tune.config.prune import Recovered
from atp_tune.config.studyfile import StudyFile, from_settings
from atp_tune.config.typed import in_tower
from atp_tune.measures import PERPLEXITY, TEXTS, Limit, Perplexity, Role, by_kind
from atp_tune.metrics import Answers, BosEffect, Continuations, OverDraws, Speed, over_draws
from atp_tune.plan import target_in, target_words, targets_in
from atp_tune.results.formatting import (
    BITS,
    BOTH,
    ZEROS,
    Amount,
    dense_speed,
    has_bytes,
    megabytes,
    method_words,
    plan_words,
    spent,
    stored_as,
    trial_remark,
)
from atp_tune.results.goals import AtSparsity, Column, Point, best_trial, goal_in, pareto_front
from atp_tune.results.results import (
    DENSE,
    NOTHING,
    TRAINED,
    Model,
    Results,
    allocation_name,
    attached,
    is_uniform,
    stored_answers,
    uniform_beside,
)
from atp_tune.storage import fingerprint, opening, progress
from atp_tune.storage.attributes import StudySnapshot
from atp_tune.storage.fingerprint import SUFFIX, is_screening
from atp_tune.storage.progress import is_dead, trials_in
from atp_tune.utils.registry import FrozenModel

BATCHED = ("calibration", "validation")  # texts whose batch sizes affect a trial's value


class ScreeningProgress(FrozenModel):
    """The progress of a study's screening."""

    study: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Summary:
    """The findings of a study; `results`: the numbers of its models.

    made_from     its study file with all overrides; None from an early version
    requested     trials that were asked for, if the study ended after fewer
    target        in words, or a size; where it is searched for that of the best trial, and `searched` the interval
    told          both in words
    sizes         weights per block; `in_tower`: so many, the first, are of a vision tower
    ranks         the best trial of each allocation
    gp_posterior  the GP's posterior of perplexity over β; None without a GP
    unlike        trial → device, dtype or batch sizes unlike the study's first trial, as text
    over_draws    test perplexity over draws of the calibration text by trial
    dense_bytes   of all weights of the dense model in its files; None in studies of earlier versions
    front         with two objectives, the trials of the Pareto front
    points        over an interval of sparsities, the trials to choose from; see `results.goals`
    limit         of quality, if the study finds the sparsest plan within it
    zero_shot, speed  measurements of the best trial by `evaluate` and `speedup`
    continuations     of prompts, by dense, uniform and the best trial of each allocation
    of_channels   whole channels are pruned
    bits          weights are rounded and none is pruned, to so many bits in the mean; `rounded`: a sentence, if weights
                  are rounded after pruning
    training      the host where the best trial's kept weights are being trained, "" if they are not
    answers       of an image classifier, what dense, uniform and best see in a few test images
    kinds         test perplexity by kind of a mixed text, of `dense`, of trials by number, and of the best `trained`
    choices       the points that are as good as the best
    recovered     how the training of the best trial's kept weights went; None without
    uniform_trial     with the best trial's pruner and sparsity
    is_tested     the best trial is measured on the test text
    text          on which to compare dense, uniform and best: test once all of them have it
    bos           windows begin with BOS; `bos_effect`: its measured effect on the dense model
    """

    name: str
    sparsity: float | tuple[float, float] | None
    target: str
    searched: str
    told: str
    trials: list[FrozenTrial]
    total: int | None
    done: int
    best_trial: FrozenTrial | None
    ranks: list[FrozenTrial]
    results: Results
    goal: AtSparsity
    amount: Amount
    made_from: StudyFile | None
    sizes: tuple[int, ...]
    complete: bool
    requested: int | None
    in_tower: int
    gp_posterior: dict[str, Any] | None
    unlike: Mapping[int, str]
    screening: ScreeningProgress | None
    front: Sequence[FrozenTrial]
    zero_shot: ZeroShot | None
    speed: Speed | None
    continuations: Continuations | None
    bos: bool
    bos_effect: BosEffect | None
    over_draws: Mapping[int, OverDraws]
    points: Sequence[Point]
    dense_bytes: int | None
    limit: Limit | None
    of_channels: bool
    bits: float | None
    rounded: str
    answers: Answers | None
    training: str
    kinds: Mapping[str, Mapping[str, Perplexity]]
    choices: Sequence[Point]
    recovered: Recovered | None
    uniform_trial: FrozenTrial | None
    is_tested: bool
    text: Role

    def __repr__(self) -> str:
        return f"<Summary {self.name}: {self.done} of {self.total} trials>"


def summarise(study: optuna.Study) -> Summary:
    """A study's present summary."""
    study = StudySnapshot(study)
    attrs = study.user_attrs
    goal, best = goal_in(study), best_trial(study)
    facts, trials = fingerprint.facts_in(study), trials_in(study)
    measurements, target = attached(study, best.number) if best else {}, facts.get("sparsity")
    results = Results(attrs, trials, fingerprint.stored_objectives(facts), measurements.get("recovered"))
    uniform, points, shared = results.uniform(best), goal.points(), None if "sparsity" in facts else facts.get("bits")
    tested = [bool(results.items(model, "test")) for model in (DENSE, uniform, best) if model]
    # The target in words, of the best trial where it is searched for.
    targets, found = target_words(targets_in(facts)) or facts.get("size", ""), best and target_in(best.params)
    total, done = attrs.get("total"), progress.counted(study)
    is_done = total is not None and done >= total and not progress.running(study)
    return Summary(
        name=study.study_name,
        sparsity=tuple(target) if isinstance(target, list) else target,
        target=target_words(found) if found else targets,
        searched=targets if found else "",
        told=f"{target_words(found)} of {targets}" if found else targets,
        trials=trials,
        total=total,
        done=done,
        best_trial=best,
        ranks=goal.leaders(),
        results=results,
        goal=goal,
        amount=BITS["ggml" in facts.get("quantize.quantizers", ())] if shared else BOTH if "size" in facts else ZEROS,
        made_from=made_from(study),
        sizes=tuple(attrs.get("sizes", ())),
        in_tower=in_tower(attrs.get("blocks")),
        complete=is_done and is_reported(study, _asked_draws(study)),
        requested=progress.requested(study),
        unlike=_unlike(study),
        screening=_screening(study),
        front=pareto_front(study),
        **{key: measurements.get(key) for key in ("zero_shot", "speed", "continuations")},
        bos=fingerprint.has_bos(study),
        bos_effect=BosEffect.model_validate(attrs["bos"]) if "bos" in attrs else None,
        over_draws=_over_draws(study),
        points=points,
        choices=points if goal.is_open else (),
        recovered=results.recovered,
        uniform_trial=uniform,
        is_tested=best is not None and tested[-1],
        text="test" if all(tested) else "validation",
        **{key: attrs.get(key) for key in ("gp_posterior", "dense_bytes", "limit")},
        of_channels=facts.get("prune.pattern") == "channels",
        bits=shared,
        rounded=_rounded(facts),
        answers=stored_answers(study, best) if best else None,
        kinds=_kinds(results),
        training="" if is_dead(process := attrs.get("training", {})) else str(process.get("host", "")),
    )


def _kinds(results: Results) -> dict[str, Mapping[str, Perplexity]]:
    kinds, nlls = results.attrs.get("kinds", ()), results.attrs.get("test_nlls", {})
    rows = {name: by_kind(own, kinds) for name, own in nlls.items()}
    if results.trained:
        rows["trained"] = results.trained.kinds
    return {name: own for name, own in rows.items() if own}


def _rounded(facts: Mapping[str, Any]) -> str:
    """How the weights that are kept are rounded; "" where none is, or where no weight is zero."""
    quantizer = next(iter(facts.get("quantize.quantizers", ())), "a quantizer")
    if "size" in facts:
        return f"Kept weights are rounded by {quantizer} within {facts['size']}; uniform has no zeros, and even bits."
    text = "Kept weights are rounded to {:g} bits by {}, those of uniform too; zeros stay zero."
    return text.format(facts["bits"], quantizer) if {"bits", "sparsity"} <= facts.keys() else ""


def _screening(study: optuna.Study) -> ScreeningProgress | None:
    if is_screening(study):
        return None
    other = opening.find_study(study._storage, study.study_name + SUFFIX)
    if other is None or not is_screening(other):
        return None
    return ScreeningProgress(study=other.study_name, done=progress.counted(other), total=other.user_attrs.get("total"))


def made_from(study: optuna.Study) -> StudyFile | None:
    """The study file of a study with all overrides; None if this version cannot read it."""
    try:
        return from_settings(study.user_attrs["made_from"])
    except (KeyError, TypeError, ValueError):  # pydantic's are of the last kind
        return None


def _unlike(study: optuna.Study) -> dict[int, str]:
    facts = fingerprint.facts_in(study)
    began, batches = fingerprint.first_device(study), fingerprint.stored_batches(study)
    remarks = {}
    for trial in trials_in(study):
        device = fingerprint.device_kind(trial.user_attrs.get("device", began or ""))
        own = trial.user_attrs.get("dtype")
        parts = [f"on {device}"] * (began not in (None, device))
        parts += [f"in {own}"] * (own not in (None, facts.get(fingerprint.DTYPE)))
        for role, windows in fingerprint.stored_batches(trial).items():
            if role in BATCHED and windows != batches.get(role, windows):
                parts.append(f"in batches of {windows} {role} windows")
        if parts:
            remarks[trial.number] = " ".join(parts)
    return remarks


def is_reported(study: optuna.Study, draws: int) -> bool:
    """Whether nothing is missing on the test text, nor in so many draws of the calibration text."""
    return best_trial(study) is None or not (unreported(study) or undrawn(study, draws))


def _asked_draws(study: optuna.Study) -> int:
    """`texts.calibration.draws` of the study's last run."""
    file = made_from(study)
    return file.study.data.calibration.draws if file else 1


def unreported(study: optuna.Study) -> list[str]:
    """The missing rows of the test text: `dense`, and the best trial of each allocation with its uniform trial.

    None for a screening.
    """
    if is_screening(study):
        return []
    nlls = study.user_attrs.get("test_nlls", {})
    return [name for name in ("dense", *goal_in(study).compared()) if name not in nlls]


def undrawn(study: optuna.Study, draws: int) -> list[tuple[int, str]]:
    """The missing measurements over draws of the calibration text, as (draw, trial); draw 0 is the study's own."""
    if draws == 1 or is_screening(study):
        return []
    names, nlls = goal_in(study).redrawn(), _drawn(study, draws)
    return [(draw, name) for draw in range(draws) for name in names if str(draw) not in nlls.get(name, {})]


def fits_anew(study: optuna.Study) -> bool:
    """Whether plans are fitted to the calibration text by an allocation of the last run, so anew to each draw's own."""
    file = made_from(study)
    return file is not None and any(map(is_fitted, file.study.allocation.short_names))


def _drawn(study: optuna.Study, draws: int) -> dict[str, dict[str, list[float]]]:
    """Window NLLs by trial and draw; with plans fitted anew those of so many draws."""
    if fits_anew(study):
        return {name: rows.get(str(draws), {}) for name, rows in study.user_attrs.get("refits", {}).items()}
    others = study.user_attrs.get("draws", {})
    return {name: {"0": own, **others.get(name, {})} for name, own in study.user_attrs.get("test_nlls", {}).items()}


def final_numbers(study: optuna.Study) -> int:
    """Number of measurements on the test text, over all draws of the calibration text."""
    drawn = sum(len(row) for key in ("draws", "refits") for row in study.user_attrs.get(key, {}).values())
    return len(study.user_attrs.get("test_nlls", {})) + drawn


def _over_draws(study: optuna.Study) -> dict[int, OverDraws]:
    """The reported trials over the draws of the calibration text with which all of them are measured."""
    names, count = goal_in(study).redrawn(), _asked_draws(study)
    draws = _drawn(study, count)
    if not names or not draws.keys() >= {*names}:
        return {}
    # The tokens, or images, of each fitted allocation's plan, in each of the draws and in the study. Those by prices
    # take a pool of the calibration text, the others measure its windows.
    file, stored = made_from(study), study.user_attrs.get("fitted_to", {}).get(str(count))
    fitted_to = dict[str, tuple[int, int]]()
    if file is not None and stored:
        (each, own), text, allocations = stored, file.study.data.calibration, file.study.allocation
        windows = -(-(text.nsamples or 0) // text.stride) * getattr(text, "seqlen", 1)
        fitted_to = {name: (windows, windows) for name in allocations.short_names if is_fitted(name)}
        fitted_to |= dict.fromkeys(allocations.by_prices, (each, own))
    common = sorted(set.intersection(*(set(draws[name]) for name in names)), key=int)
    nlls = {name: [draws[name][draw] for draw in common] for name in names}
    result = {}
    for name in names:
        trial = study.trials[int(name)]
        uniform = None if is_uniform(trial) else uniform_beside(study, trial)
        fitted = fitted_to.get(allocation_name(trial))
        spread = over_draws(nlls[name], nlls[str(uniform.number)] if uniform else None, fitted)
        if spread is not None:
            result[trial.number] = spread
    return result


# --- The tables of a study as text: each surface shows the same ones, and only says how a table is drawn.


@dataclass(frozen=True)
class Table:
    """A head and rows of cells; `words`: columns of text, others hold numbers; `best`: the row to emphasise."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    best: int | None = None


def make_table(columns: Sequence[Column], models: Sequence[Model], best: Model | None, *words: str) -> Table:
    """A table with one row for each model; `words`: heads of the columns of text."""
    head = [name for name, _ in columns]
    rows = [[NOTHING if (value := cell(model)) is None else str(value) for _, cell in columns] for model in models]
    where = next((row for row, model in enumerate(models) if best is not None and model == best), None)
    return Table(head, rows, [index for index, name in enumerate(head) if name in words], where)


def overview(summary: Summary, hidden: str = "") -> Table:
    """Dense, uniform and the best of each allocation; over an interval dense and the points. `hidden`: a column."""
    trained = [TRAINED] * (summary.results.trained is not None)
    columns = [each for each in (*_plan(summary), *_measured(summary), *_sizes(summary)) if each[0] != hidden]
    return make_table(columns, [DENSE, *summary.goal.rows(summary), *trained], summary.best_trial, "method", "limit")


def _of_trial(cell: Callable[[FrozenTrial], object]) -> Callable[[Model], object]:
    """The cell of a trial; "" for another model, and where it has none."""
    return lambda model: "" if isinstance(model, str) or (value := cell(model)) is None else value


NUMBER: Column = ("trial", _of_trial(lambda trial: trial.number))


def _plan(summary: Summary) -> Iterator[Column]:
    def trial_of(model: Model) -> FrozenTrial | None:
        return summary.best_trial if model == TRAINED else None if isinstance(model, str) else model

    def method(model: Model) -> str:
        trial = trial_of(model)
        return DENSE if trial is None else method_words(trial) + ", trained" * (model == TRAINED)

    def amount(model: Model) -> str | None:
        trial = trial_of(model)
        if trial is None:
            return summary.amount.of_dense(summary)
        target = target_in(trial.params)
        return summary.amount.of(trial, summary) or None if target is None else target_words(target)

    yield "method", method
    yield NUMBER
    yield summary.amount.column, amount


def _measured(summary: Summary) -> Iterator[Column]:
    """Scores on both texts by measure, and the change from uniform with the same pruner; also over draws."""
    results = summary.results
    for measure in results.measures:
        for text in TEXTS:
            yield f"{text} {measure.column}", partial(results.shown, text=text, measure=measure)
        if measure is PERPLEXITY:
            yield from summary.goal.columns(summary)
        else:
            yield f"{measure.column} against uniform", partial(results.against_uniform, measure=measure)


def _sizes(summary: Summary) -> Iterator[Column]:
    """Bytes and rate of points, and whether they are within the limit."""
    points, dense = {point.trial.number: point for point in summary.points}, dense_speed(summary)

    def size(model: Model) -> str | None:
        value = summary.dense_bytes if isinstance(model, str) else points[model.number].packed_bytes
        return None if value is None else megabytes(value)

    def rate(model: Model) -> str | None:
        speed = None if isinstance(model, str) else points[model.number].speed
        value = dense if isinstance(model, str) else speed and speed.fastest
        return None if value is None else f"{value:.1f}"

    if has_bytes(summary):
        yield stored_as(summary), size
    if dense is not None:
        yield f"{summary.results.words.rate}/s", rate
    if any(point.excess is not None for point in summary.points):
        yield "limit", lambda m: "" if isinstance(m, str) else "within" if points[m.number].is_within else "beyond"


def trials(summary: Summary, shown: Sequence[FrozenTrial] | None = None) -> Table:
    """Every trial, or some of them, on the validation text."""
    results, best, of = summary.results, summary.best_trial, _of_trial
    columns = [
        NUMBER,
        ("state", of(lambda trial: trial.state.name.lower())),
        ("plan", of(plan_words)),
        *((by.column, of(partial(results.score, text="validation", measure=by))) for by in results.measures),
        (summary.amount.counted, of(partial(summary.amount.of, summary=summary))),
        ("s", of(lambda trial: f"{sum(spent(trial).values()):.1f}" if spent(trial) else "")),
        ("remark", of(lambda trial: "; ".join(filter(None, ("best" * (trial == best), trial_remark(trial, summary)))))),
    ]
    return make_table(columns, summary.trials if shown is None else shown, best, "state", "plan", "remark")


def front(summary: Summary) -> Table | None:
    """The trials of the Pareto front of two objectives, on the validation text; None where points are shown instead."""
    results = summary.results
    if summary.points or not summary.front:
        return None
    columns: list[Column] = [
        NUMBER,
        ("method", _of_trial(method_words)),
        *(
            (f"validation {by.column}", partial(results.score, text="validation", measure=by))
            for by in results.measures
        ),
    ]
    return make_table(columns, summary.front, summary.front[0], "method")


def kinds(summary: Summary) -> Table | None:
    """Test perplexity by kind of a mixed text, and how many times dense's; None for other texts."""
    dense, shown = summary.kinds.get(DENSE, {}), [point.trial for point in summary.points] or summary.trials
    names = {DENSE: DENSE, **{str(trial.number): plan_words(trial) for trial in shown}, TRAINED: "best, trained"}

    def cell(row: str, kind: str) -> str:
        score, before = summary.kinds[row].get(kind), dense[kind]
        times = "" if row == DENSE or score is None else f" ({score.value / before.value:.2f}×)"
        return NOTHING if score is None else f"{score.value:.2f}{times}"

    rows = [[name, *(cell(row, kind) for kind in dense)] for row, name in names.items() if row in summary.kinds]
    return Table(["test perplexity by kind", *dense], rows) if dense else None
