"""The search of EvoPress: one parent, offspring by level switches, selection in stages on more and more text.

    k_l      zeros in each row of linear l; a state is one k for each linear
    level    D weights of one linear, d_l = D / rows_l in each row; D is the same for all linears
    switch   one linear loses a level of zeros, another gains one: the number of zeros stays the same

A generation makes λ offspring of the parent, each by min(a, b) switches, a and b drawn from 1 to 3. Each stage measures
those that are left on windows that it draws, and keeps the best; the parent joins the last stage, so that nothing
replaces it that is worse on that text. Here D is the multiple of the least common multiple of all rows that is nearest
to a share of a block's weights; a level may be any number from 0 to all columns of a row.

Source: Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025, algorithm
1 and section 4; D = 1,000,000 of a 7B model's 202 million weights a block, λ = 64, and survivors 8, 2, 1 on 2,048,
16,384 and 65,536 tokens, are settings of the authors' code. It may switch a linear with itself; here it does not.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atp_tune.allocations import LinearSparsities, Shape

State = tuple[tuple[int, ...], ...]  # zeros in each row, one per linear of each block
Stage = tuple[int, int]  # how many survive, and the windows on which they are measured
Fitness = Callable[[Sequence[State], Sequence[int]], list[float]]  # of states, on windows of the pool; lower is better
MOST_SWITCHES = 3


@dataclass(frozen=True)
class Levels:
    """How many columns a level has in each linear, and how many there are."""

    steps: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shapes: Sequence[Sequence[Shape]], share: float) -> "Levels":
        """Levels of as many weights everywhere, nearly this share of a block's weights."""
        unit = math.lcm(*(shape.rows for row in shapes for shape in row))
        block = sum(shape.size for row in shapes for shape in row) / len(shapes)
        weights = unit * max(1, round(share * block / unit))
        steps = tuple(tuple(weights // shape.rows for shape in row) for row in shapes)
        return cls(steps, tuple(tuple(shape.columns for shape in row) for row in shapes))

    def movable(self, state: State, sign: int) -> list[tuple[int, int]]:
        """Block and place of the linears that may lose (-1) or gain (+1) a level of zeros."""
        return [
            (i, k)
            for i, row in enumerate(state)
            for k, zeros in enumerate(row)
            if 0 <= zeros + sign * self.steps[i][k] <= self.columns[i][k]
        ]

    def moved(self, state: State, where: tuple[int, int], sign: int) -> State:
        """The state with a level of zeros more or less in one linear."""
        i, k = where
        row = (*state[i][:k], state[i][k] + sign * self.steps[i][k], *state[i][k + 1 :])
        return (*state[:i], row, *state[i + 1 :])

    def mutated(self, state: State, draw: random.Random) -> State:
        """The state after a few random switches; as it is, where none is possible."""
        for _ in range(min(draw.randint(1, MOST_SWITCHES), draw.randint(1, MOST_SWITCHES))):
            losing = self.movable(state, -1)
            if not losing:
                break
            less = draw.choice(losing)
            gaining = [where for where in self.movable(state, +1) if where != less]
            if not gaining:
                break
            state = self.moved(self.moved(state, less, -1), draw.choice(gaining), +1)
        return state


@dataclass(frozen=True)
class Settings:
    """Offspring of a generation, the stages of selection, and a level as a share of a block's weights."""

    offspring: int = 16
    stages: tuple[Stage, ...] = ((3, 2), (1, 8))
    share: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """Who goes on, its fitness and the parent's on the windows of the last stage, and the windows that went through."""

    state: State
    fitness: float
    before: float
    windows: int


@dataclass(frozen=True)
class Moment:
    """A search after a generation: seconds so far, of the processor and as they pass by; `tokens` of the windows on
    which candidates were measured; fitness on the last of them, 0 at the start.
    """

    seconds: float
    wall: float
    tokens: int
    fitness: float
    state: State


@dataclass
class Run:
    """One search: what was asked for, and each generation, after the start."""

    pruner: str
    fitness: str
    start: str
    settings: Settings
    moments: list[Moment]

    @property
    def request(self) -> tuple[object, ...]:
        """What determines the search."""
        return self.pruner, self.fitness, self.start, self.settings, self.moments[0].state

    def at(self, seconds: float) -> int | None:
        """The generation at this time, from 0; None before the search has come to it."""
        if self.moments[-1].seconds < seconds:
            return None
        return max(number for number, moment in enumerate(self.moments) if moment.seconds <= seconds)


def read_run(stored: dict[str, Any]) -> Run:
    """A search from JSON."""
    stages = tuple(map(tuple, stored["settings"]["stages"]))
    moments = [Moment(**{**each, "state": tuple(map(tuple, each["state"]))}) for each in stored["moments"]]
    return Run(**{**stored, "settings": Settings(**{**stored["settings"], "stages": stages}), "moments": moments})


def share_of(zeros: int, columns: int) -> float:
    """The sparsity s with ⌊columns · s⌋ = zeros, despite rounding."""
    return min(1.0, (zeros + 1e-6) / columns)


def sparsities(state: State, shapes: Sequence[Sequence[Shape]]) -> LinearSparsities:
    """One sparsity per linear of each block with so many zeros in each row."""
    return tuple(
        tuple(share_of(zeros, shape.columns) for zeros, shape in zip(row, linears, strict=True))
        for row, linears in zip(state, shapes, strict=True)
    )


def state_of(found: LinearSparsities, shapes: Sequence[Sequence[Shape]]) -> State:
    """The state that pruning to these sparsities gives."""
    return tuple(
        tuple(int(shape.columns * s) for s, shape in zip(row, linears, strict=True))
        for row, linears in zip(found, shapes, strict=True)
    )


def zeros_of(state: State, shapes: Sequence[Sequence[Shape]]) -> int:
    """Number of zeros of all linears."""
    pairs = zip(state, shapes, strict=True)
    return sum(k * shape.rows for row, linears in pairs for k, shape in zip(row, linears, strict=True))


def next_generation(
    parent: State, number: int, levels: Levels, settings: Settings, pool: int, fitness: Fitness
) -> Generation:
    """Generation `number`, whose draws depend on the seed and this number only; `pool`: windows to draw from."""
    draw = random.Random(f"{settings.seed} {number}")
    left = offspring(parent, levels, settings.offspring, draw)
    best = before = math.inf
    passed = 0
    for place, (survivors, windows) in enumerate(settings.stages):
        is_last = place == len(settings.stages) - 1
        left += [parent] if is_last else []
        found = fitness(left, sorted(draw.sample(range(pool), min(pool, windows))))
        passed += len(left) * min(pool, windows)
        order = sorted(range(len(left)), key=found.__getitem__)  # of equal ones the first, so the parent gives way
        best, before = found[order[0]], found[-1]
        left = [left[k] for k in order[:survivors]]
    return Generation(left[0], best, before, passed)


def offspring(parent: State, levels: Levels, count: int, draw: random.Random) -> list[State]:
    """At most so many different offspring, none equal to the parent; fewer where hardly any switch is possible."""
    found: dict[State, None] = {}
    for _ in range(100 * count):
        found[levels.mutated(parent, draw)] = None
        if len(found) - (parent in found) == count:
            break
    return [state for state in found if state != parent]
