"""Figures over blocks: the sparsities of plans, and the error of the hidden states."""

from math import isfinite

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
    best_of,
    level,
    log_axis,
    new_figure,
    role,
    rounded,
    second_of,
    told,
    uniform_of,
    worst_of,
)
from atp_tune.plan import percent
from atp_tune.results.results import levels_of
from atp_tune.results.summary import Summary


def draw_sparsity(summary: Summary) -> go.Figure | None:
    """Sparsity, or bits, against block, in steps; None while no trial has one."""
    best, uniform, second = best_of(summary), uniform_of(summary), second_of(summary)
    shown = along(summary) or [
        ("best", best, BEST, "solid"),
        ("second best", second, SECOND, "dot"),
        ("uniform", None if uniform == best else uniform, UNIFORM, "solid"),
    ]
    figure = new_figure(summary.amount.title, _axis(summary), summary.amount.axis)
    for name, trial, colour, dash in shown:
        levels = levels_of(trial)
        if trial is None or not levels:
            continue
        figure.add_scatter(
            y=rounded(levels, 4), name=role(name, trial), mode="lines",
            line={"color": colour, "width": 2.5 if trial == best else 1.75, "dash": dash, "shape": "hvh"},
            hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{told(trial, summary)}<extra></extra>",
        )  # fmt: skip
    if not figure.data:
        return None
    target = summary.sparsity or summary.bits
    if uniform is None and isinstance(target, float):  # uniform would be the target in every block
        level(figure, target, f"target {target:g}", INK, "dot")
    values = [value for trace in figure.data for value in trace.y]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    blocks = max(len(trace.y) for trace in figure.data)
    return figure.update_layout(
        legend_traceorder="normal", xaxis_range=[-0.5, blocks - 0.5],
        yaxis_range=[max(0, min(values) - margin), min(summary.amount.top, max(values) + margin)],
    )  # fmt: skip


def draw_error(summary: Summary) -> go.Figure | None:
    """Relative error after each block on a log axis; None while no trial has one."""
    best, uniform, worst = best_of(summary), uniform_of(summary), worst_of(summary)
    shown = along(summary) or [
        ("best", best, BEST, "solid"),
        ("uniform", None if uniform == best else uniform, UNIFORM, "solid"),
        ("worst", None if worst == uniform else worst, WORST, "dot"),
    ]
    title = "Error of the hidden states after each block"
    figure = new_figure(title, _axis(summary), "error, relative to the dense model")
    for name, trial, colour, dash in shown:
        if trial is not None and any(_errors(trial)):
            figure.add_scatter(
                y=_errors(trial), name=role(name, trial), mode="lines+markers", marker={"size": 5},
                line={"color": colour, "width": 2.5 if trial == best else 1.75, "dash": dash},
                hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{told(trial, summary)}<extra></extra>",
            )  # fmt: skip
    values = [error for trace in figure.data for error in trace.y if error is not None]
    if not values:
        return None
    figure.update_yaxes(log_axis(min(values), max(values)))
    blocks = max(len(trace.y) for trace in figure.data)
    return figure.update_layout(legend_traceorder="normal", xaxis_range=[-0.5, blocks - 0.5])


def along(summary: Summary) -> list[tuple[str, FrozenTrial | None, str, str]]:
    """Names and looks of the plans of a front, one for each sparsity; [] for other studies."""
    return [
        (percent(point.sparsity), point.trial, CYCLE[k % len(CYCLE)], DASHES[k // len(CYCLE) % len(DASHES)])
        for k, point in enumerate(summary.choices)
    ]


def _axis(summary: Summary) -> str:
    """The title of the axis of blocks, which says how many of them are of a vision tower."""
    return f"block (0 to {summary.in_tower - 1}: vision tower)" if summary.in_tower else "block"


def _errors(trial: FrozenTrial) -> list[float | None]:
    """Errors by block; None for 0, as after a dense block, which a log axis cannot show."""
    errors = trial.user_attrs.get("errors") or []
    return [rounded([e], 4)[0] if isinstance(e, float) and e > 0 and isfinite(e) else None for e in errors]
