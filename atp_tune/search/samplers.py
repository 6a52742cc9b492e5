"""How Optuna proposes and stops: the sampler and the stopper of a study."""

import random
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from time import monotonic, sleep
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from atp_tune.search.posterior import gp_posterior
from atp_tune.search.proposals import around_best, branch_study, kinds_of, levelled, nudge_from_known
from atp_tune.search.space import Params, Space
from atp_tune.spec.study import SearchConfig
from atp_tune.storage.lost_trials import place_of
from atp_tune.storage.ranking import values_of
from atp_tune.storage.totals import counts

PATIENCE = 5  # seconds that a trial waits for what others propose
LOOK = 0.02  # seconds between looks at them
STARTS = 3  # measured points of an allocation before a model of it is fitted: plenty for one to three parameters


def make_sampler(search: SearchConfig, space: Space, screened: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """The sampler of a study; `screened`: trials of the screening before it, if there was one.

    What it proposes depends on the study's seed, the trial's place and the trials that are there, not on the process:
    a study that was interrupted goes on as if it had not been, and workers draw apart from each other.
    """
    match search.sampler:
        case "gp":
            return BranchSampler(_gp, space, search.seed, screened)
        case "tpe":
            return BranchSampler(_tpe, space, search.seed, screened)
        case "grid" | "random":  # all points of a grid are among the first trials
            return SeededSampler(search.seed)


def _gp(seed: int) -> GPSampler:
    return GPSampler(seed=seed, n_startup_trials=STARTS)


def _tpe(seed: int) -> TPESampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True, constant_liar=True)


def seed_of(seed: int, study: Study, trial: FrozenTrial, name: str = "") -> int:
    """A seed for one trial, or one parameter of it, by its place: its number, had no trial been lost."""
    return zlib.crc32(f"{seed} {place_of(study, trial)} {name}".encode())


class SeededSampler(BaseSampler):
    """Random proposals by the study's seed, the trial's place and the parameter's name."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Nothing: each parameter is drawn on its own."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform draw."""
        sampler = RandomSampler(seed=seed_of(self._seed, study, trial, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class BranchSampler(BaseSampler):
    """Chooses an allocation, and lets a sampler propose its parameters from what is known of this allocation.

    `make` gives the sampler inside for a seed, a new one for each trial.

    Each allocation has parameters of its own, which samplers of one fixed space, like the GP, cannot mix. Every other
    trial goes to the allocation with the fewest trials, the others to the one that leads: all get a fair try, and the
    winner most of the work. Uniform is a point of ATP, and ATP a face of the curve: what was measured there counts.

    The sampler sees logs of the values: of perplexity (nats per token) or of KL. Perplexity explodes where β is too
    large: fitted as it is, one such trial flattens the valley that matters. Points that were screened are seen too,
    moved to the level of those that were confirmed. What it proposes keeps away from all of these.
    """

    def __init__(
        self, make: Callable[[int], BaseSampler], space: Space, seed: int, screened: Sequence[FrozenTrial] = ()
    ) -> None:
        self._make = make
        self._space = space
        self._seed = seed
        self._screened = screened
        self._branch = ""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Pruner, allocation and the parameters of the allocation whose turn it is."""
        wait_for_earlier(study, trial, self._space)
        self._branch = whose_turn(_others(study, trial), self._space)
        allocations = CategoricalDistribution(tuple(self._space.intervals))
        return {"allocation": allocations, **kinds_of(self._space, self._branch)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the inner sampler proposes in a study in memory that holds this allocation's trials alone."""
        own = {name: kind for name, kind in search_space.items() if name != "allocation"}
        others = _others(study, trial)
        known, count = [*others, *levelled(self._screened, others)], len(study.directions)
        shadow = branch_study(known, self._space, self._branch, own, count)
        open_ones = around_best(shadow, {name: kind for name, kind in own.items() if not kind.single()})
        shadow.ask()  # stands for the trial: the inner sampler writes to it
        inner = self._make(seed_of(self._seed, study, trial))
        found = inner.sample_relative(shadow, shadow.trials[-1], open_ones)
        if self._branch == "atp" and found and isinstance(inner, GPSampler) and len(study.directions) == 1:
            study.set_user_attr("gp_posterior", gp_posterior(inner, shadow, open_ones, self._space.pruners))
        for name, kind in open_ones.items():
            if name not in found:
                found[name] = inner.sample_independent(shadow, shadow.trials[-1], name, kind)
        found = {name: found[name] if name in found else _only(own[name]) for name in own}
        failed = branch_study(_failed(study), self._space, self._branch, own, count).trials
        seed = seed_of(self._seed, study, trial, "apart")
        return {"allocation": self._branch, **nudge_from_known(found, [*shadow.trials[:-1], *failed], open_ones, seed)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As the inner sampler does."""
        inner = self._make(seed_of(self._seed, study, trial, param_name))
        return inner.sample_independent(study, trial, param_name, param_distribution)


def wait_for_earlier(study: Study, trial: FrozenTrial, space: Space) -> None:
    """Waits until the earlier trials that run have drawn their points, as they do in milliseconds: workers that propose
    at the same moment, and so from the same trials, would propose the same point. At most `PATIENCE` seconds.
    """
    end = monotonic() + PATIENCE
    while monotonic() < end and any(_is_drawing(other, space) for other in _earlier(study, trial)):
        sleep(LOOK)


def _earlier(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [other for other in running if other.number < trial.number]


def _is_drawing(trial: FrozenTrial, space: Space) -> bool:
    """Whether a trial that began just now lacks parameters yet; one that has lacked them for long has died."""
    allocation, began = trial.params.get("allocation"), trial.datetime_start
    if allocation in space.intervals and space.intervals[allocation].keys() <= trial.params.keys():
        return False
    return began is not None and abs((datetime.now() - began).total_seconds()) < PATIENCE


def _only(kind: BaseDistribution) -> Any:
    """The value of a distribution that has one."""
    return kind.low if isinstance(kind, FloatDistribution) else kind.choices[0]  # type: ignore[attr-defined]


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    return [other for other in others if other.number != trial.number and "allocation" in other.params]


def _failed(study: Study) -> list[FrozenTrial]:
    """Trials that have no value and will have none: a sampler knows nothing of them, and would ask for them again."""
    failed = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
    return [trial for trial in failed if counts(trial) and "allocation" in trial.params]


def whose_turn(trials: list[FrozenTrial], space: Space) -> str:
    """The allocation of the next trial: by turns the one with the fewest trials and the one that leads.

    Allocations without parameters have one point for each pruner, which is measured at the start.
    """
    open_ones = [name for name in space.intervals if space.is_open(name)]
    if not open_ones:
        return next(iter(space.intervals))
    tried = Counter(trial.params["allocation"] for trial in trials)
    fewest = min(open_ones, key=lambda name: tried[name])
    done = [trial for trial in trials if trial.values is not None and trial.params["allocation"] in open_ones]
    if len(trials) % 2 == 0 or not done:
        return fewest
    best: str = min(done, key=values_of).params["allocation"]
    return best


def make_stopper(search: SearchConfig) -> BasePruner:
    """What ends hopeless trials early; trials are compared group by group of windows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return WilcoxonPruner() if search.stopper == "wilcoxon" else NopPruner()


def first_trials(search: SearchConfig, space: Space) -> list[Params]:
    """What a study asks for before its sampler does: uniform for each pruner, then where each allocation begins, or the
    points of a grid, shuffled.

    They are queued in the storage, because Optuna's GridSampler loses points over a resume, and ends in a KeyError
    where trials were queued beside a grid of one point.
    """
    if search.sampler != "grid":
        return [*space.uniform(), *space.starts()]
    points = space.grid(search.step)
    random.Random(search.seed).shuffle(points)
    return [*space.uniform(), *points]


def total_trials(search: SearchConfig, space: Space) -> int:
    """Trials of the whole study: as asked, but no more than there are points, on a grid or without parameters.

    A study that screens has, unless it is asked for more, uniform and the points that are confirmed.
    """
    if search.screen is not None:
        points = len(space.uniform()) + search.screen.confirm
        return min(search.trials or points, points) if search.sampler == "grid" else search.trials or points
    points = len(first_trials(search, space))
    if search.sampler == "grid" or not any(map(space.is_open, space.intervals)):
        return min(search.trials or points, points)
    assert search.trials is not None
    return search.trials
