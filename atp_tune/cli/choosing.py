"""Which trial of a study `export` writes: the one that its options name, or that the user chooses from a table."""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from atp_tune.cli.options import wrong
from atp_tune.cli.terminal import console
from atp_tune.errors import printable

if TYPE_CHECKING:
    import optuna

    from atp_tune.results.goals import Choice


@dataclass(frozen=True)
class ChoiceOptions:
    """The options that name a trial, as they were typed; at most one is given."""

    trial: int | None
    sparsity: str | None
    max_increase: str | None
    max_perplexity: str | None
    max_kl: str | None
    max_drop: str | None = None

    def check(self) -> None:
        """BadParameter if two are given."""
        given = self.options
        if len(given) > 1:
            raise wrong(given[1], f"names one trial, and {given[0]} another; leave one out")

    @property
    def options(self) -> list[str]:
        """The options that are given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def chosen_trial(stored: "optuna.Study", choice: ChoiceOptions, may_ask: bool) -> int | None:
    """The number of the chosen trial; None for the best. What was chosen is said in one line on stderr.

    `may_ask`: without a choice, a study over an interval of sparsities asks. UserError for a choice that it has not.
    """
    from atp_tune.results.goals import goal_in
    from atp_tune.spec.typed import only_limit
    from atp_tune.storage.validation import StudySnapshot

    study = StudySnapshot(stored)
    limits = {key: getattr(choice, key) for key in ("max_increase", "max_perplexity", "max_kl", "max_drop")}
    limit = only_limit(limits)
    if choice.trial is not None:
        return choice.trial
    if choice.sparsity is not None:
        return _said(goal_in(study).nearest(choice.sparsity))
    if limit is not None:
        return _said(goal_in(study).sparsest(limit))
    return _asked(study) if may_ask else None


def _said(choice: "Choice") -> int:
    """The number of the chosen trial, said in one line on stderr."""
    print(printable(str(choice)), file=sys.stderr)
    return choice.trial.number


def _asked(study: "optuna.Study") -> int | None:
    """The trial that the user chooses from the numbered points; None for the best, or where there is no choice."""
    from atp_tune.results.summary import summarise

    summary = summarise(study)
    if len(summary.points) < 2 or summary.best_trial is None:
        return None
    from atp_tune.cli.tables import drawn
    from atp_tune.results.tables import overview

    made = overview(summary)
    rows = [[str(row or ""), *cells] for row, cells in enumerate(made.rows)]
    console.print(drawn(replace(made, head=["point", *made.head], rows=rows)))
    usual = next((k for k, point in enumerate(summary.points, 1) if point.is_best), 1)
    numbers = {str(k): point.trial.number for k, point in enumerate(summary.points, 1)}
    answer = ""
    while answer not in numbers:
        if answer:
            console.print(f"  must be a number from 1 to {len(numbers)}")
        try:
            answer = console.input(f"point – 1 to {len(numbers)} ({usual}): ").strip() or str(usual)
        except EOFError:
            raise KeyboardInterrupt from None  # Ctrl-D
    number = numbers[answer]
    return None if number == summary.best_trial.number else number
