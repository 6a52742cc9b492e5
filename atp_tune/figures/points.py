"""The figure of a study over an interval of sparsities: sparsity against perplexity, or KL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import BEST, INK, UNIFORM, WORST, faint, level, log_axis, new_figure, rounded
from atp_tune.figures.style import DENSE as GREY
from atp_tune.figures.trials import axis_of, role, told, value_of
from atp_tune.results.results import DENSE
from atp_tune.results.summary import Summary
from atp_tune.results.trials import is_uniform


@dataclass(frozen=True)
class Mark:
    """A trial's place: its sparsity in percent, its value and standard error."""

    trial: FrozenTrial
    sparsity: float
    value: float
    stderr: float


def draw_points(summary: Summary) -> go.Figure | None:
    """Perplexity, or KL, on the validation text against the sparsity; None at one sparsity, or without a point."""
    shown = _marks(summary, [point.trial for point in summary.points])
    if not shown:
        return None
    beside = map(summary.results.uniform, (point.trial for point in summary.points))
    around = {trial.number for trial in beside if trial is not None}
    uniform = _marks(summary, [trial for trial in summary.trials if trial.number in around])
    found = shown if summary.choices else [mark for mark in shown if not is_uniform(mark.trial)]
    figure = new_figure(f"Sparsity and {summary.results.main.title}", "sparsity (%)", axis_of(summary))
    _add(figure, summary, uniform, "uniform", UNIFORM, "square", "dot")
    _add(figure, summary, found, "best at each sparsity" if summary.choices else "searched", BEST, "circle", "solid")
    best = next((mark for mark in shown if summary.best_trial and mark.trial.number == summary.best_trial.number), None)
    if best is not None:
        figure.add_scatter(
            x=[best.sparsity], y=rounded([best.value]), mode="markers", name=role("best", best.trial), hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 17, "color": INK, "line": {"width": 2}},
        )  # fmt: skip
    # Lines at the dense model and the limit, as far as the axis has them; their values.
    main, limit = summary.results.main, None
    known = None if main.is_higher_better else summary.results.score(DENSE, "validation", main)
    dense = known.value if known else None
    for key, value in (summary.limit or {}).items():
        if not isinstance(value, Mapping) and key in ("max_increase", f"max_{main.name}"):
            limit = value if key != "max_increase" else (1 + value) * dense if dense else None
    if dense is not None:
        level(figure, dense, f"dense {main.written(dense)}", GREY, "dot")
    if limit is not None:
        level(figure, limit, f"limit {main.written(limit)}", WORST, "dash")
    levels = [line for line in (dense, limit) if line is not None]
    _set_axes(figure, [*shown, *uniform], levels)
    return figure


def _marks(summary: Summary, trials: Sequence[FrozenTrial]) -> list[Mark]:
    """The trials that a log axis can show, by sparsity."""
    found = []
    for trial in trials:
        value, sparsity = value_of(trial), trial.params.get("sparsity")
        known = summary.results.score(trial, "validation", summary.results.main)
        if sparsity is not None and isfinite(value) and value > 0:
            found.append(Mark(trial, round(100 * sparsity, 4), value, known.stderr if known else 0.0))
    return sorted(found, key=lambda mark: (mark.sparsity, mark.trial.number))


def _add(
    figure: go.Figure, summary: Summary, marks: list[Mark], name: str, colour: str, symbol: str, dash: str
) -> None:
    """Marks with their standard errors, joined by a line."""
    if marks:
        figure.add_scatter(
            x=[mark.sparsity for mark in marks], y=rounded(mark.value for mark in marks), name=name,
            mode="lines+markers", line={"color": colour, "width": 1.5, "dash": dash},
            marker={"color": colour, "size": 8, "symbol": symbol},
            error_y={"array": rounded((mark.stderr for mark in marks), 4), "color": faint(colour, 0.6),
                     "thickness": 1.2, "width": 0},
            text=[told(mark.trial, summary) for mark in marks], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip


def _set_axes(figure: go.Figure, marks: list[Mark], levels: list[float]) -> None:
    low = min(*(mark.value - min(mark.stderr, mark.value / 3) for mark in marks), *levels, marks[0].value)
    high = max(*(mark.value + mark.stderr for mark in marks), *levels, marks[0].value)
    left, right = min(mark.sparsity for mark in marks), max(mark.sparsity for mark in marks)
    pad = 0.04 * (right - left) or 1.0
    figure.update_yaxes(log_axis(low, high))
    figure.update_layout(xaxis_range=[left - pad, right + pad], legend_traceorder="normal")
