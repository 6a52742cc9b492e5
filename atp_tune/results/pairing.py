"""Changes between two models of a study, paired by the windows of a text."""

from collections.abc import Callable, Sequence
from typing import Literal

import optuna
from optuna.trial import FrozenTrial

from atp_tune.measures import Change, change, relative

Role = Literal["validation", "test"]


def nlls_of(study: optuna.Study, trial: FrozenTrial | None, text: Role) -> Sequence[float]:
    """Window NLLs of a trial, or of the dense model (None), on a text; empty if they are not measured."""
    if text == "test":
        return study.user_attrs.get("test_nlls", {}).get("dense" if trial is None else str(trial.number)) or ()
    return (study.user_attrs if trial is None else trial.user_attrs).get("dense" if trial is None else "nlls") or ()


def kls_of(study: optuna.Study, trial: FrozenTrial, text: Role) -> Sequence[float]:
    """Window KLs of a trial on a text; empty if they are not measured."""
    found = study.user_attrs.get("test_kls", {}).get(str(trial.number)) if text == "test" else None
    return (trial.user_attrs.get("kls") if text == "validation" else found) or ()


def change_on(study: optuna.Study, text: Role, before: FrozenTrial | None, after: FrozenTrial) -> Change | None:
    """The change of perplexity on a text; None unless both have the same windows. `before`: None is dense."""
    return _paired(nlls_of(study, before, text), nlls_of(study, after, text), change)


def kl_change_on(study: optuna.Study, text: Role, before: FrozenTrial, after: FrozenTrial) -> Change | None:
    """The same of the KL divergence."""
    return _paired(kls_of(study, before, text), kls_of(study, after, text), relative)


def common_text(study: optuna.Study, before: FrozenTrial | None, after: FrozenTrial) -> Role:
    """The text on which to compare two trials, or a trial and dense: test if both have it, else validation."""
    is_tested = nlls_of(study, before, "test") and nlls_of(study, after, "test")
    return "test" if is_tested else "validation"


def _paired(
    before: Sequence[float],
    after: Sequence[float],
    change_of: Callable[[Sequence[float], Sequence[float]], Change | None],
) -> Change | None:
    return change_of(before, after) if before and len(before) == len(after) else None
