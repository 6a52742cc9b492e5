"""Rows of trials and of a front's points, for notebooks: flat, one value in a cell."""

from collections.abc import Sequence
from typing import Any

from atp_tune.measures import PERPLEXITY, TEXTS
from atp_tune.results.formatting import method_of, plan_of, rate_unit, remark_of, spent
from atp_tune.results.results import DENSE
from atp_tune.results.summary import Summary
from atp_tune.results.trials import allocation_of

Row = dict[str, Any]


def trials(summary: Summary) -> list[Row]:
    """A row for each trial: number, state, plan, sparsity, scores with errors, seconds and parameters.

    Where weights are rounded alone `effective_bits` are in the place of sparsity: per weight, with scales.
    """
    amount = {"sparsity": "realised"} if summary.bits is None else {"effective_bits": "effective_bits"}
    return [
        {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "plan": plan_of(trial),
            **{name: trial.user_attrs.get(key) for name, key in amount.items()},
            **dict(summary.results.record(trial)),
            "seconds": round(sum(spent(trial).values()), 3) if spent(trial) else None,
            **trial.params,
            **({"allocation": allocation_of(trial)} if "allocation" in trial.params else {}),
            "remark": remark_of(trial, summary) or None,
        }
        for trial in summary.trials
    ]


def points(summary: Summary) -> list[Row]:
    """A row for each point: sparsity, method, scores, uniform's, and changes against dense and uniform with errors."""
    results, rows = summary.results, list[Row]()
    for point in summary.points:
        uniform = results.uniform(point.trial)
        beside = {f"{'test_' * (text == 'test')}uniform_perplexity": results.score(uniform, text) for text in TEXTS}
        changes = {"against_dense": results.change(DENSE, point.trial)}
        for by in results.measures:
            name = "against_uniform" if by is PERPLEXITY else f"{by.name}_against_uniform"
            changes[name] = results.against_uniform(point.trial, by)
        against = [(name, found and found.change) for name, found in changes.items()]
        rows.append(
            {
                "trial": point.trial.number,
                "sparsity": point.sparsity,
                "method": method_of(point.trial),
                **dict(results.record(point.trial)),
                **{name: found and found.value for name, found in beside.items()},
                **{name: found and found.value for name, found in against},
                **{f"{name}_stderr": found and (found.stderr or None) for name, found in against},
                "excess": point.excess,
                "packed_bytes": point.packed_bytes,
                f"{rate_unit(summary)}_per_second": point.speed and point.speed.fastest,
                "best": point.is_best,
            }
        )
    return rows


def frame(rows: Sequence[Row]) -> Any:
    """The rows as a `pandas.DataFrame`, or as they are without pandas."""
    try:
        from pandas import DataFrame
    except ImportError:
        return list(rows)
    return DataFrame(list(rows))
