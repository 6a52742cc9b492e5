"""Figures over trials: values and the best so far, times, and two objectives against each other."""

from functools import partial
from itertools import accumulate

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from atp_tune.figures.accuracy import show_accuracies
from atp_tune.figures.style import (
    BEST,
    CYCLE,
    INK,
    UNIFORM,
    axis,
    faint,
    level,
    new_figure,
    range_of,
    rounded,
    set_range,
)
from atp_tune.figures.trials import (
    axis_of,
    finite,
    off_scale,
    role,
    told,
    uniform_of,
    validation,
    value_of,
    written,
)
from atp_tune.measures import KL, PERPLEXITY
from atp_tune.results.formatting import spent
from atp_tune.results.summary import Summary

MEANINGS = {"calibrate": "calibrate (statistics)", "prune": "prune", "evaluate": "evaluate (perplexity)"}


def draw_history(summary: Summary) -> go.Figure | None:
    """The objective against the trial's number; None while none is measured."""
    done = sorted(finite(summary.trials), key=lambda trial: trial.number)
    if not done:
        return None
    seen = range_of(done, None, summary.results.main.is_higher_better)
    figure = new_figure("How the search went", "trial", axis_of(summary))
    shown = [trial for trial in done if not seen.hides(trial)]
    figure.add_scatter(
        x=[trial.number for trial in shown], y=rounded(map(value_of, shown)), name="each trial", mode="markers",
        marker={"color": faint(INK, 0.6), "size": 6}, text=[told(trial, summary) for trial in shown],
        hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=[trial.number for trial in done], y=rounded(accumulate(map(value_of, done), min)), name="best so far",
        mode="lines", line={"color": BEST, "width": 2.5, "shape": "hv"},
        hovertemplate="best so far %{y:.5g}<extra></extra>",
    )  # fmt: skip
    uniform = uniform_of(summary)
    if uniform is not None:
        value = value_of(uniform)
        level(figure, value, f"uniform {written(uniform, summary)}{seen.arrow(value)}", UNIFORM)
    hidden = [f"trial {trial.number}: {off_scale(trial, summary)} ↑" for trial in done if seen.hides(trial)]
    set_range(seen, figure, hidden)
    show_accuracies(figure, summary, seen)
    return figure


def draw_seconds(summary: Summary) -> go.Figure | None:
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


def draw_front(summary: Summary) -> go.Figure | None:
    """KL against perplexity on the validation text; None with one of them or without a measured trial."""
    front = finite(list(summary.front))
    if not front:
        return None
    figure = new_figure("Perplexity and KL divergence", "", f"KL divergence, {validation(summary)}")
    figure.update_xaxes(axis(f"perplexity, {validation(summary)}"))
    numbers = {trial.number for trial in front}
    _add_points(figure, summary, [t for t in finite(summary.trials) if t.number not in numbers], "other trials", INK)
    _add_points(
        figure,
        summary,
        front,
        "Pareto front",
        BEST,
        mode="lines+markers",
        line={"color": BEST, "shape": "hv", "width": 1.5},
    )
    uniform = uniform_of(summary)
    if uniform is not None:
        mark = {"symbol": "circle-open", "size": 15, "color": UNIFORM, "line": {"width": 2}}
        _add_points(
            figure, summary, [uniform], role("uniform", uniform), UNIFORM, marker=mark, error_x=None, error_y=None
        )
    return figure


def _add_points(
    figure: go.Figure, summary: Summary, trials: list[FrozenTrial], name: str, colour: str, **more: object
) -> None:
    """Trials as points with their standard errors."""
    score_of = partial(summary.results.score, text="validation")
    found = [(trial, score_of(trial, measure=PERPLEXITY), score_of(trial, measure=KL)) for trial in trials]
    both = [(trial, score, kl) for trial, score, kl in found if score and kl]
    bars = {"color": faint(colour, 0.6), "thickness": 1.2, "width": 0}
    look = {
        "mode": "markers",
        "marker": {"color": colour, "size": 8},
        "error_x": {"array": rounded((score.stderr for _, score, _ in both), 4), **bars},
        "error_y": {"array": rounded((kl.stderr for _, _, kl in both), 4), **bars},
        **more,
    }
    if both:
        figure.add_scatter(
            x=rounded(score.value for _, score, _ in both), y=rounded(kl.value for _, _, kl in both), name=name,
            text=[told(trial, summary) for trial, _, _ in both], hovertemplate="%{text}<extra></extra>", **look,
        )  # fmt: skip
