"""Figures over blocks, the sparsities of plans and the error of the hidden states; and figures of several studies."""

from collections.abc import Callable, Sequence
from html import escape
from math import isfinite
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import (
    BEST,
    CYCLE,
    DASHES,
    INK,
    SECOND,
    UNIFORM,
    WORST,
    Points,
    level,
    log_axis,
    new_figure,
    role,
    rounded,
)
from atp_tune.plan import percent
from atp_tune.results.results import levels_of
from atp_tune.results.summary import Summary

LONGEST = 40  # letters of a name in a legend
MARKS = ("circle", "diamond", "square", "triangle-down")  # after all colours


def draw_sparsity(summary: Summary) -> go.Figure | None:
    """Sparsity, or bits, against block, in steps; None while no trial has one."""
    points, amount = Points(summary), summary.amount

    def levels(trial: FrozenTrial) -> list[float]:
        return rounded(levels_of(trial) or [], 4)

    plans = [("best", points.best, BEST, "solid"), ("second best", points.second, SECOND, "dot"), _uniform(points)]
    figure = _along_blocks(points, new_figure(amount.title, "", amount.axis), levels, plans, {"shape": "hvh"})
    if figure is None:
        return None
    target = summary.sparsity or summary.bits
    if points.uniform is None and isinstance(target, float):  # uniform would be the target in every block
        level(figure, target, f"target {target:g}", INK, "dot")
    values = [value for trace in figure.data for value in trace.y]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    return figure.update_layout(yaxis_range=[max(0, min(values) - margin), min(amount.top, max(values) + margin)])


def draw_error(summary: Summary) -> go.Figure | None:
    """Relative error after each block on a log axis; None while no trial has one."""
    points = Points(summary)

    def errors(trial: FrozenTrial) -> list[float | None]:
        """None for 0, as after a dense block, which a log axis cannot show; [] without any."""
        found = trial.user_attrs.get("errors") or []
        shown = [rounded([e], 4)[0] if isinstance(e, float) and e > 0 and isfinite(e) else None for e in found]
        return shown if any(shown) else []

    worst = None if points.worst == points.uniform else points.worst
    plans = [("best", points.best, BEST, "solid"), _uniform(points), ("worst", worst, WORST, "dot")]
    empty = new_figure("Error of the hidden states after each block", "", "error, relative to the dense model")
    figure = _along_blocks(points, empty, errors, plans, {}, mode="lines+markers", marker={"size": 5})
    if figure is not None:
        values = [error for trace in figure.data for error in trace.y if error is not None]
        figure.update_yaxes(log_axis(min(values), max(values)))
    return figure


Shown = tuple[str, FrozenTrial | None, str, str]  # name, trial, colour and dash of a line


def _uniform(points: Points) -> Shown:
    return "uniform", None if points.uniform == points.best else points.uniform, UNIFORM, "solid"


def _along_blocks(
    points: Points,
    figure: go.Figure,
    values: Callable[[FrozenTrial], Sequence[Any]],
    plans: list[Shown],
    line: dict[str, Any],
    **look: Any,
) -> go.Figure | None:
    """Adds lines over blocks of these plans, or of a front's; None without any."""
    summary = points.summary
    chosen: list[Shown] = [
        (percent(point.sparsity), point.trial, CYCLE[k % len(CYCLE)], DASHES[k // len(CYCLE) % len(DASHES)])
        for k, point in enumerate(summary.choices)
    ]
    for name, trial, colour, dash in chosen or plans:
        if trial is not None and (found := values(trial)):
            own = {"color": colour, "width": 2.5 if trial == points.best else 1.75, "dash": dash, **line}
            figure.add_scatter(
                y=found, name=role(name, trial), line=own, **{"mode": "lines", **look},
                hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{points.told(trial)}<extra></extra>",
            )  # fmt: skip
    blocks = max((len(trace.y) for trace in figure.data), default=0)
    title = f"block (0 to {summary.in_tower - 1}: vision tower)" if summary.in_tower else "block"
    layout = {"xaxis_title_text": title, "xaxis_range": [-0.5, blocks - 0.5], "legend_traceorder": "normal"}
    return figure.update_layout(layout) if blocks else None


# --- Several studies in one figure.


def label(name: str) -> str:
    """A study's name, cut to fit a legend."""
    return escape(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…")


def sparsities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Sparsities of each study's best plan; None if fewer than two studies have one."""
    figure = new_figure("Sparsity of each block, best plans", "block", "sparsity (share of zeros)")
    for k, points in enumerate(map(Points, summaries)):
        if points.best is not None and points.summary.bits is None and (levels := levels_of(points.best)):
            figure.add_scatter(
                y=rounded(levels, 4), name=label(points.summary.name), mode="lines",
                line={"color": CYCLE[k % len(CYCLE)], "dash": DASHES[k // len(CYCLE) % 4], "width": 2, "shape": "hvh"},
                hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{points.told(points.best)}<extra></extra>",
            )  # fmt: skip
    return figure if len(figure.data) > 1 else None


def perplexities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Perplexity against β of studies of one model and text; None if fewer than two have trials with β."""
    figure = new_figure("Perplexity against β", "β, common difference per block", "perplexity, validation text")
    views = []
    for k, points in enumerate(map(Points, summaries)):
        is_there = "perplexity" in points.summary.objectives
        points.trials = [t for t in points.trials if is_there and "beta" in t.params and "sparsity" not in t.params]
        if points.trials:
            views.append(points.view())
            shown = [trial for trial in points.trials if points.value(trial) <= views[-1].top]
            shown.sort(key=lambda trial: float(trial.params["beta"]))
            betas, marks = rounded(trial.params["beta"] for trial in shown), {"symbol": MARKS[k // len(CYCLE) % 4]}
            points.add(figure, shown, betas, label(points.summary.name), CYCLE[k % len(CYCLE)], marker=marks)
    if len(views) < 2:
        return None
    return figure.update_yaxes(log_axis(min(seen.low for seen in views), max(seen.high for seen in views)))
