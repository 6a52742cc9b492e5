"""Figures of studies by accuracy: drawn by the error that is minimised, then shown as accuracies in per cent."""

import plotly.graph_objects as go

from atp_tune.figures.style import AxisRange, rounded
from atp_tune.results.summary import Summary


def show_accuracies(figure: go.Figure, summary: Summary, view: AxisRange) -> None:
    """Puts scores on an axis of minimised values where the two differ; `view`: the values that the axis shows."""
    main, images = summary.results.main, summary.results.counts.get("validation", 0)
    if not main.is_higher_better or not images:
        return

    def accuracy(error: float) -> float:
        return 100 * main.of_loss(error, images)

    for trace in figure.data:
        trace.y = rounded(map(accuracy, trace.y))
        if trace.error_y.array is not None:
            trace.error_y.array = rounded(100 * error for error in trace.error_y.array)
    for shape in figure.layout.shapes:
        if shape.yref == "y":
            shape.y0 = shape.y1 = accuracy(shape.y0)
    low, high = accuracy(view.high), accuracy(view.low)
    pad = 0.04 * (high - low) or 1.0
    figure.update_yaxes(
        type="linear", range=[low - pad, min(high + pad, 101)], tickmode="auto", tickformat="~g", ticksuffix=" %"
    )
