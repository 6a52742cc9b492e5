"""Plotly figures of a study, from its summary alone: they need neither torch nor the model.

Each is a function of the summary, or of its `Points`; it returns None while there are no data for it. All are readable
on light and dark pages, and small without a template. The axis of scores leaves out trials far above the median; labels
name them instead.
"""

import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from math import inf, isfinite, log10
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.allocations import Budget
from atp_tune.allocations.formulas import atp
from atp_tune.measures import KL, PERPLEXITY, Estimate, Measure
from atp_tune.plan import method_in, searched_by, target_in, target_words
from atp_tune.results.formatting import plan_words, spent
from atp_tune.results.results import DENSE, block_levels, is_uniform, uniform_among
from atp_tune.results.summary import Summary
from atp_tune.storage.progress import objective_values, ranked
from atp_tune.utils.registry import Table

# --- The style of all figures, and a study's points in it.

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
# Contrast at least 3:1 against white and #14171c; distinguishable by colour-blind readers.
INK, BLUE, ORANGE, GREEN, PURPLE, GOLD, PINK = (
    "#76808c", "#2f7fd9", "#d1580f", "#14946c", "#a566c4", "#a97800", "#d6498a",
)  # fmt: skip
GRID, LINE = "rgba(128,136,148,0.22)", "rgba(128,136,148,0.55)"
BEST, UNIFORM, SECOND, WORST = BLUE, ORANGE, GREEN, PURPLE
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


def bars(scores: Iterable[Estimate], colour: str) -> dict[str, Any]:
    """Standard errors as fine bars."""
    errors = rounded((score.stderr for score in scores), 4)
    return {"array": errors, "color": faint(colour, 0.6), "thickness": 1.2, "width": 0}


def faint(colour: str, opacity: float) -> str:
    """The colour `#rrggbb` with an opacity."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def rounded(values: Iterable[Any], digits: int = 5) -> list[float]:
    """Numbers rounded to the digits that a figure can show, to keep its file small."""
    return [float(f"{value:.{digits}g}") for value in values]


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
        self.dense = self.results.score(DENSE, "validation", self.main)
        shown = (trial for trial in self.trials if trial == summary.best_trial)
        self.best = best = next(shown, next(iter(self.trials), None))
        self.uniform = uniform_among(sorted(self.trials, key=lambda trial: trial.number), best)
        beside = [trial for trial in self.trials if best and target_in(trial.params) == target_in(best.params)]
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
        self, figure: go.Figure, trials: Sequence[FrozenTrial], x: Sequence[Any], name: str, colour: str,
        by: Measure | None = None, **look: Any,
    ) -> None:  # fmt: skip
        """Adds trials at these places, with errors and hover texts.

        `by`: another measure than the main one; `look`: what else a trace has, or has instead.
        """
        scores = [self.score(trial, by) for trial in trials]
        marker = {"color": colour, "size": 8, **look.pop("marker", {})}
        usual = {
            "y": rounded(score.value for score in scores), "error_y": bars(scores, colour),
            "mode": "markers", "text": list(map(self.told, trials)), "hovertemplate": "%{text}<extra></extra>",
        }  # fmt: skip
        figure.add_scatter(x=x, name=name, marker=marker, **{**usual, **look})

    def ring(self, figure: go.Figure, trial: FrozenTrial, x: float | str, **look: Any) -> None:
        """Adds a ring around the best trial."""
        y, name = rounded([self.value(trial)]), f"best (trial {trial.number})"
        figure.add_scatter(x=[x], y=y, mode="markers", marker=RING, name=name, hoverinfo="skip", **look)

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
            lines = [*hidden[:NAMED], *[f"and {len(hidden) - NAMED} more ↑"] * (len(hidden) > NAMED)]
            figure.update_layout(margin_t=44 + 14 * len(lines))
            figure.add_annotation(
                text="<br>".join(lines), x=0, y=1, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
                align="left", showarrow=False, font={"size": SMALL},
            )  # fmt: skip


# --- Figures over trials: scores against β, or of each allocation, in their order, against sparsity; times; the front.

PLAIN, LEGEND, LABELS = 380, 22, 70  # px of height: the plot, a row of its legend, slanted names below it
CURVE = ("beta", "mean", "low", "high")  # of the Gaussian process, per pruner
NEAR = 0.6  # of the width of the data: the axis title names bounds that are farther away
MEANINGS = {"calibrate": "calibrate (statistics)", "prune": "prune", "evaluate": "evaluate (perplexity)"}


@dataclass(frozen=True)
class Panel:
    """A panel of the figure of scores: its trials over β (axis x), or by allocation where they have none (x2)."""

    axis: str
    trials: list[FrozenTrial]

    def at(self, trial: FrozenTrial) -> float | str:
        """The place of a trial."""
        return rounded([_beta(trial)])[0] if self.axis == "x" else _allocation(trial)

    def label(self, trial: FrozenTrial) -> str:
        """The place of a trial, in words."""
        return f"β = {_beta(trial):.4f}" if self.axis == "x" else _allocation(trial)


def draw_perplexity(points: Points) -> go.Figure | None:
    """The objective on the validation text against β; None while none is measured."""
    summary = points.summary
    if not points.trials:
        return None
    seen, main = points.view(points.dense), points.main
    # Uniform has β = 0 if any other trial has one.
    has_beta = any("beta" in trial.params for trial in points.trials)
    over = [trial for trial in points.trials if has_beta and ("beta" in trial.params or is_uniform(trial))]
    panels = [Panel("x", over), Panel("x2", [trial for trial in points.trials if trial not in over])]
    name = main.title[0].upper() + main.title[1:]
    figure = new_figure(f"{name} against β" if over else f"{name} of each allocation", "", points.axis)
    _set_axes(figure, summary, *panels)
    if over:
        add_gp_posterior(figure, summary.gp_posterior, points)
    # A trace for each pruner (and allocation, if several have β) in each panel; trials above the axis are arrows.
    several, pruners = len({_allocation(trial) for trial in over if not is_uniform(trial)}) > 1, set()
    for panel in panels:
        for (pruner, allocation), group in _grouped(panel.trials, several and panel.axis == "x").items():
            shown = [trial for trial in group if points.value(trial) <= seen.top]
            title, colour = f"{pruner}, {allocation}" if allocation else pruner, pruner_colour(pruner)
            points.add(
                figure, shown, list(map(panel.at, shown)), escape(title), colour, xaxis=panel.axis, legendgroup=title,
                showlegend=panel.axis == "x" or pruner not in pruners,
                marker={"symbol": SYMBOLS.get(allocation or "atp", "circle")},
            )  # fmt: skip
            pruners.add(pruner)
            if above := [trial for trial in group if trial not in shown]:
                points.add(
                    figure, above, list(map(panel.at, above)), "off the scale", colour, y=[seen.high] * len(above),
                    error_y=None, showlegend=False, xaxis=panel.axis, marker={"size": 11, "symbol": "triangle-up"},
                )  # fmt: skip
    # Lines at uniform and dense, and a ring around the best.
    methods = {method_in(trial.params) for trial in summary.trials}
    if best := summary.best_trial:
        points.compare(figure, seen, f"uniform, {method_in(best.params)}" if len(methods) > 1 else "uniform")
    if points.dense is not None:
        level(figure, points.dense.value, f"dense {points.dense.alone}{seen.arrow(points.dense.value)}", INK, "dot")
    first = points.trials[0]
    panel = panels[first not in over]
    points.ring(figure, first, panel.at(first), xaxis=panel.axis)
    entries = sum(item.showlegend is not False for item in (*figure.data, *figure.layout.shapes))
    figure.update_layout(height=PLAIN + LEGEND * -(-entries // 3) + LABELS * all(panel.trials for panel in panels))
    hidden = [
        f"{panels[trial not in over].label(trial)}: {points.said(trial)} ↑"
        for trial in points.trials
        if points.value(trial) > seen.top
    ]
    points.set_axis(figure, seen.low, seen.high, hidden)
    return figure


def _set_axes(figure: go.Figure, summary: Summary, over: Panel, others: Panel) -> None:
    """Sets the axes of β and of allocations, and draws admissible bounds that are near the data."""
    names = sorted({_allocation(trial) for trial in others.trials})
    strip = min(0.4, 0.06 + 0.07 * len(names)) if names and over.trials else float(bool(names))
    if names:
        listed = {"type": "category", "categoryarray": names, "range": [-0.6, len(names) - 0.4], "tickangle": -90}
        title = "" if over.trials else "allocation"
        figure.update_layout(xaxis2=axis(title, **listed, domain=[1 - strip, 1], anchor="y"))
    if not over.trials:
        figure.update_xaxes(visible=False, selector={"domain": None})
        return
    figure.update_xaxes(domain=[0, 1 - strip - (0.03 if strip else 0)], selector={"domain": None})
    betas = [_beta(trial) for trial in over.trials]
    low, high = min(betas), max(betas)
    span, title = high - low, "β, difference per block" if names else "β, common difference per block"
    near = (low - NEAR * span, high + NEAR * span) if span else (-inf, inf)
    # The admissible interval of β, if the study stores what it depends on.
    file, sizes = summary.made_from, summary.sizes
    bounds = atp.bounds(Budget(file.study.highest, sizes))["beta"] if file and sizes else (0.0, 0.0)
    drawn = [bound for bound in bounds if bound and (bound > 0 or low < 0) and near[0] <= bound <= near[1]]
    for k, bound in enumerate(sorted(drawn, reverse=True)):
        figure.add_shape(
            type="line", x0=bound, x1=bound, y0=0, y1=1, xref="x", yref="paper", layer="below",
            name=f"admissible bound{' ±' if len(drawn) > 1 else ' '}{abs(bound):.4f}",
            showlegend=not k, line={"color": INK, "width": 1.5, "dash": "longdashdot"},
        )  # fmt: skip
    if bounds[1] and not drawn:
        title += f" (admissible up to {bounds[1]:.4f})"
    low, high = min([low, *drawn]), max([high, *drawn])
    pad = 0.04 * (high - low) or span or 0.01
    figure.update_layout(xaxis_title_text=title, xaxis_range=[low - pad, high + pad])


def _grouped(trials: list[FrozenTrial], apart: bool) -> dict[tuple[str, str], list[FrozenTrial]]:
    groups = dict[tuple[str, str], list[FrozenTrial]]()
    for trial in sorted(trials, key=_beta):
        groups.setdefault((method_in(trial.params), _allocation(trial) if apart else ""), []).append(trial)
    return dict(sorted(groups.items()))


def _beta(trial: FrozenTrial) -> float:
    return float(trial.params.get("beta", 0.0))


def _allocation(trial: FrozenTrial) -> str:
    return escape(str(trial.params.get("allocation", "atp" if "beta" in trial.params else "uniform")))


def add_gp_posterior(figure: go.Figure, posterior: Any, points: Points) -> None:
    """Adds a line and a translucent band per pruner; skips curves that are incomplete."""
    curves = (posterior or {}).get("curves")
    images = points.results.counts.get("validation", 1)
    for pruner, curve in curves.items() if isinstance(curves, dict) else ():
        try:  # a whole curve has four equally long lists of numbers, positive where a log axis shows them
            rows = list(zip(*(curve[part] for part in CURVE), strict=True))
            is_whole = bool(rows) and all(all(map(isfinite, row)) and min(row[1:]) > 0 for row in rows)
        except (TypeError, ValueError, KeyError):
            is_whole = False
        if not is_whole:
            continue
        beta, *losses = (rounded(values, 4) for values in zip(*rows, strict=True))
        mean, low, high = (rounded(points.main.of_loss(value, images) for value in values) for values in losses)
        colour, group = pruner_colour(str(pruner)), f"belief {pruner}"
        note = f" after {posterior['before']} trials" if isinstance(posterior.get("before"), int) else ""
        figure.add_scatter(
            x=beta + beta[::-1], y=high + low[::-1], fill="toself", fillcolor=faint(colour, 0.14), name="band",
            line={"width": 0, "color": colour}, mode="lines", hoverinfo="skip", showlegend=False, legendgroup=group,
        )  # fmt: skip
        figure.add_scatter(
            x=beta, y=mean, mode="lines", line={"color": colour, "width": 1.2}, legendgroup=group,
            name=f"GP{note}, {pruner} (± 2 sd)", hovertemplate=f"β = %{{x:.4f}}: %{{y:.2f}}{note}<extra></extra>",
        )  # fmt: skip


def draw_history(summary: Summary) -> go.Figure | None:
    """The objective against the trial's number; None while none is measured."""
    points = Points(summary)
    if not points.trials:
        return None
    seen, done = points.view(), sorted(points.trials, key=lambda trial: trial.number)
    figure = new_figure("How the search went", "trial", points.axis)
    shown = [trial for trial in done if points.value(trial) <= seen.top]
    mark = {"size": 6, "color": faint(INK, 0.6)}
    points.add(figure, shown, [trial.number for trial in shown], "each trial", INK, marker=mark, error_y=None)
    figure.add_scatter(
        x=[trial.number for trial in done], mode="lines", line={"color": BEST, "width": 2.5, "shape": "hv"},
        y=rounded(accumulate(map(points.value, done), max if points.main.is_higher_better else min)),
        name="best so far", hovertemplate="best so far %{y:.5g}<extra></extra>",
    )  # fmt: skip
    points.compare(figure, seen)
    hidden = [f"trial {trial.number}: {points.said(trial)} ↑" for trial in done if trial not in shown]
    points.set_axis(figure, seen.low, seen.high, hidden)
    return figure


def draw_seconds(points: Points) -> go.Figure | None:
    """Seconds per trial as stacked bars, trials in order; None while no trial has any."""
    timed = [trial for trial in points.summary.trials if spent(trial)]
    if not timed:
        return None
    figure = new_figure("Where the time goes", "trial", "time (s)")
    figure.update_layout(barmode="stack", bargap=0.15 if len(timed) < 60 else 0, legend_traceorder="normal")
    phases = [*MEANINGS, *sorted({phase for trial in timed for phase in spent(trial)} - set(MEANINGS))]
    for k, phase in enumerate(phases):
        values = rounded((spent(trial).get(phase, 0) for trial in timed), 4)
        if any(values):
            figure.add_bar(
                x=[trial.number for trial in timed], y=values, name=MEANINGS.get(phase, phase),
                marker={"color": CYCLE[k % len(CYCLE)], "line": {"width": 0}},
                hovertemplate=f"trial %{{x}}: {phase} %{{y:.3g}} s<extra></extra>",
            )  # fmt: skip
    if len(timed) < 10:
        figure.update_xaxes(dtick=1)
    return figure if figure.data else None


def draw_front(points: Points) -> go.Figure | None:
    """KL against perplexity on the validation text; None with one of them or without a measured trial."""
    best = {trial.number for trial in points.summary.front}
    if not any(trial.number in best for trial in points.trials):
        return None
    figure = new_figure("Perplexity and KL divergence", "", f"KL divergence, {points.on}")
    figure.update_xaxes(axis(f"perplexity, {points.on}"))

    def add(trials: list[FrozenTrial], name: str, colour: str, **look: Any) -> None:
        """Trials with both scores, as points with both errors."""
        both = [trial for trial in trials if all(isfinite(points.score(trial, by).value) for by in (PERPLEXITY, KL))]
        scores = [points.score(trial, PERPLEXITY) for trial in both]
        if both:
            x = rounded(score.value for score in scores)
            points.add(figure, both, x, name, colour, KL, **{"error_x": bars(scores, colour), **look})

    add([trial for trial in points.trials if trial.number not in best], "other trials", INK)
    optimal = [trial for trial in points.trials if trial.number in best]
    add(optimal, "Pareto front", BEST, mode="lines+markers", line={"color": BEST, "shape": "hv", "width": 1.5})
    if (uniform := points.uniform) is not None:
        mark = {"symbol": "circle-open", "size": 15, "line": {"width": 2}}
        add([uniform], f"uniform (trial {uniform.number})", UNIFORM, marker=mark, error_x=None, error_y=None)
    return figure


def draw_points(points: Points) -> go.Figure | None:
    """Scores on the validation text against the sparsity, or the bits; None at one of them, or without a point."""
    summary, main = points.summary, points.main
    by_number = {trial.number: trial for trial in points.trials}
    shown = [by_number[point.trial.number] for point in summary.points if point.trial.number in by_number]
    if not shown:
        return None
    beside = (points.results.uniform(point.trial) for point in summary.points)
    around = [by_number[number] for number in {trial.number for trial in beside if trial} if number in by_number]
    by = searched_by(summary.points[0].target)
    figure = new_figure(f"{by.name.capitalize()} and {main.title}", by.axis, points.axis)

    def at(trial: FrozenTrial) -> float:
        return round(by.unit[0] * float(trial.params[by.name]), 4)

    plans = shown if summary.choices else [trial for trial in shown if not is_uniform(trial)]
    searched = "best plans" if summary.choices else "searched"
    for trials, name, colour, symbol, dash in (
        (around, "uniform", UNIFORM, "square", "dot"), (plans, searched, BEST, "circle", "solid"),
    ):  # fmt: skip
        if trials:
            trials.sort(key=lambda trial: (at(trial), trial.number))
            points.add(
                figure, trials, list(map(at, trials)), name, colour, mode="lines+markers", marker={"symbol": symbol},
                line={"color": colour, "width": 1.5, "dash": dash},
            )  # fmt: skip
    if (best := summary.best_trial) in shown:
        points.ring(figure, best, at(best))
    # Lines at the dense model and the limit, as far as the axis has them.
    limit, dense = None, None if main.is_higher_better or points.dense is None else points.dense.value
    for key, value in (summary.limit or {}).items():
        if not isinstance(value, Mapping) and key in ("max_increase", f"max_{main.name}"):
            limit = value if key != "max_increase" else (1 + value) * dense if dense else None
    ends = list[float]()  # the axes take in all of it
    for y, name, colour, dash in ((dense, "dense", INK, "dot"), (limit, "limit", WORST, "dash")):
        if y is not None:
            level(figure, y, f"{name} {main.written(y)}", colour, dash)
            ends.append(y)
    for score in map(points.score, (*shown, *around)):
        ends += [score.value - min(score.stderr, score.value / 3), score.value + score.stderr]
    points.set_axis(figure, min(ends), max(ends))
    positions = list(map(at, (*shown, *around)))
    pad = 0.04 * (max(positions) - min(positions)) or 1.0
    figure.update_layout(xaxis_range=[min(positions) - pad, max(positions) + pad], legend_traceorder="normal")
    return figure


# --- Figures over blocks, the sparsities of plans and the error of the hidden states; and figures of several studies.

LONGEST = 40  # letters of a name in a legend
MARKS = ("circle", "diamond", "square", "triangle-down")  # after all colours


def draw_sparsity(points: Points) -> go.Figure | None:
    """Sparsity, or bits, against block, in steps; None while no trial has one."""
    summary, amount = points.summary, points.summary.amount

    empty = new_figure(amount.title, "", amount.axis)
    figure = _along_blocks(
        points, empty, lambda trial: rounded(block_levels(trial) or [], 4), {"shape": "hvh"}, second=points.second
    )
    if figure is None:
        return None
    target = summary.sparsity or summary.bits
    if points.uniform is None and isinstance(target, float):  # uniform would be the target in every block
        level(figure, target, f"target {target:g}", INK, "dot")
    values = [value for trace in figure.data for value in trace.y]
    margin = max(0.02, 0.05 * (max(values) - min(values)))
    return figure.update_layout(yaxis_range=[max(0, min(values) - margin), min(amount.top, max(values) + margin)])


def draw_error(points: Points) -> go.Figure | None:
    """Relative error after each block on a log axis; None while no trial has one."""

    def errors(trial: FrozenTrial) -> list[float | None]:
        """None for 0, as after a dense block, which a log axis cannot show; [] without any."""
        numbers = trial.user_attrs.get("errors") or []
        shown = [rounded([e], 4)[0] if e > 0 and isfinite(e) else None for e in numbers]
        return shown if any(shown) else []

    worst = None if points.worst == points.uniform else points.worst
    empty = new_figure("Error of the hidden states after each block", "", "error, relative to the dense model")
    figure = _along_blocks(points, empty, errors, {}, worst=worst, mode="lines+markers", marker={"size": 5})
    if figure is not None:
        values = [error for trace in figure.data for error in trace.y if error is not None]
        figure.update_yaxes(log_axis(min(values), max(values)))
    return figure


def _along_blocks(
    points: Points, figure: go.Figure, values: Callable[[FrozenTrial], Sequence[Any]], line: Table,
    second: FrozenTrial | None = None, worst: FrozenTrial | None = None, **look: Any,
) -> go.Figure | None:  # fmt: skip
    """Adds lines over blocks of the best plan, uniform and these, or of a front's plans; None without any."""
    summary, uniform = points.summary, None if points.uniform == points.best else points.uniform
    plans = (
        ("best", points.best, BEST, "solid"), ("second best", second, SECOND, "dot"),
        ("uniform", uniform, UNIFORM, "solid"), ("worst", worst, WORST, "dot"),
    )  # fmt: skip
    chosen = [
        (target_words(point.target), point.trial, CYCLE[k % len(CYCLE)], DASHES[k // len(CYCLE) % len(DASHES)])
        for k, point in enumerate(summary.choices)
    ]
    for name, trial, colour, dash in chosen or plans:
        if trial is not None and (heights := values(trial)):
            own = {"color": colour, "width": 2.5 if trial == points.best else 1.75, "dash": dash, **line}
            _add_line(figure, points, trial, heights, f"{name} (trial {trial.number})", own, **look)
    blocks = max((len(trace.y) for trace in figure.data), default=0)
    title = f"block (0 to {summary.in_tower - 1}: vision tower)" if summary.in_tower else "block"
    layout = {"xaxis_title_text": title, "xaxis_range": [-0.5, blocks - 0.5], "legend_traceorder": "normal"}
    return figure.update_layout(layout) if blocks else None


def _add_line(
    figure: go.Figure, points: Points, trial: FrozenTrial, heights: Sequence[Any], name: str, line: Table, **look: Any
) -> None:
    text = f"block %{{x}}: %{{y:.4f}}<br>{points.told(trial)}<extra></extra>"
    figure.add_scatter(y=heights, name=name, line=line, hovertemplate=text, **{"mode": "lines", **look})


# --- Several studies in one figure.


def label(name: str) -> str:
    """A study's name, cut to fit a legend."""
    return escape(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…")


def sparsities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Sparsities of each study's best plan; None if fewer than two studies have one."""
    figure = new_figure("Sparsity of each block, best plans", "block", "sparsity (share of zeros)")
    for k, points in enumerate(map(Points, summaries)):
        if points.best is not None and points.summary.amount.top == 1 and (levels := block_levels(points.best)):
            line = {"color": CYCLE[k % len(CYCLE)], "dash": DASHES[k // len(CYCLE) % 4], "width": 2, "shape": "hvh"}
            _add_line(figure, points, points.best, rounded(levels, 4), label(points.summary.name), line)
    return figure if len(figure.data) > 1 else None


def perplexities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Perplexity against β of studies of one model and text; None if fewer than two have trials with β."""
    figure = new_figure("Perplexity against β", "β, common difference per block", "perplexity, validation text")
    views = []
    for k, points in enumerate(map(Points, summaries)):
        is_there = "perplexity" in points.results.objectives
        points.trials = [t for t in points.trials if is_there and "beta" in t.params and target_in(t.params) is None]
        if points.trials:
            views.append(points.view())
            shown = [trial for trial in points.trials if points.value(trial) <= views[-1].top]
            shown.sort(key=lambda trial: float(trial.params["beta"]))
            betas, marks = rounded(trial.params["beta"] for trial in shown), {"symbol": MARKS[k // len(CYCLE) % 4]}
            points.add(figure, shown, betas, label(points.summary.name), CYCLE[k % len(CYCLE)], marker=marks)
    if len(views) < 2:
        return None
    return figure.update_yaxes(log_axis(min(seen.low for seen in views), max(seen.high for seen in views)))


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
    points = Points(summary)
    return {name: figure for name in summary.goal.figures if (figure := FIGURES[name](points)) is not None}
