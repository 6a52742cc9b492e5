"""Rows of trials and of a front's points, for notebooks: flat, one value in a cell."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from atp_tune.results.status import status_of
from atp_tune.results.summary import Summary
from atp_tune.results.trials import is_uniform
from atp_tune.spec.config import Scores

Row = dict[str, Any]


def trials(summary: Summary) -> list[Row]:
    """A row for each trial: number, state, plan, sparsity, perplexities with errors, seconds and parameters.

    Where weights are rounded alone `effective_bits` are in the place of sparsity: per weight, with scales.
    """
    status = status_of(summary, datetime.now())
    has_kl, has_hits = "kl" in status.objective, bool(summary.hits)
    uniform = {trial.number for trial in summary.trials if "allocation" in trial.params and is_uniform(trial)}
    return [
        {
            "trial": trial.number,
            "state": trial.state.lower(),
            "plan": trial.plan,
            **({"sparsity": trial.realised} if trial.bits is None else {"effective_bits": trial.effective_bits}),
            "perplexity": trial.value,
            "stderr": trial.stderr,
            "test_perplexity": trial.test and trial.test.value,
            "test_stderr": trial.test and (trial.test.stderr or None),
            **({"kl": trial.kl and trial.kl.validation and trial.kl.validation.value} if has_kl else {}),
            **(
                {"accuracy": trial.accuracy and trial.accuracy.validation and trial.accuracy.validation.value}
                if has_hits
                else {}
            ),
            "seconds": trial.seconds,
            **trial.params,
            **({"allocation": "uniform"} if trial.number in uniform else {}),  # whose parameters are 0
            "remark": trial.remark,
        }
        for trial in status.trials
    ]


def points(summary: Summary) -> list[Row]:
    """A row for each point: sparsity, method, perplexities, and changes against dense and uniform with their errors."""
    uniforms = {point.trial.number: point.uniform_scores for point in summary.points}
    return [
        {
            "trial": point.trial,
            "sparsity": point.sparsity,
            "method": point.method,
            "perplexity": point.validation and point.validation.value,
            "stderr": point.validation and (point.validation.stderr or None),
            "test_perplexity": point.test and point.test.value,
            "test_stderr": point.test and (point.test.stderr or None),
            **_beside(uniforms.get(point.trial)),
            **{
                f"{name}{ending}": against and getattr(against, key)
                for name, against in (
                    ("against_dense", point.against_dense),
                    ("against_uniform", point.against_uniform),
                )
                for ending, key in (("", "value"), ("_stderr", "stderr"))
            },
            "excess": point.excess,
            "packed_bytes": point.packed_bytes,
            "tokens_per_second": point.tokens_per_second,
            "images_per_second": point.images_per_second,
            "best": point.best,
        }
        for point in status_of(summary, datetime.now()).points
    ]


def _beside(uniform: Scores | None) -> Row:
    """The perplexities of uniform at the same sparsity."""
    found = {"uniform": uniform and uniform.validation, "test_uniform": uniform and uniform.test}
    return {f"{name}_perplexity": score and score.value for name, score in found.items()}


def frame(rows: Sequence[Row]) -> Any:
    """The rows as a `pandas.DataFrame`, or as they are without pandas."""
    try:
        from pandas import DataFrame
    except ImportError:
        return list(rows)
    return DataFrame(list(rows))
