"""Perplexity, KL or accuracy against β: measured trials, the search's Gaussian process, lines at uniform and dense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import inf, isfinite
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.allocations import Budget, atp
from atp_tune.figures.style import (
    CYCLE,
    DASHES,
    INK,
    SYMBOLS,
    UNIFORM,
    AxisRange,
    axis,
    axis_of,
    best_of,
    colour_of,
    error_bars,
    faint,
    finite,
    level,
    log_axis,
    new_figure,
    off_scale,
    range_of,
    role,
    rounded,
    set_range,
    show_accuracies,
    told,
    uniform_of,
    value_of,
    written,
)
from atp_tune.figures.style import (
    DENSE as GREY,
)
from atp_tune.plan import method_in
from atp_tune.results.results import DENSE, is_uniform, levels_of
from atp_tune.results.summary import Summary

PLAIN, LEGEND, LABELS = 380, 22, 70  # px of height: the plot, a row of its legend, slanted names below it
CURVE = ("beta", "mean", "low", "high")  # of the Gaussian process, per pruner
NEAR = 0.6  # of the width of the data: the axis title names bounds that are farther away


@dataclass(frozen=True)
class Panels:
    """The trials of two panels: over β, and by allocation for those without β."""

    over_beta: list[FrozenTrial]
    others: list[FrozenTrial]


def draw_perplexity(summary: Summary) -> go.Figure | None:
    """The objective on the validation text against β; None while none is measured."""
    done = finite(summary.trials)
    if not done:
        return None
    results, main = summary.results, summary.results.main
    known = results.score(DENSE, "validation", main)
    dense = main.loss_of(known.value, results.counts.get("validation", 1)) if known else None
    seen, panels = range_of(done, dense, main.is_higher_better), split(done)
    name = main.title[0].upper() + main.title[1:]
    title = f"{name} against β" if panels.over_beta else f"{name} of each allocation"
    figure = new_figure(title, "", axis_of(summary))
    _set_axes(figure, panels, bounds_of(summary))
    if panels.over_beta:
        add_gp_posterior(figure, summary.gp_posterior)
    _add_trials(figure, summary, panels, seen)
    uniform, best = uniform_of(summary), summary.best_trial
    if uniform is not None and best:
        several = len({method_in(trial.params) for trial in summary.trials}) > 1
        label = f"uniform, {method_in(best.params)}" if several else "uniform"
        value = value_of(uniform)
        level(figure, value, f"{label} {written(uniform, summary)}{seen.arrow(value)}", UNIFORM)
    if dense is not None and known:
        level(figure, dense, f"dense {known.alone}{seen.arrow(dense)}", GREY, "dot")
    _mark(figure, done[0], panels)
    entries = sum(item.showlegend is not False for item in (*figure.data, *figure.layout.shapes))
    figure.update_layout(height=PLAIN + LEGEND * -(-entries // 3) + LABELS * bool(panels.over_beta and panels.others))
    set_range(seen, figure, [f"{_place(t, panels)}: {off_scale(t, summary)} ↑" for t in done if seen.hides(t)])
    show_accuracies(figure, summary, seen)
    return figure


def split(trials: list[FrozenTrial]) -> Panels:
    """Trials with and without β; uniform has β = 0 if any other trial has one."""
    if not any("beta" in trial.params for trial in trials):
        return Panels([], trials)
    over_beta = [trial for trial in trials if _has_beta(trial)]
    return Panels(over_beta, [trial for trial in trials if not _has_beta(trial)])


def bounds_of(summary: Summary) -> tuple[float, float] | None:
    """The admissible interval of β, if the study stores what it depends on."""
    study = summary.made_from.study if summary.made_from else None
    if study is None or not summary.sizes:
        return None
    found = atp.bounds(Budget(study.highest, summary.sizes))["beta"]
    return found if found[1] > 0 else None


def _set_axes(figure: go.Figure, panels: Panels, bounds: tuple[float, float] | None) -> None:
    names = sorted({_allocation(trial) for trial in panels.others})
    strip = min(0.4, 0.06 + 0.07 * len(names)) if names and panels.over_beta else float(bool(names))
    end = 1 - strip - (0.03 if strip else 0)
    if names:
        listed = {"type": "category", "categoryarray": names, "range": [-0.6, len(names) - 0.4], "tickangle": -90}
        figure.update_layout(
            xaxis2=axis("" if panels.over_beta else "allocation", **listed, domain=[1 - strip, 1], anchor="y")
        )
    if panels.over_beta:
        figure.update_xaxes(domain=[0, end], selector={"domain": None})
        # Sets the axis of β, and draws admissible bounds that are near the data.
        betas = [_beta(trial) for trial in panels.over_beta]
        alone = not names
        low, high = min(betas), max(betas)
        span, title = high - low, "β, common difference per block" if alone else "β, difference per block"
        near = (low - NEAR * span, high + NEAR * span) if span else (-inf, inf)
        drawn = [bound for bound in bounds or () if (bound > 0 or low < 0) and near[0] <= bound <= near[1]]
        for k, bound in enumerate(sorted(drawn, reverse=True)):
            figure.add_shape(
                type="line", x0=bound, x1=bound, y0=0, y1=1, xref="x", yref="paper", layer="below",
                name=f"admissible bound{' ±' if len(drawn) > 1 else ' '}{abs(bound):.4f}",
                showlegend=not k, line={"color": INK, "width": 1.5, "dash": "longdashdot"},
            )  # fmt: skip
        if bounds and not drawn:
            title += f" (admissible up to {bounds[1]:.4f})"
        low, high = min([low, *drawn]), max([high, *drawn])
        pad = 0.04 * (high - low) or span or 0.01
        figure.update_layout(xaxis_title_text=title, xaxis_range=[low - pad, high + pad])
    else:
        figure.update_xaxes(visible=False, selector={"domain": None})


def _add_trials(figure: go.Figure, summary: Summary, panels: Panels, seen: AxisRange) -> None:
    """Adds a trace per pruner (and allocation, if several have β) to each panel."""
    several = len({_allocation(trial) for trial in panels.over_beta if not is_uniform(trial)}) > 1
    named = set()
    for axis_name, trials, apart in (("x", panels.over_beta, several), ("x2", panels.others, False)):
        for (pruner, allocation), group in _grouped(trials, apart):
            shown = [trial for trial in group if not seen.hides(trial)]
            name = f"{pruner}, {allocation}" if allocation else pruner
            figure.add_scatter(
                x=[_position(trial, axis_name) for trial in shown], y=rounded(map(value_of, shown)),
                name=escape(name), legendgroup=name, showlegend=axis_name == "x" or pruner not in named,
                xaxis=axis_name, **_look(summary, pruner, allocation or "atp", shown),
            )  # fmt: skip
            named.add(pruner)
            _add_hidden(figure, summary, [trial for trial in group if seen.hides(trial)], axis_name, seen)


def _grouped(trials: list[FrozenTrial], apart: bool) -> Iterator[tuple[tuple[str, str], list[FrozenTrial]]]:
    def key(trial: FrozenTrial) -> tuple[str, str]:
        return method_in(trial.params), _allocation(trial) if apart else ""

    for name, group in groupby(sorted(trials, key=key), key=key):
        yield name, sorted(group, key=_beta)


def _look(summary: Summary, pruner: str, allocation: str, trials: list[FrozenTrial]) -> dict[str, Any]:
    """Markers, error bars and hover texts."""
    colour = colour_of(pruner)
    return {
        "mode": "markers",
        "marker": {"color": colour, "size": 8, "symbol": SYMBOLS.get(allocation, "circle")},
        "error_y": error_bars(trials, colour),
        "text": [told(trial, summary) for trial in trials],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _add_hidden(
    figure: go.Figure, summary: Summary, trials: list[FrozenTrial], axis_name: str, seen: AxisRange
) -> None:
    """Adds trials above the axis range as arrows at its upper end."""
    if trials:
        figure.add_scatter(
            x=[_position(trial, axis_name) for trial in trials], y=[seen.high] * len(trials), mode="markers",
            marker={"color": colour_of(method_in(trials[0].params)), "size": 11, "symbol": "triangle-up"},
            text=[told(trial, summary) for trial in trials], hovertemplate="%{text}<extra></extra>", showlegend=False,
            xaxis=axis_name, name="off the scale",
        )  # fmt: skip


def _mark(figure: go.Figure, best: FrozenTrial, panels: Panels) -> None:
    """Draws a ring around the best trial."""
    axis_name = "x" if panels.over_beta and _has_beta(best) else "x2"
    figure.add_scatter(
        x=[_position(best, axis_name)], y=rounded([value_of(best)]), mode="markers", xaxis=axis_name,
        marker={"symbol": "circle-open", "size": 17, "color": INK, "line": {"width": 2}},
        name=role("best", best), hoverinfo="skip",
    )  # fmt: skip


def _position(trial: FrozenTrial, axis_name: str) -> float | str:
    return rounded([_beta(trial)])[0] if axis_name == "x" else _allocation(trial)


def _place(trial: FrozenTrial, panels: Panels) -> str:
    return f"β = {_beta(trial):.4f}" if panels.over_beta and _has_beta(trial) else _allocation(trial)


def _has_beta(trial: FrozenTrial) -> bool:
    return "beta" in trial.params or is_uniform(trial)


def _beta(trial: FrozenTrial) -> float:
    return float(trial.params.get("beta", 0.0))


def _allocation(trial: FrozenTrial) -> str:
    return escape(str(trial.params.get("allocation", "atp" if "beta" in trial.params else "uniform")))


def add_gp_posterior(figure: go.Figure, posterior: Any) -> None:
    """Adds a line and a translucent band per pruner; skips curves that are incomplete."""
    curves = posterior.get("curves") if isinstance(posterior, dict) else None
    for pruner, curve in curves.items() if isinstance(curves, dict) else ():
        if _is_whole(curve):
            _add_curve(figure, str(pruner), {part: rounded(curve[part], 4) for part in CURVE}, posterior.get("before"))


def _is_whole(curve: Any) -> bool:
    """Whether a curve has four equally long lists of numbers, positive where a log axis shows them."""
    lists: list[Any] = [curve.get(part) for part in CURVE] if isinstance(curve, dict) else []
    if not all(isinstance(values, list) for values in lists) or len({len(values) for values in lists}) != 1:
        return False
    numbers = all(isinstance(value, int | float) and isfinite(value) for values in lists for value in values)
    return numbers and bool(lists[0]) and all(value > 0 for values in lists[1:] for value in values)


def _add_curve(figure: go.Figure, pruner: str, curve: dict[str, list[float]], before: Any) -> None:
    colour, beta = colour_of(pruner), curve["beta"]
    known = f" after {before} trials" if isinstance(before, int) else ""
    figure.add_scatter(
        x=beta + beta[::-1], y=curve["high"] + curve["low"][::-1], fill="toself", fillcolor=faint(colour, 0.14),
        line={"width": 0, "color": colour}, mode="lines", hoverinfo="skip", showlegend=False,
        legendgroup=f"belief {pruner}", name="band",
    )  # fmt: skip
    figure.add_scatter(
        x=beta, y=curve["mean"], mode="lines", line={"color": colour, "width": 1.2}, legendgroup=f"belief {pruner}",
        name=f"GP{known}, {pruner} (± 2 sd)", hovertemplate=f"β = %{{x:.4f}}: %{{y:.2f}}{known}<extra></extra>",
    )  # fmt: skip


# --- Several studies in one figure.

LONGEST = 40  # letters of a name in a legend
MARKS = ("circle", "diamond", "square", "triangle-down")  # after all colours


def label(name: str) -> str:
    """A study's name, cut to fit a legend."""
    return escape(name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…")


def sparsities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Sparsities of each study's best plan; None if fewer than two studies have one."""
    figure = new_figure("Sparsity of each block, best plans", "block", "sparsity (share of zeros)")
    for k, summary in enumerate(summaries):
        best = best_of(summary)
        if best is not None and summary.bits is None and (levels := levels_of(best)):
            figure.add_scatter(
                y=rounded(levels, 4), name=label(summary.name), mode="lines",
                line={"color": CYCLE[k % len(CYCLE)], "dash": DASHES[k // len(CYCLE) % 4], "width": 2, "shape": "hvh"},
                hovertemplate=f"block %{{x}}: %{{y:.4f}}<br>{told(best, summary)}<extra></extra>",
            )  # fmt: skip
    return figure if len(figure.data) > 1 else None


def perplexities(summaries: Sequence[Summary]) -> go.Figure | None:
    """Perplexity against β of studies of one model and text; None if fewer than two have trials with β."""
    by_perplexity = [finite(summary.trials) if "perplexity" in summary.objectives else [] for summary in summaries]
    found = [[t for t in trials if "beta" in t.params and "sparsity" not in t.params] for trials in by_perplexity]
    drawn = [(k, summary, found[k]) for k, summary in enumerate(summaries) if found[k]]
    if len(drawn) < 2:
        return None
    figure = new_figure("Perplexity against β", "β, common difference per block", "perplexity, validation text")
    views = [range_of(trials, None) for _, _, trials in drawn]
    for (k, summary, trials), seen in zip(drawn, views, strict=True):
        shown = sorted((t for t in trials if not seen.hides(t)), key=lambda t: float(t.params["beta"]))
        colour = CYCLE[k % len(CYCLE)]
        figure.add_scatter(
            x=rounded(t.params["beta"] for t in shown), y=rounded(map(value_of, shown)), name=label(summary.name),
            mode="markers", marker={"color": colour, "size": 8, "symbol": MARKS[k // len(CYCLE) % 4]},
            error_y=error_bars(shown, colour),
            text=[told(t, summary) for t in shown], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(log_axis(min(seen.low for seen in views), max(seen.high for seen in views)))
    return figure
