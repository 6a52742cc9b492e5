"""The style of all figures: readable on light and dark pages, and small, since it uses no template.

The perplexity axis leaves out trials far above the median; labels name them instead.
"""

import statistics
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from math import inf, isfinite, log10
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.measures import PERPLEXITY
from atp_tune.results.formatting import plan_of
from atp_tune.results.results import is_uniform, levels_of, uniform_among
from atp_tune.results.summary import Summary
from atp_tune.storage.progress import ranked, sparsity_of, values_of

# --- The trials that figures show, and their labels.


def finite(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Measured trials with a finite, positive value, the lowest first."""
    return [trial for trial in ranked(trials) if isfinite(value_of(trial)) and value_of(trial) > 0]


def value_of(trial: FrozenTrial) -> float:
    """The first value that a trial's study minimises, such as its perplexity; NaN without a value."""
    return values_of(trial)[0] if trial.values else float("nan")


def axis_of(summary: Summary) -> str:
    """The title of an axis of that value."""
    return f"{summary.results.main.title}, {validation(summary)}"


def validation(summary: Summary) -> str:
    """What trials are measured on."""
    return f"validation {summary.results.data}"


def written(trial: FrozenTrial, summary: Summary) -> str:
    """The score of a trial that its study minimises, as text."""
    found = summary.results.score(trial, "validation", summary.results.main)
    return found.alone if found else ""


def off_scale(trial: FrozenTrial, summary: Summary) -> str:
    """The same, of a trial above the axis: perplexities are large there, and need no digits."""
    return f"{value_of(trial):.0f}" if summary.results.main is PERPLEXITY else written(trial, summary)


def best_of(summary: Summary) -> FrozenTrial | None:
    """The best trial, or the first that a figure can show."""
    shown = finite(summary.trials)
    return next((trial for trial in shown if trial == summary.best_trial), next(iter(shown), None))


def uniform_of(summary: Summary) -> FrozenTrial | None:
    """The first uniform trial of the best trial's pruner and sparsity, as the summary has it."""
    best = best_of(summary)
    shown = sorted(finite(summary.trials), key=lambda trial: trial.number)
    return uniform_among(shown, best) if best else None


def second_of(summary: Summary) -> FrozenTrial | None:
    """The best trial that is not uniform and has other sparsities than the best, with the same mean."""
    best = best_of(summary)
    levels = levels_of(best)
    others = (trial for trial in _beside_best(summary) if trial != best and not is_uniform(trial))
    return next((trial for trial in others if levels_of(trial) not in (None, levels)), None)


def worst_of(summary: Summary) -> FrozenTrial | None:
    """The trial with the highest value, if there are several with the target of the best."""
    done = _beside_best(summary)
    return done[-1] if len(done) > 1 else None


def _beside_best(summary: Summary) -> list[FrozenTrial]:
    best = best_of(summary)
    return [trial for trial in finite(summary.trials) if best and sparsity_of(trial) == sparsity_of(best)]


def told(trial: FrozenTrial, summary: Summary) -> str:
    """Number, plan and scores of a trial in two lines, for its hover text."""
    results = summary.results
    scores = ((by, results.score(trial, "validation", by)) for by in results.measures)
    said = ", ".join(f"{by.column} {found}" for by, found in scores if found or by is PERPLEXITY)
    return f"trial {trial.number}: {escape(plan_of(trial))}<br>{said}"


def role(name: str, trial: FrozenTrial) -> str:
    """The name of a trial in a legend."""
    return f"{name} (trial {trial.number})"


FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
# Contrast at least 3:1 against white and #14171c; distinguishable by colour-blind readers.
INK, BLUE, ORANGE, GREEN, PURPLE, GOLD, PINK = (
    "#76808c", "#2f7fd9", "#d1580f", "#14946c", "#a566c4", "#a97800", "#d6498a",
)  # fmt: skip
GRID, LINE = "rgba(128,136,148,0.22)", "rgba(128,136,148,0.55)"
BEST, UNIFORM, SECOND, WORST, DENSE = BLUE, ORANGE, GREEN, PURPLE, INK
CYCLE = (BLUE, GREEN, GOLD, PURPLE, PINK, ORANGE, INK)
DASHES = ("solid", "dash", "dot", "dashdot")  # after all colours: the same with another dash
PLUGINS = ("#0f8fa8", "#7a8f1f", "#8a6d5a")  # with the same contrast, and unlike those of the pruners that come along
PRUNERS = {"wanda": BLUE, "sparsegpt": GREEN, "magnitude": GOLD, "dsnot": PURPLE, "alps": PINK}
SYMBOLS = {"atp": "circle", "curve": "diamond", "uniform": "square"}
SMALL = 11  # px, of text within a figure
EXPLODES = 3  # times the median perplexity: trials above are hidden
NAMED = 2  # hidden trials that are named individually
FAR = 2  # factor between lowest trial and dense model beyond which the axis does not reach to dense
TICKS = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
FINE = [float(f"{digit}e{power}") for power in range(-6, 7) for digit in (1, 1.5, 2, 3, 4, 5, 6, 8)]


def new_figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure with the common layout; the legend is below the plot."""
    return go.Figure(
        layout={
            "template": "none",
            "title": {"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 10}},
            "title_font_size": 15,
            "font": {"family": FONT, "size": 12, "color": INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": LINE, "activecolor": INK},  # else a dark box over the data
            "height": 400,
            "margin": {"l": 60, "r": 14, "t": 44, "b": 44},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
            "hoverlabel": {"font": {"family": FONT}, "align": "left"},
            "xaxis": axis(x),
            "yaxis": axis(y),
        }
    )


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title, a faint grid and no line at zero."""
    look = {"gridcolor": GRID, "linecolor": LINE, "tickcolor": LINE, "zeroline": False, "automargin": True}
    return {"title": {"text": title, "standoff": 8}, **look, **more}


def log_axis(low: float, high: float) -> dict[str, Any]:
    """A log axis from `low` to `high`, with ticks of its own where Plotly's would be hard to read."""
    pad = 0.04 * log10(high / low) or 0.1
    wide = {"tickmode": "array", "tickvals": TICKS if high / low > 30 else FINE}
    ticks = wide if high / low > 2 else {}
    return {"type": "log", "range": [log10(low) - pad, log10(high) + pad], "tickformat": "~g", **ticks}


def level(figure: go.Figure, y: float, name: str, colour: str, dash: str = "dash") -> None:
    """A horizontal line over the whole width, with its name in the legend."""
    figure.add_shape(
        type="line", x0=0, x1=1, y0=y, y1=y, xref="paper", yref="y", layer="below", name=name, showlegend=True,
        line={"color": colour, "width": 1.5, "dash": dash},
    )  # fmt: skip


def colour_of(pruner: str) -> str:
    """The colour of a pruner, the same in all figures; of a plug-in, one of three by its name."""
    return PRUNERS.get(pruner) or PLUGINS[zlib.crc32(pruner.encode()) % len(PLUGINS)]


def error_bars(trials: Iterable[FrozenTrial], colour: str) -> dict[str, Any]:
    """The standard errors of trials, as fine bars."""
    errors = rounded((trial.user_attrs.get("stderr") or 0.0 for trial in trials), 4)
    return {"array": errors, "color": faint(colour, 0.6), "thickness": 1.2, "width": 0}


def faint(colour: str, opacity: float) -> str:
    """The colour `#rrggbb` with an opacity."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def rounded(values: Any, digits: int = 5) -> list[float]:
    """Numbers rounded to the digits that a figure can show, to keep its file small."""
    return [float(f"{value:.{digits}g}") for value in values]


@dataclass(frozen=True)
class AxisRange:
    """The perplexities that an axis shows, and the limit above which trials are hidden."""

    low: float
    high: float
    limit: float

    def hides(self, trial: FrozenTrial) -> bool:
        """Whether a trial is above the limit."""
        return value_of(trial) > self.limit

    def arrow(self, value: float) -> str:
        """` ↓` or ` ↑` for a value below or above the axis, else nothing."""
        return " ↓" if value < self.low else " ↑" if value > self.high else ""


def range_of(trials: list[FrozenTrial], dense: float | None, bounded: bool = False) -> AxisRange:
    """The range of all trials with their errors, without those above `EXPLODES` times the median.

    `bounded`: values, such as errors, are at most 1, and none is left out.
    """
    limit = inf if bounded else EXPLODES * statistics.median(value_of(trial) for trial in trials)
    shown = [trial for trial in trials if value_of(trial) <= limit]
    errors = [min(float(trial.user_attrs.get("stderr") or 0.0), value_of(trial) / 3) for trial in shown]
    low = min(value_of(trial) - error for trial, error in zip(shown, errors, strict=True))
    high = max(value_of(trial) + error for trial, error in zip(shown, errors, strict=True))
    if dense is not None and low / FAR <= dense < low:
        low = dense
    return AxisRange(low, high, limit)


def set_range(view: AxisRange, figure: go.Figure, labels: list[str]) -> None:
    """Sets the axis range, and writes labels of hidden trials above the plot."""
    figure.update_yaxes(log_axis(view.low, view.high))
    if not labels:
        return
    lines = labels[:NAMED] + ([f"and {len(labels) - NAMED} more ↑"] if len(labels) > NAMED else [])
    figure.update_layout(margin_t=44 + 14 * len(lines))
    figure.add_annotation(
        text="<br>".join(lines), x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
        align="left", showarrow=False, font={"size": SMALL},
    )  # fmt: skip


# --- Figures of studies by accuracy: drawn by the error that is minimised, then shown as accuracies in per cent.


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
