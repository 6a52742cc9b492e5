"""Where the time of each trial goes, phase by phase."""

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.style import CYCLE, new_figure, rounded
from atp_tune.results.summary import Summary

MEANINGS = {"calibrate": "calibrate (statistics)", "prune": "prune", "evaluate": "evaluate (perplexity)"}


def draw(summary: Summary) -> go.Figure | None:
    """Seconds per trial as stacked bars, trials in order; None while no trial has any."""
    timed = [trial for trial in summary.trials if spent(trial)]
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


def spent(trial: FrozenTrial) -> dict[str, float]:
    """Seconds of a trial by phase; none for one that only repeats what was measured before."""
    return {} if "repeats" in trial.user_attrs else dict(trial.user_attrs.get("seconds") or {})
