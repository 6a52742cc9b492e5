"""The points of a study over an interval of sparsities, in the JSON documents of `status` and `report`."""

import math
from typing import Annotated, Literal

from pydantic import PlainSerializer

from atp_tune.frozen import FrozenModel
from atp_tune.measures import Change
from atp_tune.results.formatting import method_of
from atp_tune.results.front import Point
from atp_tune.results.pairing import Role
from atp_tune.results.summary import Summary
from atp_tune.spec.config import Divergences, Score

Number = Annotated[float | None, PlainSerializer(lambda x: x if x is not None and math.isfinite(x) else None)]


class Against(FrozenModel):
    """Relative change from uniform with the same pruner (or from dense), paired by windows of one text."""

    value: Number
    stderr: Number
    on: Literal["validation", "test"]


class PointStatus(FrozenModel):
    """A point of a study over an interval of sparsities.

    `uniform`: number of the uniform trial at the same sparsity. `excess`: over the limit; at most 0 within it.
    `packed_bytes`: of all weights in a packed folder. `tokens_per_second`: decoded one at a time, weights not rounded,
    by the fastest engine that `speedup` measured; of an image classifier `images_per_second`, one at a time.
    """

    trial: int
    sparsity: float
    method: str
    validation: Score
    test: Score
    against_dense: Against | None
    against_uniform: Against | None
    uniform: int | None
    kl: Divergences | None
    kl_against_uniform: Against | None
    excess: Number
    best: bool
    packed_bytes: int | None = None
    tokens_per_second: float | None = None
    images_per_second: float | None = None


def rate_of(summary: Summary, rate: float | None) -> dict[str, float | None]:
    """A rate under the name of what is counted: tokens, or the images of an image classifier."""
    return {"images_per_second" if summary.hits else "tokens_per_second": rate}


def point_of(summary: Summary, point: Point) -> PointStatus:
    """The numbers of a point."""
    uniform = point.against
    return PointStatus(
        trial=point.trial.number,
        sparsity=point.sparsity,
        method=method_of(point.trial),
        validation=point.scores.validation,
        test=point.scores.test,
        against_dense=against_of(point.dense.change, point.dense.text),
        against_uniform=uniform and against_of(uniform.change, uniform.text),
        uniform=point.uniform.number if point.uniform else None,
        kl=summary.kls.get(point.trial.number),
        kl_against_uniform=uniform and against_of(uniform.kl_change, uniform.text),
        excess=point.excess,
        best=point.is_best,
        packed_bytes=point.packed_bytes,
        **rate_of(summary, point.speed.fastest if point.speed else None),
    )


def against_of(change: Change | None, text: Role) -> Against | None:
    """A change, with the text on which it is measured."""
    return Against(value=change.value, stderr=change.stderr or None, on=text) if change else None
