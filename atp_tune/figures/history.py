"""Figures over trials: values and the best so far, times, and two objectives against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import isfinite

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import (
    BEST,
    CYCLE,
    INK,
    UNIFORM,
    WORST,
    axis,
    axis_of,
    faint,
    finite,
    level,
    log_axis,
    new_figure,
    off_scale,
    range_of,
    role,
    rounded,
    set_range,
    show_accuracies,
    told,
    uniform_of,
    validation,
    value_of,
    written,
)
from atp_tune.figures.style import DENSE as GREY
from atp_tune.measures import KL, PERPLEXITY
from atp_tune.results.formatting import spent
from atp_tune.results.results import DENSE, is_uniform
from atp_tune.results.summary import Summary

MEANINGS = {"calibrate": "calibrate (statistics)", "prune": "prune", "evaluate": "evaluate (perplexity)"}


def draw_history(summary: Summary) -> go.Figure | None:
    """The objective against the trial's number; None while none is measured."""
    done = sorted(finite(summary.trials), key=lambda trial: trial.number)
    if not done:
        return None
    seen = range_of(done, None, summary.results.main.is_higher_better)
    figure = new_figure("How the search went", "trial", axis_of(summary))
    shown = [trial for trial in done if not seen.hides(trial)]
    figure.add_scatter(
        x=[trial.number for trial in shown], y=rounded(map(value_of, shown)), name="each trial", mode="markers",
        marker={"color": faint(INK, 0.6), "size": 6}, text=[told(trial, summary) for trial in shown],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[trial.number for trial in done], y=rounded(accumulate(map(value_of, done), min)), name="best so far",
        mode="lines", line={"color": BEST, "width": 2.5, "shape": "hv"},
        hovertemplate="best so far %{y:.5g}<extra></extra>",
    )  # fmt: skip
    uniform = uniform_of(summary)
    if uniform is not None:
        value = value_of(uniform)
        level(figure, value, f"uniform {written(uniform, summary)}{seen.arrow(value)}", UNIFORM)
    hidden = [f"trial {trial.number}: {off_scale(trial, summary)} ↑" for trial in done if seen.hides(trial)]
    set_range(seen, figure, hidden)
    show_accuracies(figure, summary, seen)
    return figure


def draw_seconds(summary: Summary) -> go.Figure | None:
    """Seconds per trial as stacked bars, trials in order; None while no trial has any."""
    timed = [trial for trial in summary.trials if spent(trial)]
    if not timed:
        return None
    figure = new_figure("Where the time goes", "trial", "time (s)")
    figure.update_layout(barmode="stack", bargap=0.15 if len(timed) < 60 else 0, legend_traceorder="normal")
    phases = [*MEANINGS, *sorted({phase for trial in timed for phase in spent(trial)} - set(MEANINGS))]
    for k, phase in enumerate(phases):
        values = rounded((spent(trial).get(phase, 0) for trial in timed), 4)
        if any(values):
            figure.add_bar(
                x=[trial.number for trial in timed], y=values, name=MEANINGS.get(phase, phase),
                marker={"color": CYCLE[k % len(CYCLE)], "line": {"width": 0}},
                hovertemplate=f"trial %{{x}}: {phase} %{{y:.3g}} s<extra></extra>",
            )  # fmt: skip
    if len(timed) < 10:
        figure.update_xaxes(dtick=1)
    return figure if figure.data else None


def draw_front(summary: Summary) -> go.Figure | None:
    """KL against perplexity on the validation text; None with one of them or without a measured trial."""
    front = finite(list(summary.front))
    if not front:
        return None
    figure = new_figure("Perplexity and KL divergence", "", f"KL divergence, {validation(summary)}")
    figure.update_xaxes(axis(f"perplexity, {validation(summary)}"))
    numbers = {trial.number for trial in front}
    _add_points(figure, summary, [t for t in finite(summary.trials) if t.number not in numbers], "other trials", INK)
    _add_points(
        figure,
        summary,
        front,
        "Pareto front",
        BEST,
        mode="lines+markers",
        line={"color": BEST, "shape": "hv", "width": 1.5},
    )
    uniform = uniform_of(summary)
    if uniform is not None:
        mark = {"symbol": "circle-open", "size": 15, "color": UNIFORM, "line": {"width": 2}}
        _add_points(
            figure, summary, [uniform], role("uniform", uniform), UNIFORM, marker=mark, error_x=None, error_y=None
        )
    return figure


def _add_points(
    figure: go.Figure, summary: Summary, trials: list[FrozenTrial], name: str, colour: str, **more: object
) -> None:
    """Trials as points with their standard errors."""
    score_of = partial(summary.results.score, text="validation")
    found = [(trial, score_of(trial, measure=PERPLEXITY), score_of(trial, measure=KL)) for trial in trials]
    both = [(trial, score, kl) for trial, score, kl in found if score and kl]
    bars = {"color": faint(colour, 0.6), "thickness": 1.2, "width": 0}
    look = {
        "mode": "markers",
        "marker": {"color": colour, "size": 8},
        "error_x": {"array": rounded((score.stderr for _, score, _ in both), 4), **bars},
        "error_y": {"array": rounded((kl.stderr for _, _, kl in both), 4), **bars},
        **more,
    }
    if both:
        figure.add_scatter(
            x=rounded(score.value for _, score, _ in both), y=rounded(kl.value for _, _, kl in both), name=name,
            text=[told(trial, summary) for trial, _, _ in both], hovertemplate="%{text}<extra></extra>", **look,
        )  # fmt: skip


# --- The figure of a study over an interval of sparsities: sparsity against perplexity, or KL.


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
