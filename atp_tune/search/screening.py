"""Screening: a cheaper study before the main study, which then confirms the best points.

The screening is stored beside the main study as NAME.screen. It prunes with the dense model's statistics and measures
every `stride`-th validation window: a trial is a mask and part of an evaluation, without a pass over the calibration
text. Its perplexities differ from the main study's, but near the optimum it ranks points alike. The main study begins
with the best points and measures them in full.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import GPSampler
from optuna.trial import FrozenTrial

from atp_tune.events import Event, EventHandler, Message, TrialEnded, TrialStarted
from atp_tune.measures import perplexity
from atp_tune.search import samplers
from atp_tune.search.samplers import Distributions, branch_study, posterior_at
from atp_tune.search.space import Params, Space
from atp_tune.spec.search import ScreenConfig
from atp_tune.spec.studyfile import StudyFile, overridden
from atp_tune.storage.fingerprint import CHANGED

# --- A model of the screened trials over sparsity and parameters: the best parameters at each sparsity.
#
# A Gaussian process is fitted to the log of each point's increase of NLL over the dense model, ln(PPL / PPL of
# dense), or of its KL, in nats per token. That is 0.02 at 20 % and 2 at 70 %, so that in perplexities, or their logs,
# what parameters change at low sparsities would be noise. At one sparsity, the best of `CANDIDATES` random points is
# the one with the lowest mean plus `CAUTION` standard deviations of the posterior: where nothing is gained that is a
# point near measured ones, and not any point of a flat stretch that no trial reached; among so many points some are
# always thought too well of. docs/log.md compares it with one deviation, and with the nearest trials of the Pareto
# front.
#
# An increase below `SMALLEST` counts as `SMALLEST`, and where a model loses nothing by pruning all points do: there
# the process is flat, and any of them would do. So where one of the `NEIGHBOURS` with the nearest sparsities
# increases less, and the process is as flat at the sparsity itself, the best of these neighbours is taken, moved to
# the sparsity.

CANDIDATES = 512
CAUTION = 2.0
LEAST = 3  # points that a process is fitted to
NEIGHBOURS = 5
FLAT = 2.0  # times `SMALLEST`: the process is flat where it predicts no more
SMALLEST, MOST = 0.005, 50.0  # nats per token: smaller increases are noise, larger ones are all the same


@dataclass(frozen=True)
class Predicted:
    """A point, and its increase of NLL or its KL, in nats per token; None where no model was fitted.

    `bound`: that with `CAUTION` standard deviations, by which points are compared.
    """

    params: Params
    increase: float | None
    bound: float = math.inf


class Surrogate:
    """The model; `trials` are measured alike, in any order.

    `dense`: the dense model's window NLLs on the windows of these trials; None if their values are KLs.
    """

    def __init__(
        self, space: Space, trials: Sequence[FrozenTrial], seed: int, dense: Sequence[float] | None = None
    ) -> None:
        self._space = space
        points = [_with_increase(trial, dense) for trial in trials if trial.values]
        self._branches = {name: Branch(space, name, points, seed) for name in space.intervals}

    def best_at(self, sparsity: float) -> Predicted:
        """The best point at a sparsity; the first pruner's uniform point where no model is fitted."""
        found = [found for branch in self._branches.values() if (found := branch.best_at(sparsity))]
        default = Predicted(self._space.uniform(sparsity)[0], None)
        return min(found, key=lambda one: one.bound, default=default)


class Branch:
    """The model of one allocation's points."""

    def __init__(self, space: Space, name: str, trials: Sequence[FrozenTrial], seed: int) -> None:
        self._space = space
        self._name = name
        self._seed = seed
        self._kinds = space.kinds(name)
        shadow = branch_study([_clamped(trial) for trial in trials], space, name, self._kinds)
        done = [trial for trial in shadow.trials if trial.value is not None]
        known = [(float(trial.values[0]), space.within(trial.params, name) or {}) for trial in trials]
        self._known = [(value, params) for value, params in known if self._kinds.keys() <= params.keys()]
        self._process = _fitted(shadow, self._kinds, seed) if len(done) >= LEAST else None
        values = [float(trial.value or 0.0) for trial in done]
        self._mean, self._spread = (statistics.fmean(values), statistics.pstdev(values)) if done else (0.0, 0.0)
        self._points = [trial.params for trial in done]

    def best_at(self, sparsity: float) -> Predicted | None:
        """The best point at a sparsity; None where no model is fitted."""
        if self._process is None:
            return None
        nearest = sorted(self._known, key=lambda one: abs(one[1]["sparsity"] - sparsity))[:NEIGHBOURS]
        value, point = min(nearest, key=lambda one: one[0])
        moved = self._space.at({name: point[name] for name in self._kinds}, sparsity)
        points = [*self._candidates(sparsity), moved]
        open_ones = _open(self._kinds)
        trials = [
            optuna.create_trial(value=0.0, params={name: point[name] for name in open_ones}, distributions=open_ones)
            for point in points
        ]
        means, deviations = posterior_at(self._process, trials, open_ones)
        if value < SMALLEST and self._increase(means[-1]) < FLAT * SMALLEST:
            return Predicted({"allocation": self._name, **moved}, value, value)
        bounds = means + CAUTION * deviations
        best = int(bounds.argmin())
        params = {"allocation": self._name, **points[best]}
        return Predicted(params, self._increase(means[best]), self._increase(bounds[best]))

    def _increase(self, normal: float) -> float:
        """The increase at a value of the process."""
        return math.exp(self._mean + self._spread * float(normal))

    def _candidates(self, sparsity: float) -> list[Params]:
        """Points at a sparsity: uniform where the allocation contains it, those measured elsewhere, random ones."""
        generator = random.Random(f"{self._seed} {self._name}")
        drawn = [{name: _drawn(kind, generator) for name, kind in self._kinds.items()} for _ in range(CANDIDATES)]
        uniform = [self._space.within(point, self._name) for point in self._space.uniform(sparsity)]
        known = [{name: point[name] for name in self._kinds} for point in uniform if point is not None]
        return [self._space.at(point, sparsity) for point in (*known, *self._points, *drawn)]


def _with_increase(trial: FrozenTrial, dense: Sequence[float] | None) -> FrozenTrial:
    """The trial with its increase of NLL over the dense model, or its KL, as its value."""
    value = trial.values[0]
    if dense is not None:
        value = min(math.log(value / perplexity(dense).value), MOST) if value > 0 else MOST
    return optuna.create_trial(value=value, params=trial.params, distributions=trial.distributions)


def _clamped(trial: FrozenTrial) -> FrozenTrial:
    value = max(trial.values[0], SMALLEST)
    return optuna.create_trial(value=value, params=trial.params, distributions=trial.distributions)


def _drawn(kind: Any, generator: random.Random) -> Any:
    if isinstance(kind, CategoricalDistribution):
        return generator.choice(kind.choices)
    assert isinstance(kind, FloatDistribution)
    return generator.uniform(kind.low, kind.high)


def _fitted(shadow: optuna.Study, kinds: Distributions, seed: int) -> Any:
    """Optuna's Gaussian process, fitted to a study of the logs."""
    from atp_tune.compat import fitted

    sampler = GPSampler(seed=seed, n_startup_trials=LEAST)
    shadow.ask()  # stands in for a trial
    sampler.sample_relative(shadow, shadow.trials[-1], _open(kinds))
    return fitted(sampler)


def _open(kinds: Distributions) -> Distributions:
    """The distributions with more than one value, which a process is fitted over."""
    return {name: kind for name, kind in kinds.items() if not kind.single()}


APART = 1 / 28  # of an interval: half a step (0.002) of the paper's grid, on 32 blocks at 70 %


def screening_file(file: StudyFile, screen: ScreenConfig) -> StudyFile:
    """The study file of the screening: the main one with overrides, without a limit."""
    values: tuple[str | int, ...] = ("dense", screen.stride, screen.trials, "none", "none")
    keys = CHANGED if file.study.images is None else [key.replace("texts.", "images.") for key in CHANGED]
    return overridden(file, {**dict(zip(keys, values, strict=True)), "limit": "none"})


def renamed(watch: EventHandler) -> EventHandler:
    """A handler that names the trials in events of a screening `screening`."""

    def on_event(event: Event) -> None:
        if isinstance(event, Message):
            event = Message(f"screening: {event.text}")
        if isinstance(event, TrialStarted):
            event = replace(event, title=event.title.replace("trial", "screening", 1))
        watch(replace(event, what="screening") if isinstance(event, TrialEnded) else event)

    return on_event


def confirmed(screened: Sequence[FrozenTrial], space: Space, count: int) -> list[Params]:
    """Parameters of the best screened trials (given best first) that are not near a better one or uniform."""
    uniform, chosen = space.uniform(), list[Params]()
    for trial in screened:
        others = [*uniform, *chosen]
        if len(chosen) < count and not any(is_near(trial.params, other, space) for other in others):
            chosen.append(trial.params)
    return chosen


def is_near(point: Params, other: Params, space: Space) -> bool:
    """Whether two points have one pruner and allocation, and parameters within `APART` of each other."""
    moved = space.within(other, point["allocation"])
    return moved is not None and samplers.is_near(point, moved, space.kinds(point["allocation"]), APART)
