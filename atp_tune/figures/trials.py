"""The trials that figures show, and their labels."""

from html import escape
from math import isfinite

from optuna.trial import FrozenTrial

from atp_tune.plan import method_in
from atp_tune.results.formatting import plan_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import error_of, is_uniform, kl_of, levels_of, score_of, uniform_among
from atp_tune.storage.progress import ranked, values_of


def finite(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Measured trials with a finite, positive value, the lowest first."""
    return [trial for trial in ranked(trials) if isfinite(value_of(trial)) and value_of(trial) > 0]


def value_of(trial: FrozenTrial) -> float:
    """Perplexity on the validation text, or KL or top-1 error if the study minimises only that; NaN without a value."""
    return values_of(trial)[0] if trial.values else float("nan")


def measure_of(summary: Summary) -> str:
    """The name of that value."""
    return "KL divergence" if summary.by_kl else "accuracy" if summary.by_accuracy else "perplexity"


def axis_of(summary: Summary) -> str:
    """The title of an axis of that value."""
    return f"{measure_of(summary)}, {validation(summary)}"


def validation(summary: Summary) -> str:
    """What trials are measured on."""
    return f"validation {summary.data}"


def written(value: float, summary: Summary) -> str:
    """That value as text: 4 digits for KL, 2 for perplexity, accuracy in per cent for an error."""
    if summary.by_accuracy:
        return f"{1 - value:.1%}"
    return f"{value:.4f}" if summary.by_kl else f"{value:.2f}"


def written_of(trial: FrozenTrial, summary: Summary) -> str:
    """A trial's value as text; its accuracy without the half image that keeps the minimised error above 0."""
    error = error_of(trial)
    return written(value_of(trial) if error is None else error, summary)


def off_scale(trial: FrozenTrial, summary: Summary) -> str:
    """The same, of a trial above the axis: perplexities are large there, and need no digits."""
    is_perplexity = not (summary.by_kl or summary.by_accuracy)
    return f"{value_of(trial):.0f}" if is_perplexity else written_of(trial, summary)


def uniform_line(summary: Summary, value: float) -> str:
    """That value of uniform as text."""
    uniform = uniform_of(summary) if summary.by_accuracy else None
    return written_of(uniform, summary) if uniform else written(value, summary)


def uniform_value(summary: Summary) -> float | None:
    """That value of uniform."""
    if summary.by_kl or summary.by_accuracy:
        uniform = uniform_of(summary)
        return value_of(uniform) if uniform else None
    return summary.uniform.validation.value if summary.uniform.validation else None


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


def told(trial: FrozenTrial) -> str:
    """Number, plan and values of a trial in two lines, for its hover text."""
    kl = kl_of(trial)
    more = f", KL {kl}" if kl else ""
    error = error_of(trial)
    more += f", accuracy {1 - error:.1%}" if error is not None else ""
    return f"trial {trial.number}: {escape(plan_of(trial))}<br>perplexity {score_of(trial)}{more}"


def role(name: str, trial: FrozenTrial) -> str:
    """The name of a trial in a legend."""
    return f"{name} (trial {trial.number})"
