"""Figures of a study, drawn with Plotly from its summary alone: no torch, no model, also while the study runs.

Each figure is one module with a `draw(summary)` that gives None where there are no data for it yet.
"""

import plotly.graph_objects as go

from atp_tune.figures import error, front, perplexity, seconds, sparsity
from atp_tune.results.summary import Summary

__all__ = ["FIGURES", "draw"]

FIGURES = {
    "perplexity": perplexity.draw,
    "front": front.draw,
    "sparsity": sparsity.draw,
    "error": error.draw,
    "seconds": seconds.draw,
}


def draw(summary: Summary) -> dict[str, go.Figure]:
    """The figures for which the study has data, by name."""
    drawn = {name: make(summary) for name, make in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}
