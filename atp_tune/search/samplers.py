"""The sampler and the stopper of a study, and the trials that it begins with."""

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

from atp_tune.plugins import short_name
from atp_tune.search.proposals import around_best, branch_study, gp_posterior, levelled, nudge_from_known
from atp_tune.search.space import Space
from atp_tune.spec.search import SAMPLERS, SearchConfig
from atp_tune.storage.lost_trials import place_of
from atp_tune.storage.progress import counts, place, running

PATIENCE = 5  # seconds that a trial waits for the proposals of earlier trials
LOOK = 0.02  # seconds between looks at them
STARTS = 3  # points of an allocation measured before a model is fitted: plenty for one to three parameters


def make_sampler(search: SearchConfig, space: Space, screened: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """The sampler of a study; `screened`: the trials of its screening, if there was one and it had the same values.

    Its proposals depend on the study's seed, the trial's place and the stored trials, not on the process: an
    interrupted study resumes as if it had not been interrupted, and workers draw different points.
    """
    make = SAMPLERS[short_name(search.sampler)]
    if make is SeededSampler:  # all points of a grid are among the first trials
        return SeededSampler(search.seed)
    return BranchSampler(make, space, search.seed, screened)


def gp(seed: int) -> GPSampler:
    """A GP; its first points come from the study."""
    return GPSampler(seed=seed, n_startup_trials=STARTS)


def tpe(seed: int) -> TPESampler:
    """A TPE for several workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True, constant_liar=True)


def seed_of(seed: int, study: Study, trial: FrozenTrial, name: str = "") -> int:
    """A seed for one trial or one of its parameters, from the trial's place: its number if no trial had been lost."""
    return zlib.crc32(f"{seed} {place_of(study, trial)} {name}".encode())


class SeededSampler(BaseSampler):
    """Random proposals, seeded with the study's seed, the trial's place and the parameter's name; for grids too."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Empty: each parameter is drawn on its own."""
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Empty."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A uniform draw."""
        sampler = RandomSampler(seed=seed_of(self._seed, study, trial, param_name))
        return sampler.sample_independent(study, trial, param_name, param_distribution)


class BranchSampler(BaseSampler):
    """Chooses an allocation, and lets an inner sampler propose its parameters from this allocation's trials.

    `make` creates the inner sampler from a seed, a new one for each trial.

    Each allocation has its own parameters, which a sampler with one fixed space, such as the GP, cannot mix. Every
    other trial goes to the allocation with the fewest trials, the rest to the leading one. Uniform is a point of ATP,
    and ATP a face of the curve, so a trial of one is a trial of the allocations that contain it.

    The inner sampler sees logs of perplexity or KL: perplexity explodes where β is too large, and one such trial would
    flatten the valley in a fit without logs. It also sees screened points, scaled to the level of full measurements.
    Proposals keep away from all these points.
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
        """Pruner, allocation, and the parameters of the allocation whose turn it is."""
        wait_for_earlier(study, trial, self._space)
        self._branch = whose_turn(_others(study, trial), self._space)
        allocations = CategoricalDistribution(tuple(self._space.intervals))
        return {"allocation": allocations, **self._space.kinds(self._branch)}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The inner sampler's proposal in an in-memory study of this allocation's trials."""
        own = {name: kind for name, kind in search_space.items() if name != "allocation"}
        others = _others(study, trial)
        known, count = [*others, *levelled(self._screened, others)], len(study.directions)
        shadow = branch_study(known, self._space, self._branch, own, count)
        open_ones = around_best(shadow, {name: kind for name, kind in own.items() if not kind.single()})
        shadow.ask()  # stands in for the trial: the inner sampler writes attributes to it
        inner = self._make(seed_of(self._seed, study, trial))
        found = inner.sample_relative(shadow, shadow.trials[-1], open_ones)
        if self._branch == "atp" and found and isinstance(inner, GPSampler) and len(study.directions) == 1:
            study.set_user_attr("gp_posterior", gp_posterior(inner, shadow, open_ones, self._space.pruners))
        for name, kind in open_ones.items():
            if name not in found:
                found[name] = inner.sample_independent(shadow, shadow.trials[-1], name, kind)
        found = {name: found[name] if name in found else _only(own[name]) for name in own}
        lost = study.get_trials(deepcopy=False, states=(TrialState.FAIL,))  # else the inner sampler proposes them again
        lost = [trial for trial in lost if counts(trial) and "allocation" in trial.params]
        failed = branch_study(lost, self._space, self._branch, own, count).trials
        seed = seed_of(self._seed, study, trial, "apart")
        point = {"allocation": self._branch, **nudge_from_known(found, [*shadow.trials[:-1], *failed], open_ones, seed)}
        return self._space.at(point, point.get("sparsity"))

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The inner sampler's draw."""
        inner = self._make(seed_of(self._seed, study, trial, param_name))
        return inner.sample_independent(study, trial, param_name, param_distribution)


def wait_for_earlier(study: Study, trial: FrozenTrial, space: Space) -> None:
    """Waits at most `PATIENCE` seconds until the earlier running trials have drawn their points.

    Drawing takes milliseconds. Workers that proposed from the same trials would propose the same point.
    """
    end = monotonic() + PATIENCE
    while monotonic() < end and any(
        other.number < trial.number and _is_drawing(other, space) for other in running(study)
    ):
        sleep(LOOK)


def _is_drawing(trial: FrozenTrial, space: Space) -> bool:
    """Whether a trial that began just now still lacks parameters; a trial that lacks them for long has died."""
    allocation, began = trial.params.get("allocation"), trial.datetime_start
    if allocation in space.intervals and space.intervals[allocation].keys() <= trial.params.keys():
        return False
    return began is not None and abs((datetime.now() - began).total_seconds()) < PATIENCE


def _only(kind: BaseDistribution) -> Any:
    """The only value of a distribution."""
    return kind.low if isinstance(kind, FloatDistribution) else kind.choices[0]  # type: ignore[attr-defined]


def _others(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    others = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING))
    return [other for other in others if other.number != trial.number and "allocation" in other.params]


def whose_turn(trials: list[FrozenTrial], space: Space) -> str:
    """The allocation of the next trial: by turns the allocation with the fewest trials and the leading one.

    Allocations without parameters have one point per pruner, which is measured at the start.
    """
    open_ones = [name for name in space.intervals if space.is_open(name)]
    if not open_ones:
        return next(iter(space.intervals))
    tried = Counter(trial.params["allocation"] for trial in trials)
    fewest = min(open_ones, key=lambda name: tried[name])
    done = [trial for trial in trials if trial.values is not None and trial.params["allocation"] in open_ones]
    if len(trials) % 2 == 0 or not done or not space.has_leader:
        return fewest
    return str(min(done, key=place).params["allocation"])


def make_stopper(search: SearchConfig) -> BasePruner:
    """The Optuna pruner that ends hopeless trials, which compares trials by groups of windows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return WilcoxonPruner() if search.stopper == "wilcoxon" else NopPruner()
