"""Two goals against each other: KL divergence over perplexity, and the Pareto front of the trials."""

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import BEST, INK, UNIFORM, axis, faint, new_figure, rounded
from atp_tune.figures.trials import finite, role, told, uniform_of
from atp_tune.results.summary import Summary, kl_of, score_of


def draw(summary: Summary) -> go.Figure | None:
    """KL against perplexity on the search text; None for a study of one goal, and while no trial is measured."""
    front = finite(list(summary.front))
    if not front:
        return None
    figure = new_figure("Perplexity and KL divergence", "", "KL divergence, search text")
    figure.update_xaxes(axis("perplexity, search text"))
    numbers = {trial.number for trial in front}
    _add(figure, [t for t in finite(summary.trials) if t.number not in numbers], "other trials", INK)
    _add(figure, front, "Pareto front", BEST, mode="lines+markers", line={"color": BEST, "shape": "hv", "width": 1.5})
    uniform = uniform_of(summary)
    if uniform is not None:
        mark = {"symbol": "circle-open", "size": 15, "color": UNIFORM, "line": {"width": 2}}
        _add(figure, [uniform], role("uniform", uniform), UNIFORM, marker=mark, error_x=None, error_y=None)
    return figure


def _add(figure: go.Figure, trials: list[FrozenTrial], name: str, colour: str, **more: object) -> None:
    """Trials as points with their standard errors."""
    found = [(trial, score_of(trial), kl_of(trial)) for trial in trials]
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
            text=[told(trial) for trial, _, _ in both], hovertemplate="%{text}<extra></extra>", **look,
        )  # fmt: skip
