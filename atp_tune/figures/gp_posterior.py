"""What the search believed: the Gaussian process's perplexity over β, with its uncertainty."""

from math import isfinite
from typing import Any

import plotly.graph_objects as go

from atp_tune.figures.style import colour_of, faint, rounded

PARTS = ("beta", "mean", "low", "high")


def add(figure: go.Figure, belief: Any) -> None:
    """A thin line and a translucent band per pruner; nothing where no belief is stored or it is not whole."""
    curves = belief.get("curves") if isinstance(belief, dict) else None
    for pruner, curve in curves.items() if isinstance(curves, dict) else ():
        if _is_whole(curve):
            _add_curve(figure, str(pruner), {part: rounded(curve[part], 4) for part in PARTS}, belief.get("before"))


def _is_whole(curve: Any) -> bool:
    """Whether a curve holds four equally long lists of numbers above 0, which a log axis can show."""
    lists: list[Any] = [curve.get(part) for part in PARTS] if isinstance(curve, dict) else []
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
