"""The parts of a study: how many there are of each, and what one takes, in tokens through all blocks and in seconds.

`plan` and the bar that shows the time left read the same list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from atp_tune.allocations import ALLOCATIONS
from atp_tune.cost.forecast import Passes, ProbeRates, passes
from atp_tune.cost.memory import Tokens
from atp_tune.metrics.continuations import PROMPTS
from atp_tune.metrics.speed import RUNS, STEPS, TOKENS
from atp_tune.spec.recover import FEWEST
from atp_tune.spec.study import Study

GENERATED = 32  # tokens that are read in the time of one that is generated, beside those of two other prompts
ALONE = 3 * GENERATED  # the same of one that is generated alone
LEVELS = 9  # at which a descent asks for the weights of a linear, in the mean; as measured on SmolLM2 at 60 %


@dataclass(frozen=True)
class Amounts:
    """A study and the sizes of its texts, from which its tokens follow."""

    study: Study
    tokens: Tokens
    windows: int  # of the calibration text
    validation_windows: int
    passes: float  # forward passes that a token of a step by prices costs; at most, until the model is loaded
    is_short: bool  # the first draw is fitted anew too, see `Session.is_short`; False until the text is read

    @property
    def costs(self) -> dict[str, Passes]:
        """The passes of a trial, by pruner."""
        study, tokens = self.study, self.tokens
        evaluated = tokens.validation + (tokens.test if study.compares_all else 0)
        names = study.methods.short_names
        return {name: passes(study.prune.statistics, study.methods.measures(name), tokens, evaluated) for name in names}

    @property
    def screened(self) -> int:
        """Tokens that a trial of the screening is evaluated on; 0 without a screening."""
        screen = self.study.search.screen
        return 0 if screen is None else self.tokens.validation // self.windows_of(1) * self.windows_of(screen.stride)

    def windows_of(self, stride: int) -> int:
        """Number of validation windows of which one in `stride` is taken."""
        return -(-self.validation_windows // stride)


@dataclass(frozen=True)
class Part:
    """Work of one kind: its `number`, how many are `left`, and tokens and seconds of each.

    `tokens` go through all blocks; `size` is tokens that take as long, also where nothing is counted in tokens.
    `prices` are the seconds of each for descents. Seconds are NaN without a probe.
    """

    name: str
    number: float
    left: float
    tokens: float
    seconds: float
    size: float = 0.0
    prices: float = 0.0


@dataclass(frozen=True)
class Done:
    """How far a study is: its total of trials and those that count, of its screening too; whether it is trained."""

    total: int
    trials: int = 0
    screening_total: int = 0
    screening: int = 0
    is_trained: bool = False


def parts(known: Amounts, done: Done, rates: ProbeRates) -> Iterator[Part]:
    """Yields the parts of a study, in the order in which it runs them."""
    study, tokens, costs, dense = known.study, known.tokens, known.costs, known.tokens.validation
    is_open = done.trials < done.total
    pruning = fmean(cost.total - cost.evaluate for cost in costs.values())

    def plan(evaluated: int, role: str) -> float:
        """Seconds to prune by one plan and evaluate it on so many tokens of a text, the mean over pruners."""
        one = {name: cost.model_copy(update={"evaluate": evaluated}) for name, cost in costs.items()}
        return fmean(rates.trial(name, cost, role).total for name, cost in one.items())

    # The model, and the statistics of the dense model that several trials share.
    shared = statistics_kinds(study) * tokens.calibration
    curve = rates.blocks * tokens.curve * rates.run["calibration"]
    yield Part("loading", 1, is_open, tokens.curve + 2 * shared, rates.load + curve + rates.statistics(shared))
    yield Part("dense", 1, is_open and not done.trials, dense, rates.dense_on(dense, "validation"), dense)
    if screened := known.screened:
        ranked = dense_kinds(study) * tokens.calibration
        seconds = rates.statistics(ranked) + rates.dense_on(screened, "validation")
        yield Part("dense", 1, not done.screening, screened + 2 * ranked, seconds, dense)
        alone = Passes(listen=0, run=0, evaluate=screened)
        seconds = fmean(rates.trial(name, alone, "validation").total for name in costs)
        left = max(0, done.screening_total - done.screening)
        yield Part("screening", done.screening_total, left, screened, seconds, screened)
    # Descents by prices, then the trials.
    descended, number = descent_tokens(known), len(study.descents)
    by_prices = rates.statistics(descended) + _own_weights(known, rates) + _waiting(known, rates)
    if descended:
        each, seconds = 2 * descended / number, by_prices / number
        yield Part("prices", number, 0 if done.trials or not is_open else number, each, seconds, each, seconds)
    sent = fmean(cost.total for cost in costs.values())
    seconds = fmean(rates.trial(name, cost, "validation").total for name, cost in costs.items())
    yield Part("trial", done.total, max(0, done.total - done.trials), sent, seconds, sent)
    # The test text, and the other draws of the calibration text.
    if study.data.test is not None:
        yield Part("test", 1, is_open, tokens.test, rates.dense_on(tokens.test, "test"), tokens.test)
        again, each = pruned_again(study, done.total), pruning + tokens.test
        yield Part("test", again, again * is_open, each, plan(tokens.test, "test"), each)
    more = study.data.calibration.draws - 1
    if plans := more * compared(study) + (known.is_short and plans_anew(known)):
        role = "validation" if study.data.test is None else "test"
        evaluated = tokens.validation if study.data.test is None else tokens.test
        anew, drawn = share_anew(known), more * statistics_kinds(study) * tokens.calibration
        each = pruning + evaluated + 2 * (drawn + round(anew * descended)) / plans
        own = anew * by_prices / plans
        yield Part(
            "draw",
            plans,
            plans * is_open,
            each,
            plan(evaluated, role) + rates.statistics(drawn) / plans + own,
            each,
            own,
        )
    # What is done with the best plan.
    models, read = continued(study)
    yield Part("generate", models, models * is_open, 0, rates.read(read), read)
    if measured := speed_tokens(known):
        yield Part("speed", 1, is_open, 0, rates.read(measured) + rates.load, measured)
    if study.recover is not None:
        sent, loads = training(known)
        yield Part("training", 1, not done.is_trained, sent, rates.read(sent) + loads * rates.load, sent)


def statistics_kinds(study: Study) -> int:
    """Number of kinds of statistics that are measured once on the dense model."""
    if study.prune.statistics == "dense":
        return dense_kinds(study)
    names = study.allocation.short_names
    own = {study.prune.pruner(name).measures for name in study.own_prices} - {None}
    return len(own) + any(getattr(ALLOCATIONS[name], "measures_inputs", False) for name in names)


def dense_kinds(study: Study) -> int:
    """Number of kinds of statistics that the pruners of a study need."""
    return len({study.methods.pruner(name).measures for name in study.methods.short_names} - {None})


def pruned_again(study: Study, trials: int) -> int:
    """Number of plans that are pruned again for the test text.

    Over an interval without a limit all trials may be on the front, or be the uniform ones beside it.
    """
    if study.compares_all:
        return 0
    return trials if study.interval is not None and study.limit is None else compared(study)


def compared(study: Study) -> int:
    """Number of plans that all draws of the calibration text prune: at most those that lead, and their uniforms."""
    return max(1, study.leaders + min(study.leaders, len(study.methods.short_names)))


def step_tokens(known: Amounts) -> int:
    """Tokens of a step by prices, of bits the only one; 0 without that allocation."""
    from atp_tune.run.prices import items_of_costs, windows_of_step

    length = known.tokens.calibration // known.windows
    if not known.study.allocation.by_prices:
        return 0
    return length * (items_of_costs(length) if known.study.by_bits else windows_of_step(length, _path(known)))


def _path(known: Amounts) -> tuple[float, ...]:
    """The targets of a descent by prices."""
    from atp_tune.allocations.prices import path

    return path(*known.study.interval) if known.study.interval else (known.study.highest,)


def plans_anew(known: Amounts) -> int:
    """Number of plans that each draw of the calibration text finds anew by a descent."""
    study = known.study
    return min(len(study.allocation.by_prices), study.leaders, len(study.descents))


def share_anew(known: Amounts) -> float:
    """The descents of all draws of the calibration text, as a share of the study's own."""
    more = known.study.data.calibration.draws - 1
    return (more + known.is_short) * plans_anew(known) / max(1, len(known.study.descents)) if more else 0.0


def descent_tokens(known: Amounts) -> int:
    """Tokens of the descents by prices, counted as those that dense statistics measure, which go through twice.

    There is one descent for each score, with rows and without, and for each pruner's own weights. One with rows needs
    the dense model's final states of what it draws from its pool, at most all, for KL.
    """
    from atp_tune.run.prices import POOL

    return round(_steps(known) * known.passes * step_tokens(known) + rows_descents(known) * POOL) // 2


def _steps(known: Amounts) -> int:
    """Steps of all descents by prices."""
    from atp_tune.allocations.prices import steps_along

    return len(known.study.descents) * (1 if known.study.by_bits else steps_along(_path(known)))


def rows_descents(known: Amounts) -> int:
    """The number of descents whose rows move too."""
    return sum(rows for _, rows in known.study.descents)


def _waiting(known: Amounts, rates: ProbeRates) -> float:
    """Seconds in which descents wait for streamed blocks, which each step copies upwards and on the way back."""
    return max(0.0, rates.blocks * 2 * _steps(known) * rates.fetch - rates.statistics(descent_tokens(known)))


def _own_weights(known: Amounts, rates: ProbeRates) -> float:
    """Seconds in which pruners make the weights of descents by their own."""
    pruned = sum(rates.pruners[name].prune for name in known.study.own_prices)
    return LEVELS * len(_path(known)) * rates.blocks * pruned if pruned else 0.0


def continued(study: Study) -> tuple[int, int]:
    """How many models continue prompts at the end, and tokens of each that take as long to read."""
    tokens = study.continuations.tokens
    if not tokens or study.images is not None:
        return 0, 0
    return 2 + max(1, study.leaders), (len(PROMPTS) + len(study.continuations.prompts)) * tokens * GENERATED


def speed_tokens(known: Amounts) -> int:
    """Tokens that take as long to read as the best plan is pruned once more, and measured beside the dense model."""
    if not known.study.speed:
        return 0
    pruned = min(cost.total - cost.evaluate for cost in known.costs.values())
    return pruned + 2 * (1 + RUNS) * (TOKENS + STEPS * ALONE)


def training(known: Amounts) -> tuple[int, int]:
    """Tokens of the training of the best plan's kept weights, at most, and how often a model is loaded for it.

    A token goes back through all blocks in the time of two forward passes. The plan is measured before and after; the
    dense model sees the held-out windows once.
    """
    recover = known.study.recover
    assert recover is not None
    length = recover.seqlen or known.tokens.validation // known.validation_windows
    trained, models = recover.steps * recover.batch * length, 1 + recover.has_teacher
    held_out, times = FEWEST * length, 1 + recover.steps // recover.eval_every
    forward = models * trained + held_out * (times + models - 1)
    return forward + 2 * trained + 2 * (known.tokens.validation + known.tokens.test), 3 + models


def sums(found: list[Part]) -> tuple[int, float | None, float | None]:
    """Tokens, seconds and seconds left of parts; None for seconds that are not known."""
    seconds = sum(part.number * part.seconds for part in found if part.number)
    left = sum(part.left * part.seconds for part in found if part.left)
    known = not math.isnan(seconds)
    return round(sum(part.number * part.tokens for part in found)), seconds if known else None, left if known else None
