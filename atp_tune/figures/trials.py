"""Which trials a figure shows, and what is said of them."""

from html import escape
from math import isfinite

from optuna.trial import FrozenTrial

from atp_tune.results.formatting import plan_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import is_uniform, kl_of, score_of
from atp_tune.storage.progress import ranked, values_of


def finite(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The measured trials, the lowest value first; not those whose value no axis can show."""
    return [trial for trial in ranked(trials) if isfinite(value_of(trial)) and value_of(trial) > 0]


def value_of(trial: FrozenTrial) -> float:
    """What trials are compared by, on the validation text: perplexity, or KL where the study minimises that alone."""
    return values_of(trial)[0] if trial.values else float("nan")


def measure_of(summary: Summary) -> str:
    """What that value is called."""
    return "KL divergence" if summary.objectives == ("kl",) else "perplexity"


def written(value: float, summary: Summary) -> str:
    """Such a value with as many digits as it has."""
    return f"{value:.4f}" if summary.objectives == ("kl",) else f"{value:.2f}"


def uniform_value(summary: Summary) -> float | None:
    """The value of uniform."""
    if summary.objectives == ("kl",):
        uniform = uniform_of(summary)
        return value_of(uniform) if uniform else None
    return summary.uniform.validation.value if summary.uniform.validation else None


def best_of(summary: Summary) -> FrozenTrial | None:
    """The best trial."""
    return next(iter(finite(summary.trials)), None)


def uniform_of(summary: Summary) -> FrozenTrial | None:
    """The first uniform trial of the best trial's pruner, as the summary has it."""
    best = best_of(summary)
    pruner = best.params.get("pruner") if best else None
    found = (t for t in finite(summary.trials) if is_uniform(t) and t.params.get("pruner") == pruner)
    return min(found, key=lambda trial: trial.number, default=None)


def second_of(summary: Summary) -> FrozenTrial | None:
    """The best of the trials that are neither uniform nor share out the sparsity as the best does."""
    best = best_of(summary)
    shares = best.user_attrs.get("sparsities") if best else None
    others = (t for t in finite(summary.trials) if t != best and not is_uniform(t))
    return next((t for t in others if t.user_attrs.get("sparsities") not in (None, shares)), None)


def worst_of(summary: Summary) -> FrozenTrial | None:
    """The trial with the highest value, if there are others."""
    done = finite(summary.trials)
    return done[-1] if len(done) > 1 else None


def told(trial: FrozenTrial) -> str:
    """Number, plan and values of a trial in two lines, for a box over its point."""
    kl = kl_of(trial)
    more = f", KL {kl}" if kl else ""
    return f"trial {trial.number}: {escape(plan_of(trial))}<br>perplexity {score_of(trial)}{more}"


def role(name: str, trial: FrozenTrial) -> str:
    """A trial's name in a legend."""
    return f"{name} (trial {trial.number})"
