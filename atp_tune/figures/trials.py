"""Which trials a figure shows, and what is said of them."""

from html import escape
from math import isfinite

from optuna.trial import FrozenTrial

from atp_tune.storage import ranked
from atp_tune.summary import Summary, is_uniform, score_of
from atp_tune.wording import plan_of


def finite(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The measured trials, the lowest perplexity first; not those whose perplexity no axis can show."""
    return [trial for trial in ranked(trials) if isfinite(value_of(trial)) and value_of(trial) > 0]


def value_of(trial: FrozenTrial) -> float:
    """Search perplexity of a measured trial."""
    return float("nan") if trial.value is None else trial.value


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
    """The trial with the highest perplexity, if there are others."""
    done = finite(summary.trials)
    return done[-1] if len(done) > 1 else None


def told(trial: FrozenTrial) -> str:
    """Number, plan and perplexity of a trial in two lines, for a box over its point."""
    return f"trial {trial.number}: {escape(plan_of(trial))}<br>perplexity {score_of(trial)}"


def role(name: str, trial: FrozenTrial) -> str:
    """A trial's name in a legend."""
    return f"{name} (trial {trial.number})"
