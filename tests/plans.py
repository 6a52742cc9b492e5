"""Plans, and what trials store of them, from numbers."""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

from atp_tune.plan import Level, Plan

Row = Sequence[float | None]


def planned(
    method: str,
    allocation: str,
    sparsities: Row,
    parameters: Mapping[str, float] | None = None,
    linears: Sequence[Row] | None = None,
    bits: Row | None = None,
    target: float | None = None,
) -> Plan:
    """A plan with these sparsities and bits of blocks, and sparsities, or bits where nothing is pruned, of linears."""
    levels = []
    for own, width, row in zip(sparsities, bits or repeat(None), linears or repeat(()), strict=False):
        inside = tuple(Level(None, one) if own is None else Level(one, width) for one in row)  # type: ignore[arg-type]
        levels.append(Level(own, width, None, inside))
    return Plan(
        method=method, allocation=allocation, parameters=dict(parameters or {}), target=target, levels=tuple(levels)
    )


def stored(sparsities: Row, linears: Sequence[Row] | None = None, **more: Any) -> dict[str, Any]:
    """The attribute of a trial with such a plan."""
    plan = planned(more.pop("method", "wanda"), more.pop("allocation", "atp"), sparsities, None, linears, **more)
    return {"plan": plan.model_dump(mode="json", exclude_none=True)}


def linears_of(plan: Plan) -> tuple[tuple[float, ...], ...] | None:
    """The sparsity, or bits, of each linear of each block; None where linears do not differ."""
    return tuple(tuple(one.amount for one in level.linears) for level in plan.levels) if plan.by_linear else None
