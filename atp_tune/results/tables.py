"""The tables of a study as text: each surface shows the same ones, and only says how a table is drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from optuna.trial import FrozenTrial

from atp_tune.measures import PERPLEXITY, TEXTS
from atp_tune.plan import percent
from atp_tune.results.formatting import (
    dense_speed,
    has_bytes,
    megabytes,
    method_of,
    plan_of,
    remark_of,
    spent,
    stored_as,
)
from atp_tune.results.goals import Column
from atp_tune.results.results import DENSE, NOTHING, TRAINED, Model
from atp_tune.results.summary import Summary
from atp_tune.storage.progress import sparsity_of


@dataclass(frozen=True)
class Table:
    """A head and rows of cells; `words`: columns of text, others hold numbers; `best`: the row to emphasise."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)
    best: int | None = None


def table_of(columns: Sequence[Column], models: Sequence[Model], best: Model | None, *words: str) -> Table:
    """A table with one row for each model; `words`: heads of the columns of text."""
    head = [name for name, _ in columns]
    cells = [[cell(model) for _, cell in columns] for model in models]
    rows = [[NOTHING if found is None else str(found) for found in row] for row in cells]
    where = next((row for row, model in enumerate(models) if best is not None and model == best), None)
    return Table(head, rows, [place for place, name in enumerate(head) if name in words], where)


def overview(summary: Summary, hidden: str = "") -> Table:
    """Dense, uniform and the best of each allocation; over an interval dense and the points. `hidden`: a column."""
    trained: list[Model] = [TRAINED] * (summary.results.trained is not None)
    columns = [each for each in (*_plan(summary), *_measured(summary), *_sizes(summary)) if each[0] != hidden]
    return table_of(columns, [DENSE, *summary.goal.rows(summary), *trained], summary.best_trial, "method", "limit")


def _plan(summary: Summary) -> Iterator[Column]:
    def trial_of(model: Model) -> FrozenTrial | None:
        return summary.best_trial if model == TRAINED else None if isinstance(model, str) else model

    def method(model: Model) -> str:
        trial = trial_of(model)
        return DENSE if trial is None else method_of(trial) + ", trained" * (model == TRAINED)

    def amount(model: Model) -> str | None:
        trial = trial_of(model)
        if trial is None:
            return summary.amount.of_dense(summary)
        target = sparsity_of(trial)
        return summary.amount.of(trial, summary) or None if target is None else percent(target)

    yield "method", method
    yield "trial", lambda model: "" if isinstance(model, str) else model.number
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
        known = summary.dense_bytes if isinstance(model, str) else points[model.number].packed_bytes
        return None if known is None else megabytes(known)

    def rate(model: Model) -> str | None:
        speed = None if isinstance(model, str) else points[model.number].speed
        known = dense if isinstance(model, str) else speed and speed.fastest
        return None if known is None else f"{known:.1f}"

    if has_bytes(summary):
        yield stored_as(summary), size
    if dense is not None:
        yield f"{summary.results.words.rate}/s", rate
    if any(point.excess is not None for point in summary.points):
        yield "limit", lambda m: "" if isinstance(m, str) else "within" if points[m.number].is_within else "beyond"


def trials(summary: Summary, shown: Sequence[FrozenTrial] | None = None) -> Table:
    """Every trial, or some of them, on the validation text."""
    results, best = summary.results, summary.best_trial

    def of(cell: Callable[[FrozenTrial], object]) -> Callable[[Model], object]:
        return lambda model: "" if isinstance(model, str) or (found := cell(model)) is None else found

    columns: list[Column] = [
        ("trial", of(lambda trial: trial.number)),
        ("state", of(lambda trial: trial.state.name.lower())),
        ("plan", of(plan_of)),
        *((by.column, of(partial(results.score, text="validation", measure=by))) for by in results.measures),
        (summary.amount.counted, of(partial(summary.amount.of, summary=summary))),
        ("s", of(lambda trial: f"{sum(spent(trial).values()):.1f}" if spent(trial) else "")),
        ("remark", of(lambda trial: "; ".join(filter(None, ("best" * (trial == best), remark_of(trial, summary)))))),
    ]
    return table_of(columns, summary.trials if shown is None else shown, best, "state", "plan", "remark")


def front(summary: Summary) -> Table | None:
    """The trials of the Pareto front of two objectives, on the validation text; None where points are shown instead."""
    results = summary.results
    if summary.points or not summary.front:
        return None
    columns: list[Column] = [
        ("trial", lambda m: None if isinstance(m, str) else m.number),
        ("method", lambda m: None if isinstance(m, str) else method_of(m)),
        *(
            (f"validation {by.column}", partial(results.score, text="validation", measure=by))
            for by in results.measures
        ),
    ]
    return table_of(columns, summary.front, next(iter(summary.front), None), "method")


def kinds(summary: Summary) -> Table | None:
    """Test perplexity by kind of a mixed text, and how many times dense's; None for other texts."""
    dense, shown = summary.kinds.get(DENSE, {}), [point.trial for point in summary.points] or summary.trials
    names = {DENSE: DENSE, **{str(trial.number): plan_of(trial) for trial in shown}, TRAINED: "best, trained"}

    def cell(row: str, kind: str) -> str:
        found, before = summary.kinds[row].get(kind), dense[kind]
        times = "" if row == DENSE or found is None else f" ({found.value / before.value:.2f}×)"
        return NOTHING if found is None else f"{found.value:.2f}{times}"

    rows = [[name, *(cell(row, kind) for kind in dense)] for row, name in names.items() if row in summary.kinds]
    return Table(["test perplexity by kind", *dense], rows) if dense else None
