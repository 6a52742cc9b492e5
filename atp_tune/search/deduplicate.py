"""A sampler's proposals kept apart from what is known: a point that was measured says nothing new.

Where the best point is the end of an interval, as uniform is where β > 0 does not pay, the maximum of a GP's
acquisition is that very point again and again. Then one beside it is drawn instead: uniformly, at most a 40th of each
interval away, and twice as far after each draw that is known too.
"""

import random
from collections.abc import Sequence

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from atp_tune.search.space import Params

NEAR = 1 / 500  # of an interval: β of SmolLM2 at 60 % that are nearer differ by less than a weight in any row
REACH = 1 / 40  # of an interval, at first
DRAWS = 20


def apart(point: Params, trials: Sequence[FrozenTrial], kinds: dict[str, BaseDistribution], seed: int) -> Params:
    """The point itself, if no trial is near it, else one beside it; `trials` may still be running."""
    drawn, reach, generator = point, REACH, random.Random(seed)
    intervals = {name: kind for name, kind in kinds.items() if isinstance(kind, FloatDistribution)}
    for _ in range(DRAWS if intervals else 0):
        if not any(is_near(drawn, trial.params, kinds, NEAR) for trial in trials):
            return drawn
        drawn = point | {name: _beside(point[name], kind, reach, generator) for name, kind in intervals.items()}
        reach *= 2
    return drawn


def is_near(point: Params, other: Params, kinds: dict[str, BaseDistribution], share: float) -> bool:
    """Whether two points differ in numbers alone, and by no more than a share of each interval."""
    return all(
        abs(point[name] - other[name]) <= share * (kind.high - kind.low)
        if isinstance(kind, FloatDistribution)
        else point[name] == other[name]
        for name, kind in kinds.items()
    )


def _beside(value: float, kind: FloatDistribution, reach: float, generator: random.Random) -> float:
    width = reach * (kind.high - kind.low)
    return generator.uniform(max(kind.low, value - width), min(kind.high, value + width))
