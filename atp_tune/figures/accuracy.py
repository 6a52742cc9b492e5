"""Figures of studies by accuracy: drawn by the error that is minimised, then shown as accuracies.

E = (k + ½) / (n + 1), k of n images wrong        accuracy = 100 % · (1 - k / n)
"""

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import AxisRange, rounded
from atp_tune.results.trials import is_by_accuracy


def show_accuracies(figure: go.Figure, trials: list[FrozenTrial], view: AxisRange) -> None:
    """Puts accuracies in per cent on the axis of errors, of as many images as the trials have.

    `view`: the errors that the axis shows. Where no trial tells the number of images, errors stay.
    """
    images = next((len(trial.user_attrs["misses"]) for trial in trials if is_by_accuracy(trial)), 0)
    if not images:
        return

    def accuracy(error: float) -> float:
        return 100 * (1 - ((images + 1) * error - 0.5) / images)

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


def error_of_dense(images: int, accuracy: float) -> float:
    """The error that such a figure draws for an accuracy, as of the dense model."""
    return (images * (1 - accuracy) + 0.5) / (images + 1)
