"""The style of all figures, readable on light and dark pages and small without a template; and a study's points in it.

The axis of scores leaves out trials far above the median; labels name them instead.
"""

import statistics
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import inf, isfinite, log10
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.measures import PERPLEXITY, Estimate, Measure
from atp_tune.results.formatting import plan_words
from atp_tune.results.results import DENSE as DENSE_MODEL
from atp_tune.results.results import block_levels, is_uniform, uniform_among
from atp_tune.results.summary import Summary
from atp_tune.storage.progress import objective_values, ranked, target_sparsity

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
RING = {"symbol": "circle-open", "size": 17, "color": INK, "line": {"width": 2}}
SMALL = 11  # px, of text within a figure
EXPLODES = 3  # times the median score: trials above are hidden
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


def pruner_colour(pruner: str) -> str:
    """The colour of a pruner, the same in all figures; of a plug-in, one of three by its name."""
    return PRUNERS.get(pruner) or PLUGINS[zlib.crc32(pruner.encode()) % len(PLUGINS)]


def bars(errors: Iterable[float], colour: str) -> dict[str, Any]:
    """Standard errors as fine bars."""
    return {"array": rounded(errors, 4), "color": faint(colour, 0.6), "thickness": 1.2, "width": 0}


def faint(colour: str, opacity: float) -> str:
    """The colour `#rrggbb` with an opacity."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def rounded(values: Iterable[Any], digits: int = 5) -> list[float]:
    """Numbers rounded to the digits that a figure can show, to keep its file small."""
    return [float(f"{value:.{digits}g}") for value in values]


def role(name: str, trial: FrozenTrial) -> str:
    """The name of a trial in a legend."""
    return f"{name} (trial {trial.number})"


@dataclass(frozen=True)
class AxisRange:
    """The scores that an axis shows, and the `top` above which trials are hidden."""

    low: float
    high: float
    top: float

    def arrow(self, value: float) -> str:
        """` ↓` or ` ↑` for a value below or above the axis, else nothing."""
        return " ↓" if value < self.low else " ↑" if value > self.high else ""


class Points:
    """The trials of a study that figures can show, the best first, by the score that it minimises, or its error.

    main      the measure that the search minimises; of two, the first
    on        the text or images that trials are measured on
    axis      title of the axis of scores
    dense     score of the dense model
    best      the best trial, or the first that can be shown
    uniform   the first uniform trial of the best trial's pruner and sparsity, as the summary has it
    second    the best trial that is not uniform and has other sparsities than the best, with the same mean
    worst     the trial with the worst score, if there are several with the target of the best
    """

    def __init__(self, summary: Summary) -> None:
        self.summary, self.results, self.main = summary, summary.results, summary.results.main
        measured = ((trial, objective_values(trial)[:1]) for trial in ranked(summary.trials))
        self.trials = [trial for trial, values in measured if values and isfinite(values[0]) and values[0] > 0]
        self.on = f"validation {self.results.data}"
        self.axis = f"{self.main.title}, {self.on}"
        self.dense = self.results.score(DENSE_MODEL, "validation", self.main)
        shown = (trial for trial in self.trials if trial == summary.best_trial)
        self.best = best = next(shown, next(iter(self.trials), None))
        self.uniform = uniform_among(sorted(self.trials, key=lambda trial: trial.number), best) if best else None
        beside = [trial for trial in self.trials if best and target_sparsity(trial) == target_sparsity(best)]
        own = (None, block_levels(best))
        others = (trial for trial in beside if trial != best and not is_uniform(trial))
        self.second = next((trial for trial in others if block_levels(trial) not in own), None)
        self.worst = beside[-1] if len(beside) > 1 else None

    def score(self, trial: FrozenTrial, measure: Measure | None = None) -> Estimate:
        """The score of a trial; NaN where that is not known."""
        return self.results.score(trial, "validation", measure or self.main) or Estimate(value=float("nan"), stderr=0.0)

    def value(self, trial: FrozenTrial) -> float:
        """The score of a trial, without its error."""
        return self.score(trial).value

    def said(self, trial: FrozenTrial) -> str:
        """The score in a label: perplexities above the axis are large, and need no digits."""
        return f"{self.value(trial):.0f}" if self.main is PERPLEXITY else self.score(trial).alone

    def told(self, trial: FrozenTrial) -> str:
        """Number, plan and scores of a trial in two lines, for its hover text."""
        scores = ((by, self.results.score(trial, "validation", by)) for by in self.results.measures)
        text = ", ".join(f"{by.column} {score}" for by, score in scores if score or by is PERPLEXITY)
        return f"trial {trial.number}: {escape(plan_words(trial))}<br>{text}"

    def view(self, reach: Estimate | None = None) -> AxisRange:
        """The range of all trials with their errors, and of a score that it is to reach if that is near.

        Perplexities above `EXPLODES` times the median are left out.
        """
        scores = [self.score(trial) for trial in self.trials]
        is_bounded = self.main.is_higher_better
        top = inf if is_bounded else EXPLODES * statistics.median(score.value for score in scores)
        shown = [(score.value, min(score.stderr, score.value / 3)) for score in scores if score.value <= top]
        low, high = min(value - error for value, error in shown), max(value + error for value, error in shown)
        if reach is not None and is_bounded and high < reach.value <= high + FAR * (high - low):
            high = reach.value
        elif reach is not None and low / FAR <= reach.value < low:
            low = reach.value
        return AxisRange(low, high, top)

    def add(
        self, figure: go.Figure, trials: Sequence[FrozenTrial], x: Sequence[Any], name: str, colour: str, **look: Any
    ) -> None:
        """Adds trials at these places, with errors and hover texts; `look`: what else a trace has, or has instead."""
        scores = [self.score(trial) for trial in trials]
        marker = {"color": colour, "size": 8, **look.pop("marker", {})}
        usual = {
            "y": rounded(score.value for score in scores), "error_y": bars((score.stderr for score in scores), colour),
            "mode": "markers", "text": list(map(self.told, trials)), "hovertemplate": "%{text}<extra></extra>",
        }  # fmt: skip
        figure.add_scatter(x=x, name=name, marker=marker, **{**usual, **look})

    def ring(self, figure: go.Figure, trial: FrozenTrial, x: float | str, **look: Any) -> None:
        """Adds a ring around the best trial."""
        y = rounded([self.value(trial)])
        figure.add_scatter(x=[x], y=y, mode="markers", marker=RING, name=role("best", trial), hoverinfo="skip", **look)

    def compare(self, figure: go.Figure, seen: AxisRange, label: str = "uniform") -> None:
        """Adds a line at uniform."""
        if self.uniform is not None:
            score = self.score(self.uniform)
            level(figure, score.value, f"{label} {score.alone}{seen.arrow(score.value)}", UNIFORM)

    def set_axis(self, figure: go.Figure, low: float, high: float, hidden: Sequence[str] = ()) -> None:
        """Sets the axis of scores, and writes labels of hidden trials above the plot."""
        if self.main.is_higher_better:
            pad = 0.04 * (high - low) or 0.01
            figure.update_yaxes(range=[low - pad, min(high + pad, 1.01)], tickformat="~%")
        else:
            figure.update_yaxes(log_axis(low, high))
        if hidden:
            lines = [*hidden[:NAMED], *([f"and {len(hidden) - NAMED} more ↑"] if len(hidden) > NAMED else [])]
            figure.update_layout(margin_t=44 + 14 * len(lines))
            figure.add_annotation(
                text="<br>".join(lines), x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
                align="left", showarrow=False, font={"size": SMALL},
            )  # fmt: skip
