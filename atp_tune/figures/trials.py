"""The trials that figures show, and their labels."""

from html import escape
from math import isfinite

from optuna.trial import FrozenTrial

from atp_tune.measures import PERPLEXITY
from atp_tune.plan import method_in
from atp_tune.results.formatting import plan_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import is_uniform, levels_of, uniform_among
from atp_tune.storage.progress import ranked, values_of


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
    """The best trial."""
    shown = finite(summary.trials)
    if summary.interval and summary.best_trial is not None:
        return next((trial for trial in shown if trial.number == summary.best_trial.number), None)
    return next(iter(shown), None)


def uniform_of(summary: Summary) -> FrozenTrial | None:
    """The first uniform trial of the best trial's pruner (and sparsity), as the summary has it."""
    best = best_of(summary)
    if summary.interval:
        return uniform_among(finite(summary.trials), best) if best else None
    pruner = method_in(best.params) if best else None
    found = (t for t in finite(summary.trials) if is_uniform(t) and method_in(t.params) == pruner)
    return min(found, key=lambda trial: trial.number, default=None)


def second_of(summary: Summary) -> FrozenTrial | None:
    """The best trial that is not uniform and has other sparsities than the best; None over an interval of targets."""
    if summary.interval:
        return None
    best = best_of(summary)
    levels = levels_of(best)
    others = (t for t in finite(summary.trials) if t != best and not is_uniform(t))
    return next((t for t in others if levels_of(t) not in (None, levels)), None)


def worst_of(summary: Summary) -> FrozenTrial | None:
    """The trial with the highest value, if there are several; None over an interval of targets."""
    done = [] if summary.interval else finite(summary.trials)
    return done[-1] if len(done) > 1 else None


def told(trial: FrozenTrial, summary: Summary) -> str:
    """Number, plan and scores of a trial in two lines, for its hover text."""
    results = summary.results
    scores = ((by, results.score(trial, "validation", by)) for by in results.measures)
    said = ", ".join(f"{by.column} {found}" for by, found in scores if found or by is PERPLEXITY)
    return f"trial {trial.number}: {escape(plan_of(trial))}<br>{said}"


def role(name: str, trial: FrozenTrial) -> str:
    """The name of a trial in a legend."""
    return f"{name} (trial {trial.number})"
