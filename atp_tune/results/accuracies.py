"""Accuracies of the models of a study of an image classifier, and which sign of β is better."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import optuna
from optuna.trial import FrozenTrial

from atp_tune.measures import Accuracies, Estimate, Gain, accuracy, gain
from atp_tune.plan import METHODS
from atp_tune.results.pairing import Role, change_on, kl_change_on
from atp_tune.results.trials import is_by_accuracy, is_by_kl, is_uniform, kl_of, score_of, uniform_among, uniform_of
from atp_tune.spec.config import ModelAccuracies
from atp_tune.storage import progress

if TYPE_CHECKING:
    from atp_tune.results.summary import Summary

DENSE = "dense"
TOP = 5
METHOD = (*METHODS, "allocation")  # parameters of a trial


@dataclass(frozen=True)
class Hits:
    """Accuracies by trial, or `dense`; `gains`: of trials against uniform with their pruner, on the text `on`."""

    of: dict[str, Accuracies] = field(default_factory=dict)
    gains: dict[str, tuple[Gain, Role]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.of)

    def trial(self, trial: FrozenTrial | None) -> Accuracies:
        """The accuracies of a trial, as far as they are known; of dense for None."""
        return self.of.get(DENSE if trial is None else str(trial.number), Accuracies())


def hits_of(study: optuna.Study) -> Hits:
    """The accuracies of a study; none of a language model."""
    test = study.user_attrs.get("test_ranks", {})
    validation = {DENSE: study.user_attrs.get("dense_ranks")}
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("ranks")]
    whole = [trial for trial in trials if "stopped_after" not in trial.user_attrs]
    validation |= {str(trial.number): trial.user_attrs["ranks"] for trial in whole}
    of = {name: _accuracies(validation.get(name), test.get(name)) for name in {**validation, **test}}
    gains = {}
    for trial in whole:
        uniform = None if is_uniform(trial) else uniform_of(study, trial)
        if uniform is not None and (found := _gain(test, validation, str(uniform.number), str(trial.number))):
            gains[str(trial.number)] = found
    return Hits({name: found for name, found in of.items() if found != Accuracies()}, gains)


def _accuracies(validation: Sequence[int] | None, test: Sequence[int] | None) -> Accuracies:
    return Accuracies(
        validation=accuracy(validation) if validation else None,
        test=accuracy(test) if test else None,
        test_top5=accuracy(test, TOP) if test else None,
    )


def _gain(
    test: dict[str, list[int]], validation: dict[str, list[int] | None], before: str, after: str
) -> tuple[Gain, Role] | None:
    pairs: tuple[tuple[Sequence[int] | None, Sequence[int] | None, Role], ...] = (
        (test.get(before), test.get(after), "test"),
        (validation.get(before), validation.get(after), "validation"),
    )
    for old, new, role in pairs:
        if old and new and len(old) == len(new):
            return gain(old, new), role
    return None


def sign_of_beta(study: optuna.Study) -> str:
    """Which sign of β is better on the validation data, in a sentence; "" unless both were measured.

    Trials are compared by the study's objective, within the pruner and the allocation of the best of them. Over an
    interval of sparsities trials at different sparsities do not compare.
    """
    done = [trial for trial in progress.measured(study) if trial.params.get("beta") and not is_uniform(trial)]
    if progress.interval_of(study) is not None or not done:
        return ""
    better = done[0]
    same = [trial for trial in done if all(trial.params.get(key) == better.params.get(key) for key in METHOD)]
    is_positive = better.params["beta"] > 0
    other = next((trial for trial in same if (trial.params["beta"] > 0) != is_positive), None)
    if other is None:
        return ""
    word = "positive, which keeps early blocks denser," if is_positive else "negative, which keeps late blocks denser,"
    said = [f"β = {trial.params['beta']:.4g} has {_value(trial)}" for trial in (better, other)]
    uniform = uniform_of(study, better)
    beside = f", uniform {_value(uniform)}" if uniform is not None else ""
    measure = "accuracy" if is_by_accuracy(better) else "KL" if is_by_kl(better) else "perplexity"
    return (
        f"Sign of β: {word} is better: {said[0]}, the best of the other sign, {said[1]}{beside} "
        f"({measure}, validation){', a difference that may be chance' * _is_chance(study, other, better)}."
    )


def _is_chance(study: optuna.Study, other: FrozenTrial, better: FrozenTrial) -> bool:
    if is_by_accuracy(better):  # misses are the ranks above 0, of trials of a stranger too
        old, new = other.user_attrs.get("misses", []), better.user_attrs["misses"]
        if len(old) != len(new):
            return False
        change: Estimate | None = gain(old, new)
        if change is not None and not change.value:
            return True  # of equal accuracies the cross-entropy has decided
    else:
        change = (kl_change_on if is_by_kl(better) else change_on)(study, "validation", other, better)
    return change is not None and change.may_be_chance(len(better.user_attrs.get("nlls", ())))


def _value(trial: FrozenTrial) -> str:
    if is_by_accuracy(trial):
        return str(accuracy(trial.user_attrs["misses"]))
    return str(kl_of(trial) if is_by_kl(trial) else score_of(trial))


def accuracies_of(summary: "Summary", trial: FrozenTrial | None = None) -> ModelAccuracies | None:
    """Accuracies of dense, uniform and a trial, by default the best; None of a language model."""
    best = trial or summary.best_trial
    if not summary.hits:
        return None
    uniform = uniform_among(summary.trials, best) if best else None
    beside = summary.hits.trial(uniform) if uniform else Accuracies()
    return ModelAccuracies(
        dense=summary.hits.trial(None), uniform=beside, best=summary.hits.trial(best) if best else Accuracies()
    )


def gained(summary: "Summary") -> str:
    """The best trial's gain of accuracy over uniform in a sentence; "" without both."""
    found = summary.hits.gains.get(str(summary.best_trial.number)) if summary.best_trial else None
    if found is None:
        return ""
    gain, role = found
    is_chance = gain.may_be_chance(summary.windows.get(role, 0))
    chance = " That may be chance: zero lies in its 95\u00a0% interval." if is_chance else ""
    return f"The best plan’s accuracy is {gain.beside('uniform’s')} on the {role} images.{chance}"
