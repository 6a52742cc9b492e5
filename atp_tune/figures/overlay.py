"""Several studies in one figure."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from atp_tune.figures.style import CYCLE, DASHES, error_bars, log_axis, new_figure, range_of, rounded
from atp_tune.figures.trials import best_of, finite, told, value_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import levels_of

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
