"""How the best plan shares the zeros out over the blocks, beside uniform and the second best."""

import plotly.graph_objects as go

from atp_tune.figures.style import BEST, INK, SECOND, UNIFORM, level, new_figure, rounded
from atp_tune.figures.trials import best_of, role, second_of, told, uniform_of
from atp_tune.results.summary import Summary


def draw(summary: Summary) -> go.Figure | None:
    """Sparsity against block, in steps; None while no trial has one."""
    best, uniform, second = best_of(summary), uniform_of(summary), second_of(summary)
    shown = [
        ("best", best, BEST, "solid"),
        ("second best", second, SECOND, "dot"),
        ("uniform", None if uniform == best else uniform, UNIFORM, "solid"),
    ]
    figure = new_figure("Sparsity of each block", "block", "sparsity (share of zeros)")
    for name, trial, colour, dash in shown:
        if trial is None or not trial.user_attrs.get("sparsities"):
            continue
        figure.add_scatter(
            y=rounded(trial.user_attrs["sparsities"], 4), name=role(name, trial), mode="lines",
            line={"color": colour, "width": 2.5 if name == "best" else 1.75, "dash": dash, "shape": "hvh"},
            hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{told(trial)}<extra></extra>",
        )  # fmt: skip
    if not figure.data:
        return None
    if uniform is None and summary.made_from is not None:  # uniform is the target in every block
        target = summary.made_from.study.sparsity
        level(figure, target, f"target {target:g}", INK, "dot")
    values = [value for trace in figure.data for value in trace.y]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    blocks = max(len(trace.y) for trace in figure.data)
    return figure.update_layout(
        legend_traceorder="normal", xaxis_range=[-0.5, blocks - 0.5],
        yaxis_range=[max(0, min(values) - margin), min(1, max(values) + margin)],
    )  # fmt: skip
