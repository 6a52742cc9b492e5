"""How the search went: the value of each trial, and the best so far."""

from itertools import accumulate

import plotly.graph_objects as go

from atp_tune.figures import axis_range
from atp_tune.figures.style import BEST, INK, UNIFORM, faint, level, new_figure, rounded
from atp_tune.figures.trials import finite, measure_of, told, uniform_value, value_of, written
from atp_tune.results.summary import Summary


def draw(summary: Summary) -> go.Figure | None:
    """What is minimised against trial number; None while no trial is measured."""
    done = sorted(finite(summary.trials), key=lambda trial: trial.number)
    if not done:
        return None
    seen = axis_range.view_of(done, None)
    figure = new_figure("How the search went", "trial", f"{measure_of(summary)}, search text")
    shown = [trial for trial in done if not seen.hides(trial)]
    figure.add_scatter(
        x=[trial.number for trial in shown], y=rounded(map(value_of, shown)), name="each trial", mode="markers",
        marker={"color": faint(INK, 0.6), "size": 6}, text=[told(trial) for trial in shown],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[trial.number for trial in done], y=rounded(accumulate(map(value_of, done), min)), name="best so far",
        mode="lines", line={"color": BEST, "width": 2.5, "shape": "hv"},
        hovertemplate="best so far %{y:.5g}<extra></extra>",
    )  # fmt: skip
    value = uniform_value(summary)
    if value is not None:
        level(figure, value, f"uniform {written(value, summary)}{seen.arrow(value)}", UNIFORM)
    hidden = [f"trial {trial.number}: {value_of(trial):.0f} ↑" for trial in done if seen.hides(trial)]
    axis_range.apply(seen, figure, hidden)
    return figure
