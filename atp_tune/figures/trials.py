"""The trials that figures show, and their labels."""

from html import escape
from math import isfinite

from optuna.trial import FrozenTrial

from atp_tune.measures import PERPLEXITY
from atp_tune.results.formatting import plan_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import is_uniform, levels_of, uniform_among
from atp_tune.storage.progress import ranked, sparsity_of, values_of


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
