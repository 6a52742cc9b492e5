"""Which trial of a study over an interval of sparsities is meant: by a sparsity, or by a limit."""

from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial

from atp_tune.errors import UserError
from atp_tune.measures import Limit
from atp_tune.plan import percent
from atp_tune.results.formatting import method_of
from atp_tune.results.front import nearest, sparsest_within
from atp_tune.results.outcome import limit_of
from atp_tune.spec.typed import one_sparsity
from atp_tune.storage.progress import interval_of


@dataclass(frozen=True)
class Choice:
    """A trial, and why it was chosen."""

    trial: FrozenTrial
    why: str

    def __str__(self) -> str:
        return (
            f"trial {self.trial.number}, {percent(self.trial.params['sparsity'])} {method_of(self.trial)}: {self.why}"
        )


def at_sparsity(study: optuna.Study, text: str) -> Choice:
    """The trial of the front that is nearest to a sparsity, 0.5 or 50%; UserError for one that the study has not."""
    wanted = one_sparsity(text)
    interval = interval_of(study)
    if interval is not None and not interval[0] <= wanted <= interval[1]:
        raise UserError(f"--sparsity: {text} is outside the study's interval, {percent(interval)}")
    found = nearest(study, wanted)
    is_there = abs(found.params["sparsity"] - wanted) < 1e-9
    return Choice(found, "on the front" if is_there else f"the nearest to {percent(wanted)} on the front")


def within(study: optuna.Study, limit: Limit) -> Choice:
    """The sparsest trial within a limit; UserError if none is, or if the study lacks the numbers."""
    found, excess = sparsest_within(study, limit)
    data = "images" if study.user_attrs.get("dense_ranks") else "text"
    words = f"{limit_of(limit)} on the validation {data}"
    if excess > 0:
        nearest_one = Choice(found, "it is exported by its number")
        raise UserError(f"study {study.study_name}: no trial is within {words}; the nearest is {nearest_one}")
    return Choice(found, f"the sparsest within {words}")
