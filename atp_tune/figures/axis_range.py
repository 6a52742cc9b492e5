"""The part of the perplexity axis that is worth looking at: trials that explode are named, not drawn to scale."""

import statistics
from dataclasses import dataclass

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import SMALL, log_axis
from atp_tune.figures.trials import value_of

EXPLODES = 3  # times the median perplexity
NAMED = 2  # exploded trials that are named one by one
FAR = 2  # below the lowest trial by this factor, the dense model is not drawn to scale either


@dataclass(frozen=True)
class View:
    """An interval of perplexities that a figure shows, and the limit above which trials are hidden."""

    low: float
    high: float
    limit: float

    def hides(self, trial: FrozenTrial) -> bool:
        """Whether a trial explodes."""
        return value_of(trial) > self.limit

    def arrow(self, value: float) -> str:
        """Where a value lies that the view does not hold: ` ↓`, ` ↑`, or nothing where it does."""
        return " ↓" if value < self.low else " ↑" if value > self.high else ""


def view_of(trials: list[FrozenTrial], dense: float | None) -> View:
    """The view that holds all trials with their errors, but those above three times the median."""
    limit = EXPLODES * statistics.median(value_of(trial) for trial in trials)
    shown = [trial for trial in trials if value_of(trial) <= limit]
    errors = [min(float(trial.user_attrs.get("stderr") or 0.0), value_of(trial) / 3) for trial in shown]
    low = min(value_of(trial) - error for trial, error in zip(shown, errors, strict=True))
    high = max(value_of(trial) + error for trial, error in zip(shown, errors, strict=True))
    if dense is not None and low / FAR <= dense < low:
        low = dense
    return View(low, high, limit)


def apply(view: View, figure: go.Figure, labels: list[str]) -> None:
    """Sets the axis, and writes the labels of the hidden trials over its upper end, off the data."""
    figure.update_yaxes(log_axis(view.low, view.high))
    if not labels:
        return
    lines = labels[:NAMED] + ([f"and {len(labels) - NAMED} more ↑"] if len(labels) > NAMED else [])
    figure.update_layout(margin_t=44 + 14 * len(lines))
    figure.add_annotation(
        text="<br>".join(lines), x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
        align="left", showarrow=False, font={"size": SMALL},
    )  # fmt: skip
