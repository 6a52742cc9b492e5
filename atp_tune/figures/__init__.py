"""Plotly figures of a study, from its summary alone: they need neither torch nor the model.

Each is a function of the summary; it returns None while there are no data for it.
"""

import plotly.graph_objects as go

from atp_tune.figures.blocks import draw_error, draw_sparsity
from atp_tune.figures.trials import draw_front, draw_perplexity, draw_points, draw_seconds
from atp_tune.results.summary import Summary

__all__ = ["FIGURES", "draw"]

FIGURES = {
    "perplexity": draw_perplexity,
    "front": draw_front,
    "points": draw_points,
    "sparsity": draw_sparsity,
    "error": draw_error,
    "seconds": draw_seconds,
}


def draw(summary: Summary) -> dict[str, go.Figure]:
    """The figures that have data, by name."""
    drawn = {name: FIGURES[name](summary) for name in summary.goal.figures}
    return {name: figure for name, figure in drawn.items() if figure is not None}
