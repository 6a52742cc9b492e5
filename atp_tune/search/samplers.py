"""The sampler and the stopper of a study, and the trials that it begins with."""

import math
import random
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from numbers import Real
from time import monotonic, sleep
from typing import Any

import optuna
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from atp_tune.config.search import SAMPLERS, SearchConfig
from atp_tune.errors import PluginError, UserError
from atp_tune.plan import METHODS
from atp_tune.plugins import guarded, short_name
from atp_tune.search.space import Distributions, Params, Space
from atp_tune.storage.progress import counts, experimental, order, retry_history, running, trials_in
from atp_tune.utils.compat import SearchSpace, fitted
from atp_tune.utils.registry import Origin

# --- The trials of one allocation as a sampler is fitted to them, and where the points that it proposes may lie.
#
# A measured point teaches nothing new. Where the best point is an end of its interval (uniform, if β > 0 does not
# help), the GP's acquisition has its maximum at that same point again and again. Then a neighbour is drawn uniformly,
# at most a 40th of each interval away, and twice as far after each draw that is known too.

LEAST = 1e-6  # nats per token: a smaller KL is raised to this before its log is taken
NEAR = 1 / 500  # of an interval: two β of SmolLM2 at 60 % this near differ by less than one weight per row
REACH = 1 / 40  # of an interval, for the first draw
DRAWS = 20
ORDER = ("misses", "nlls")  # attributes by which equal values are ordered
GRID = 40  # steps of β at which the posterior is stored


def branch_study(
    trials: Sequence[FrozenTrial], space: Space, branch: str, kinds: Distributions, objectives: int = 1
) -> optuna.Study:
    """An in-memory study of an allocation's points, with the logs of their first values and what `order` reads."""
    shadow = optuna.create_study(directions=["minimize"] * objectives)
    for trial in trials:
        params = space.within(trial.params, branch) or {}
        if kinds.keys() <= params.keys():  # a trial of another process may lack parameters that it has yet to draw
            done = [] if trial.values is None else trial.values[:objectives]
            logs = [math.log(max(value, LEAST)) for value in done] or None
            shadow.add_trial(
                optuna.create_trial(
                    state=trial.state,
                    values=logs,
                    params={name: params[name] for name in kinds},
                    distributions=kinds,
                    user_attrs={key: trial.user_attrs[key] for key in ORDER if key in trial.user_attrs},
                )
            )
    return shadow


def levelled(screened: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Screening trials without a full measurement, their values scaled to the level of the full measurements.

    The factor is the geometric mean of full / screened at the points that have both; no trials where no point has both.
    """
    values = {_point(trial): trial.value for trial in trials} if screened else {}
    ratios = [
        math.log(max(full, LEAST) / max(trial.value, LEAST))
        for trial in screened
        if trial.value is not None and (full := values.get(_point(trial))) is not None
    ]
    if not ratios:
        return []
    factor = math.exp(statistics.fmean(ratios))
    return [
        with_value(trial, factor * trial.value)
        for trial in screened
        if _point(trial) not in values and trial.value is not None
    ]


def with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    """A trial of the same point with this value alone."""
    return optuna.create_trial(value=value, params=trial.params, distributions=trial.distributions)


def _point(trial: FrozenTrial) -> tuple[tuple[str, Any], ...]:
    """A trial's parameters sorted by name: databases return them in any order."""
    return tuple(sorted(trial.params.items()))


def open_kinds(kinds: Distributions) -> Distributions:
    """The distributions with more than one value, which a process is fitted over."""
    return {name: kind for name, kind in kinds.items() if not kind.single()}


def around_best(study: Study, kinds: Distributions) -> Distributions:
    """The intervals, narrowed around the best point if there are more than two.

    A dozen trials cannot explore five dimensions: a GP would try all the corners, which are hopeless. So proposals
    stay within 1 / (2 √n) of each interval from the best of n measured points.
    """
    done = [trial for trial in study.trials if trial.values is not None]
    if not done or len(study.directions) > 1:
        return kinds
    near = beside(min(done, key=order).params, kinds, 0.5 / math.sqrt(len(done)))
    return kinds | near if len(near) > 2 else kinds


def beside(point: Params, kinds: Distributions, reach: float) -> dict[str, FloatDistribution]:
    """The parts of the intervals around a point, `reach` of each one's width to either side."""
    parts = {}
    for name, kind in kinds.items():
        if isinstance(kind, FloatDistribution):
            value, width = point[name], reach * (kind.high - kind.low)
            parts[name] = FloatDistribution(max(kind.low, value - width), min(kind.high, value + width))
    return parts


def nudge_from_known(point: Params, trials: Sequence[FrozenTrial], kinds: Distributions, seed: int) -> Params:
    """The point itself, or a random neighbour if a trial (finished or running) is near the point."""
    drawn, reach, generator = point, REACH, random.Random(seed)
    for _ in range(DRAWS):
        if not any(is_near(drawn, trial.params, kinds, NEAR) for trial in trials):
            return drawn
        near = beside(point, kinds, reach)
        drawn = point | {name: generator.uniform(part.low, part.high) for name, part in near.items()}
        reach *= 2
    return drawn


def is_near(point: Params, other: Params, kinds: Distributions, share: float) -> bool:
    """Whether two points differ in numbers only, and by no more than this share of each interval."""
    return all(
        abs(point[name] - other[name]) <= share * (kind.high - kind.low)
        if isinstance(kind, FloatDistribution)
        else point[name] == other[name]
        for name, kind in kinds.items()
    )


def gp_posterior(sampler: GPSampler, study: Study, kinds: Distributions, pruners: tuple[str, ...]) -> dict[str, Any]:
    """The GP's posterior of the value over β for each pruner: mean, and mean ± two standard deviations, for plots.

    `study` is the one that the GP was fitted to: its values are logs. `before` counts those values.
    """
    gp = fitted(sampler)
    values = [trial.value for trial in study.trials if trial.value is not None]
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    curves = {}
    for pruner in pruners:
        each = ({name: pruner if name in METHODS else beta for name in kinds} for beta in _grid(kinds["beta"]))
        points = [optuna.create_trial(value=0.0, params=params, distributions=kinds) for params in each]
        means, deviations = posterior_at(gp, points, kinds)
        middle, width = mean + spread * means, 2 * spread * deviations
        lines = {"mean": middle, "low": middle - width, "high": middle + width}
        betas = [round(point.params["beta"], 8) for point in points]
        curves[pruner] = {"beta": betas} | {name: [round(math.exp(v), 3) for v in line] for name, line in lines.items()}
    return {"before": len(values), "curves": curves}


def posterior_at(gp: Any, points: list[FrozenTrial], kinds: Distributions) -> tuple[Any, Any]:
    """Mean and standard deviation of a fitted GP's posterior at points, as arrays, for standardised values."""
    inputs = gp._X_train.new_tensor(SearchSpace(kinds).get_normalized_params(points))
    means, variances = (tensor.detach().numpy() for tensor in gp.posterior(inputs))
    return -means, variances**0.5  # the GP maximises: its values are negated


def _grid(kind: BaseDistribution) -> list[float]:
    assert isinstance(kind, FloatDistribution)
    steps = [kind.low + (kind.high - kind.low) * k / GRID for k in range(GRID)]
    return [*steps, kind.high]  # a computed end may exceed `high` by rounding, which Optuna refuses


PATIENCE = 5  # seconds that a trial waits for the proposals of earlier trials
LOOK = 0.02  # seconds between looks at them
STARTS = 3  # points of an allocation measured before a model is fitted: plenty for one to three parameters


def make_sampler(search: SearchConfig, space: Space, screened: Sequence[FrozenTrial] = ()) -> BaseSampler:
    """The sampler of a study; `screened`: the trials of its screening, if there was one and it had the same values.

    Its proposals depend on the study's seed, the trial's place and the stored trials, not on the process: an
    interrupted study resumes as if it had not been interrupted, and workers draw different points.
    """
    make: Make = SAMPLERS[short_name(search.sampler)]
    if make is at_random:
        return at_random(search.seed)
    return BranchSampler(make, search.seed, space, screened)


def gp(seed: int) -> GPSampler:
    """A GP; its first points come from the study."""
    return GPSampler(seed=seed, n_startup_trials=STARTS)


def tpe(seed: int) -> TPESampler:
    """A TPE for several workers."""
    with experimental():
        return TPESampler(seed=seed, n_startup_trials=STARTS, multivariate=True, constant_liar=True)


def trial_seed(seed: int, study: Study, trial: FrozenTrial, name: str = "") -> int:
    """A seed for one trial or one of its parameters, from the trial's place: its number if no trial had been lost."""
    trials = trials_in(study)
    first = next(
        iter(retry_history(trials[trial.number])), trial.number
    )  # a repeated trial keeps the place of the first
    place = sum(not retry_history(other) for other in trials[:first])
    return zlib.crc32(f"{seed} {place} {name}".encode())


@dataclass(eq=False)
class Proposer(BaseSampler):
    """Proposes the whole point of a trial; what it lacks is drawn by new samplers that `make` creates from seeds.

    Those are of the study's seed, the trial's place and the parameter's name.
    """

    make: "Make"
    seed: int
    _kinds: Distributions = field(init=False, default_factory=dict)
    _point: Params = field(init=False, default_factory=dict)

    def propose(self, study: Study, trial: FrozenTrial) -> tuple[Distributions, Params]:
        """Distributions of a point, and the point; none: each parameter is drawn on its own."""
        return {}, {}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        """The distributions of the trial's point, which is proposed now."""
        self._kinds, self._point = self.propose(study, trial)
        return self._kinds

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Distributions) -> dict[str, Any]:
        """The point."""
        return self._point

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A new sampler's draw."""
        return self.make(trial_seed(self.seed, study, trial, param_name)).sample_independent(
            study, trial, param_name, param_distribution
        )


def at_random(seed: int) -> Proposer:
    """Random points, each parameter drawn on its own; for grids too, whose points are among the first trials."""
    return Proposer(RandomSampler, seed)


@dataclass(eq=False)
class BranchSampler(Proposer):
    """Chooses an allocation, and lets an inner sampler propose its parameters from this allocation's trials.

    `make` creates the inner sampler from a seed, a new one for each trial.

    Each allocation has its own parameters, which a sampler with one fixed space, such as the GP, cannot mix. Every
    other trial goes to the allocation with the fewest trials, the rest to the leading one. Uniform is a point of ATP,
    and ATP a face of the curve, so a trial of one is a trial of the allocations that contain it.

    The inner sampler sees logs of perplexity or KL: perplexity explodes where β is too large, and one such trial would
    flatten the valley in a fit without logs. It also sees screened points, scaled to the level of full measurements.
    Proposals keep away from all these points.
    """

    space: Space
    screened: Sequence[FrozenTrial] = ()

    def propose(self, study: Study, trial: FrozenTrial) -> tuple[Distributions, Params]:
        """The allocation whose turn it is, and the inner sampler's proposal in an in-memory study of its trials."""
        wait_for_earlier(study, trial, self.space)
        branch = whose_turn(_others(study, trial), self.space)
        return self.space.branch_distributions(branch), self._drawn(study, trial, branch, self.space.kinds(branch))

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Distributions) -> dict[str, Any]:
        """The point; of a space that was not inferred here one that the inner sampler draws, as Optuna asks for."""
        if search_space.keys() == self._kinds.keys():
            return self._point
        return self._drawn(
            study, trial, "", {name: kind for name, kind in search_space.items() if name != "allocation"}
        )

    def _drawn(self, study: Study, trial: FrozenTrial, branch: str, own: Distributions) -> Params:
        space, others = self.space, _others(study, trial)
        trials, count = [*others, *levelled(self.screened, others)], len(study.directions)
        shadow = branch_study(trials, space, branch, own, count)
        open_ones = around_best(shadow, open_kinds(own))
        shadow.ask()  # stands in for the trial: the inner sampler writes attributes to it
        inner = self.make(trial_seed(self.seed, study, trial))
        params = inner.sample_relative(shadow, shadow.trials[-1], open_ones)
        if branch == "atp" and params and isinstance(inner, GPSampler) and len(study.directions) == 1:
            study.set_user_attr("gp_posterior", gp_posterior(inner, shadow, open_ones, space.pruners))
        for name, kind in open_ones.items():
            if name not in params:
                params[name] = inner.sample_independent(shadow, shadow.trials[-1], name, kind)
        params = {name: params[name] if name in params else _only(own[name]) for name in own}
        # Of failed trials too: else the inner sampler proposes them again.
        lost = [trial for trial in trials_in(study, TrialState.FAIL) if counts(trial) and "allocation" in trial.params]
        failed = branch_study(lost, space, branch, own, count).trials
        seed = trial_seed(self.seed, study, trial, "apart")
        point = {"allocation": branch, **nudge_from_known(params, [*shadow.trials[:-1], *failed], open_ones, seed)}
        return space.at(point, point.get("sparsity"))


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
    others = trials_in(study, TrialState.COMPLETE, TrialState.RUNNING)
    return [other for other in others if other.number != trial.number and "allocation" in other.params]


def whose_turn(trials: list[FrozenTrial], space: Space) -> str:
    """The allocation of the next trial: by turns the allocation with the fewest trials and the leading one.

    Allocations without parameters have one point per pruner, which is measured at the start.
    """
    open_ones = list(filter(space.is_open, space.intervals))
    if not open_ones:
        return next(iter(space.intervals))
    tried = Counter(trial.params["allocation"] for trial in trials)
    fewest = min(open_ones, key=lambda name: tried[name])
    done = [trial for trial in trials if trial.values is not None and trial.params["allocation"] in open_ones]
    if len(trials) % 2 == 0 or not done or not space.has_leader:
        return fewest
    return str(min(done, key=order).params["allocation"])


def make_stopper(search: SearchConfig) -> BasePruner:
    """The Optuna pruner that ends hopeless trials, which compares trials by groups of windows."""
    with experimental():
        return WilcoxonPruner() if search.stopper == "wilcoxon" else NopPruner()


# --- A sampler that is a plug-in: a function from a seed to an Optuna sampler, whose proposals are checked.

Make = Callable[[int], BaseSampler]


@dataclass(eq=False)
class CheckedSampler(BaseSampler):
    """The sampler of a plug-in; PluginError for a proposal outside its interval."""

    inner: BaseSampler
    origin: Origin

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Distributions:
        """The search space of the plug-in."""
        with guarded(self.origin, "infer_relative_search_space"):
            return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Distributions) -> dict[str, Any]:
        """The plug-in's proposal; parameters that it leaves out are drawn one by one."""
        with guarded(self.origin, "sample_relative"):
            params = dict(self.inner.sample_relative(study, trial, search_space))
        return {name: self._checked(name, params[name], kind) for name, kind in search_space.items() if name in params}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The plug-in's draw of one parameter."""
        with guarded(self.origin, "sample_independent"):
            value = self.inner.sample_independent(study, trial, param_name, param_distribution)
        return self._checked(param_name, value, param_distribution)

    def _checked(self, name: str, value: Any, kind: BaseDistribution) -> Any:
        """The value, if it is one that Optuna may store for this distribution."""
        if isinstance(kind, FloatDistribution | IntDistribution):
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            is_inside = is_number and kind.low <= value <= kind.high
        else:
            is_inside = isinstance(kind, CategoricalDistribution) and value in kind.choices
        if not is_inside:
            raise PluginError(f"{self.origin}: proposed {name} = {value!r}, which is outside {kind}")
        return value


def finished(function: Any, origin: Origin) -> Make:
    """The function of a plug-in; UserError if it is none."""
    if not callable(function):
        raise UserError(f"{origin}: is no sampler: must be a function from a seed to an Optuna sampler")

    def make(seed: int) -> BaseSampler:
        with guarded(origin, "it could not be made"):
            sampler = function(seed)
        if not isinstance(sampler, BaseSampler):
            raise PluginError(f"{origin}: made {type(sampler).__name__}, not an Optuna sampler")
        return CheckedSampler(sampler, origin)

    make.__doc__ = getattr(function, "__doc__", None)
    return make
