"""What experiment trackers get of a study: a row for each trial that has ended, and the final numbers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from atp_tune.results.summary import Summary
from atp_tune.results.trials import error_of, kl_of, parameters_of, score_of


@dataclass(frozen=True)
class TrialRecord:
    """One trial: its number, what was chosen in words, its state, and its numbers by name."""

    number: int
    plan: str
    state: str
    numbers: dict[str, float]


def records(study: optuna.Study, summary: Summary) -> Iterator[TrialRecord]:
    """The trials of a study that have ended, by number, each with the best value up to it and the baselines."""
    best: dict[str, float] = {}
    baselines = _named("baseline", {"dense": summary.dense.validation, "uniform": summary.uniform.validation})
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            found = _values(trial)
            if "stopped_after" not in trial.user_attrs:  # else the values are estimates
                best |= {
                    key: min(value, best.get(key, math.inf)) for key, value in found.items() if "stderr" not in key
                }
            tops = {f"best/{key}": value for key, value in best.items()}
            trials = {f"trial/{key}": value for key, value in found.items()}
            drawn = {**trial.params, **parameters_of(trial)}  # over an interval of sparsities, not shares of the bounds
            parameters = {f"parameters/{key}": float(value) for key, value in drawn.items() if _is_number(value)}
            names = [str(value) for value in drawn.values() if not _is_number(value)]
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            numbers = {**trials, **tops, **parameters, **baselines, "trial/seconds": seconds}
            yield TrialRecord(trial.number, " ".join(names), trial.state.name.lower(), numbers)


def final_numbers(summary: Summary) -> dict[str, float]:
    """Perplexities of dense, uniform and best on both texts, as far as they are known, and the best trial's number."""
    rows = {"dense": summary.dense, "uniform": summary.uniform, "best": summary.best}
    found: dict[str, float] = {}
    for text in ("validation", "test"):
        found |= _named(f"final/{text}", {name: getattr(scores, text) for name, scores in rows.items()})
    return found | ({"final/best_trial": float(summary.best_trial.number)} if summary.best_trial else {})


def _values(trial: FrozenTrial) -> dict[str, float]:
    """A trial's perplexity and KL with their standard errors, and its top-1 error, as far as it has them."""
    both = {"perplexity": score_of(trial), "kl": kl_of(trial)}
    found: dict[str, float] = {}
    for name, score in both.items():
        if score is not None and math.isfinite(score.value):
            found |= {name: score.value} | ({f"{name}_stderr": score.stderr} if score.stderr else {})
    error = error_of(trial)
    return found if error is None else {**found, "top1_error": error}


def _named(prefix: str, scores: dict[str, object]) -> dict[str, float]:
    values = {name: getattr(score, "value", math.nan) for name, score in scores.items()}
    return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
