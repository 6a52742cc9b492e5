"""Means of accuracies over tasks, and differences of models on one task, with their standard errors."""

import math
from statistics import fmean

from atp_tune.measures import error_of_gain, error_of_mean
from atp_tune.spec.config import Measure


def difference(values: list[float], base: list[float]) -> Measure | None:
    """Mean difference by items with its standard error, if it is known; None without scores of at least two items."""
    if len(values) != len(base) or len(values) < 2:
        return None
    differences = [value - other for value, other in zip(values, base, strict=True)]
    error_of = error_of_gain if {*values, *base} <= {0.0, 1.0} else error_of_mean
    return Measure(value=fmean(differences), stderr=error_of(differences) or None)


def mean(measures: list[Measure]) -> Measure:
    """Unweighted mean over tasks; its standard error is over items, not over the choice of tasks."""
    errors = [measure.stderr for measure in measures]
    known = [error for error in errors if error is not None]
    stderr = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    return Measure(value=fmean(measure.value for measure in measures), stderr=stderr)
