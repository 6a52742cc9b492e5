"""The cost of a study in tokens and seconds, from its sizes and the rates of a short probe. Needs no torch.

With N calibration tokens, E validation tokens and C tokens of the error curve, a trial sends through every block

    block         N to measure statistics, N through the pruned block, E to evaluate
    sequential    N to measure statistics and through the pruned block at once, E to evaluate
    dense         C through the pruned block, E to evaluate; once for all trials N for each kind of statistics
    screening     a part of E to evaluate; once for all trials N for each kind of statistics

The document (`atp_tune.plan/2`) is published: keys are added under the same number, never renamed or removed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

from atp_tune.allocations import ALLOCATIONS
from atp_tune.allocations.gradient import steps_along
from atp_tune.allocations.types import BLOCKS
from atp_tune.checkpoints.files import Free, Offload, states
from atp_tune.config.prune import FEWEST
from atp_tune.config.study import Study
from atp_tune.metrics import PROMPTS, RUNS, STEPS, TOKENS
from atp_tune.utils.registry import FrozenModel

# --- The memory of a study: peak bytes on host and device, and which of them do not fit. Needs no torch.

GIB = 1024**3


@dataclass(frozen=True)
class Tokens:
    """Number of tokens of each text, and of the error curve."""

    calibration: int
    validation: int
    test: int
    curve: int

    @classmethod
    def of(cls, items: Mapping[str, tuple[int, int]], most: int) -> "Tokens":
        """Those of items by role, which are a number and a length; `most`: of the curve, but at least one item."""
        size = {role: number * length for role, (number, length) in items.items()}
        number, length = items["calibration"]
        curve = min(number, max(1, most // length)) * length if most else 0
        return cls(size["calibration"], size["validation"], size.get("test", 0), curve)


class Memory(FrozenModel):
    """Peak and free bytes.

    `host`: while trials run. `loading`: while the model is loaded, including mapped files, which the system can evict.
    `device`: null if the device has no memory limit of its own.
    """

    host: int
    loading: int
    device: int | None
    host_free: int
    device_free: int | None


@dataclass(frozen=True)
class Bytes:
    """The parts of the peak, in bytes."""

    total: int  # all weights
    blocks: int  # weights of the blocks
    largest: int  # weights of the largest block
    files: int  # weights as stored in the files
    converts: bool  # loading converts the weights
    calibration: int  # hidden states of the calibration text
    validation: int  # hidden states of the validation or test text, whichever is larger
    dense: int  # states of the dense model, in host memory
    work: int
    process: int
    sequential: int = 0  # activations of all calibration windows within a block, where linears are pruned in order

    @property
    def states(self) -> int:
        """Peak of the hidden states."""
        return states(self.calibration, self.validation, self.sequential)


def peaks(held: Bytes, offload: Offload, free: Free, has_own_memory: bool) -> Memory:
    """The peaks on host and device; `has_own_memory`: the device's memory is not the host's."""
    weights = held.total if offload == "none" else held.total - held.blocks + min(held.blocks, 2 * held.largest)
    device = weights + held.states + held.work
    waiting = held.blocks if offload == "cpu" else 0
    return Memory(
        host=held.process + waiting + held.dense + (0 if has_own_memory else device),
        loading=held.process + (held.total if held.converts else 0) + held.files,
        device=device if free.bounded else None,
        host_free=free.host,
        device_free=free.device if free.bounded else None,
    )


def problems(held: Bytes, needed: Memory, offload: Offload, windows: int) -> tuple[str, ...]:
    """A line for each peak that does not fit, with the key to change; `windows`: of the calibration text."""
    lines = []

    def check(where: str, size: int, free: int | None, spared: int, way: str, otherwise: str = "") -> None:
        """`spared`: the bytes that `way` sets free; else fewer calibration windows, if that is enough."""
        if free is None or size <= free:
            return
        each = (2 * held.calibration + held.sequential) / windows
        fitting = windows - math.ceil((size - free) / each) if each else 0
        fewer = f"set texts.calibration.nsamples = {fitting}" if fitting > 0 else otherwise
        lines.append(
            f"{where} memory: {size / GIB:.1f} GiB are needed, {free / GIB:.1f} GiB are free; "
            f"{way if spared >= size - free else fewer}"
        )

    spared = held.blocks - 2 * held.largest if offload == "none" else 0
    otherwise = "take shorter windows or a larger device"
    check("device", needed.device or 0, needed.device_free, spared, 'set model.offload = "auto"', otherwise)
    spared = held.blocks if offload == "cpu" else 0
    otherwise, size = "free some, or take a smaller model", needed.host - held.process  # which it holds already
    check("host", size, needed.host_free, spared, 'set model.offload = "disk"', otherwise)
    if held.converts:
        converts = "give the model in the number format that it is computed in, or set model.dtype to its own"
        check("host", held.total, needed.host_free, held.total, f"loading converts the weights: {converts}")
    return tuple(lines)


class Summed(FrozenModel):
    """Numbers that have a sum."""

    @property
    def total(self) -> Any:
        """The sum."""
        return sum(vars(self).values())


class Passes(Summed):
    """Tokens that one trial sends through all blocks: `listen` measures statistics, `run` is calibration, pruned."""

    listen: int
    run: int
    evaluate: int


def passes(statistics: str, measures: bool, tokens: Tokens, evaluated: int) -> Passes:
    """The passes of a trial; `measures`: its pruner needs statistics."""
    if not measures or statistics == "dense":
        return Passes(listen=0, run=tokens.curve, evaluate=evaluated)
    return Passes(listen=tokens.calibration if statistics == "block" else 0, run=tokens.calibration, evaluate=evaluated)


@dataclass(frozen=True)
class PrunerRate:
    """Seconds of a pruner in one block: `calibrate` per token, with its statistics, and `prune` in all."""

    calibrate: float
    prune: float


class Seconds(Summed):
    """Seconds of one trial by phase, as in its attribute `seconds`."""

    calibrate: float
    prune: float
    evaluate: float


@dataclass(frozen=True)
class ProbeRates:
    """The measurements of a probe of a model with so many `blocks`, in seconds."""

    blocks: int
    load: float
    run: Mapping[str, float]  # per token in one block, by text
    dense: float  # per token in one block, to measure statistics of the dense model
    ends: float  # per token in embedding and head
    fetch: float  # to copy one block to the device
    pruners: Mapping[str, PrunerRate]
    work: int  # peak bytes beside weights and states

    def trial(self, pruner: str, cost: Passes, role: str = "validation") -> Seconds:
        """Seconds of one trial, evaluated on the text of this role; copies of blocks count where they are slower."""
        own = self.pruners[pruner]
        calibrate = cost.run * own.calibrate
        evaluate = cost.evaluate * self.run[role]
        stall = max(0.0, self.fetch - calibrate - own.prune - evaluate)
        return Seconds(
            calibrate=self.blocks * (calibrate + stall),
            prune=self.blocks * own.prune,
            evaluate=self.blocks * evaluate + cost.evaluate * self.ends,
        )

    def dense_on(self, tokens: int, role: str) -> float:
        """Seconds of the dense model on a text."""
        return self.blocks * max(self.fetch, tokens * self.run[role]) + tokens * self.ends

    def statistics(self, tokens: float) -> float:
        """Seconds to measure statistics of the dense model."""
        return self.blocks * tokens * self.dense

    def read(self, tokens: float) -> float:
        """Seconds of tokens through the whole model."""
        return tokens * (self.blocks * self.run["validation"] + self.ends)


NAN = math.nan
UNKNOWN = ProbeRates(
    0, NAN, defaultdict(lambda: NAN), NAN, NAN, NAN, defaultdict(lambda: PrunerRate(NAN, NAN)), 0
)  # without a probe


class Weights(FrozenModel):
    """Bytes of the weights in the dtype of the computation, and their offload."""

    bytes: int
    blocks: int
    largest_block: int
    offload: Offload


class TrialCost(FrozenModel):
    """One trial of a pruner, in the study or in its screening; seconds are null without a probe."""

    what: Literal["trial", "screening"] = "trial"
    pruner: str
    tokens: Passes
    seconds: Seconds | None


class StudyCost(FrozenModel):
    """The whole study: total (null if unknown), done and screening trials, and tokens and seconds of everything.

    That is trials, loading, dense model, screening, test text, draws of the calibration text, and, in seconds alone,
    continuations and the speed of the best plan. Early termination,
    which is also the end of a search for the sparsest plan within a limit, can only lower it. `without_tasks`: each
    trial also answers the tasks of `limit.min_accuracy`, which are not in it. `descents`, `training`: seconds of it for
    descents by prices, and for training the best plan, if it is trained; null without them, or without a probe.
    """

    trials: int | None
    done: int
    screened: int = 0
    early_termination: bool = False
    without_tasks: bool = False
    tokens: int | None
    seconds: float | None
    seconds_left: float | None
    descents: float | None = None
    training: float | None = None


class Forecast(FrozenModel):
    """The cost of a study; `problems`: a line for each obstacle."""

    format: Literal["atp_tune.plan/2"] = "atp_tune.plan/2"
    study: str
    device: str
    dtype: str
    weights: Weights
    memory: Memory
    trial: tuple[TrialCost, ...]
    whole: StudyCost
    problems: tuple[str, ...] = ()


# --- The parts of a study: how many there are of each, and what one takes, in tokens through all blocks and in seconds.
#
# `plan` and the bar that shows the time left read the same list.

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
    def pruning(self) -> float:
        """Tokens that are sent to prune by one plan, the mean over pruners."""
        return fmean(cost.total - cost.evaluate for cost in self.costs.values())

    @property
    def screened(self) -> int:
        """Tokens that a trial of the screening is evaluated on; 0 without a screening."""
        screen, windows = self.study.search.screen, self.validation_windows
        return 0 if screen is None else self.tokens.validation // windows * -(-windows // screen.stride)


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


def parts(amounts: Amounts, done: Done, rates: ProbeRates) -> Iterator[Part]:
    """Yields the parts of a study, in the order in which it runs them."""
    study, tokens, costs, pruning = amounts.study, amounts.tokens, amounts.costs, amounts.pruning
    passed = 1 + ("kl" in study.search.objective)  # of the dense model: for its scores, and for its states
    dense, tested, is_open = passed * tokens.validation, passed * tokens.test, done.trials < done.total

    def plan(evaluated: int, role: str) -> float:
        """Seconds to prune by one plan and evaluate it on so many tokens of a text, the mean over pruners."""
        return fmean(
            rates.trial(name, cost.model_copy(update={"evaluate": evaluated}), role).total
            for name, cost in costs.items()
        )

    # The model, and the statistics of the dense model that several trials share.
    shared = statistics_kinds(study) * tokens.calibration / 2  # one pass, where `rates.statistics` are of two
    curve = rates.blocks * tokens.curve * rates.run["calibration"]
    yield Part("loading", 1, is_open, tokens.curve + 2 * shared, rates.load + curve + rates.statistics(shared))
    yield Part("dense", 1, is_open and not done.trials, dense, rates.dense_on(dense, "validation"), dense)
    if screened := amounts.screened:
        ranked = dense_kinds(study) * tokens.calibration / 2
        seconds = rates.statistics(ranked) + rates.dense_on(passed * screened, "validation")
        yield Part("dense", 1, not done.screening, passed * screened + 2 * ranked, seconds, dense)
        seconds = fmean(rates.trial(name, Passes(listen=0, run=0, evaluate=screened)).total for name in costs)
        whole, left = done.screening_total, max(0, done.screening_total - done.screening)
        yield Part("screening", whole, left, screened, seconds, screened)
    # Descents by prices, then the trials.
    descended, number = descent_tokens(amounts), len(study.descents)
    # Each step copies streamed blocks upwards and on the way back; weights are made where prices are of them.
    copied, levels = rates.blocks * 2 * number * _steps(amounts)[0] * rates.fetch, LEVELS * len(_path(amounts))
    made_at = {"ggml": len(BLOCKS)} if study.quantize.by_types else dict.fromkeys(study.own_prices, levels)
    made = rates.blocks * sum(many * rates.pruners[name].prune for name, many in made_at.items())
    by_prices = made + max(copied, rates.statistics(descended))
    if descended:
        each, seconds = 2 * descended / number, by_prices / number
        yield Part("gradient", number, 0 if done.trials or not is_open else number, each, seconds, each, seconds)
    sent = fmean(cost.total for cost in costs.values())
    seconds = plan(round(sent - pruning), "validation")
    yield Part("trial", done.total, max(0, done.total - done.trials), sent, seconds, sent)
    # The test text, and the other draws of the calibration text, each of which finds the `fitted` plans anew.
    if study.data.test is not None:
        yield Part("test", 1, is_open, tested, rates.dense_on(tested, "test"), tested)
        # Over an interval without a limit all trials may be on the front, or be the uniform ones beside it.
        plans = compared(study) if study.interval is None or study.limit is not None else done.total
        again, each = 0 if study.compares_all else plans, pruning + tokens.test
        yield Part("test", again, again * is_open, each, plan(tokens.test, "test"), each)
    more, fitted = study.data.calibration.draws - 1, min(len(study.allocation.by_prices), study.leaders, number)
    if plans := more * compared(study) + (amounts.is_short and fitted):
        role, evaluated = ("test", tokens.test) if study.data.test is not None else ("validation", tokens.validation)
        anew, drawn = (more + amounts.is_short) * fitted / max(1, number), more * shared
        pruned, own = replace(amounts, tokens=replace(tokens, curve=0)).pruning, anew * by_prices / plans
        each = pruned + evaluated + 2 * (drawn + round(anew * descended)) / plans
        seconds = plan(evaluated, role) + rates.statistics(drawn) / plans
        yield Part("draw", plans, plans * is_open, each, seconds + own, each, own)
    # What is done with the best plan.
    models, read = continued(study)
    yield Part("generate", models, models * is_open, 0, rates.read(read), read)
    if study.speed:  # the best plan is pruned once more, and measured beside the dense model
        measured = amounts.pruning + 2 * (1 + RUNS) * (TOKENS + STEPS * ALONE)
        yield Part("speed", 1, is_open, 0, rates.read(measured) + rates.load, measured)
    if study.recover is not None:
        sent, loads = training(amounts)
        yield Part("training", 1, not done.is_trained, sent, rates.read(sent) + loads * rates.load, sent)


def statistics_kinds(study: Study) -> int:
    """Number of kinds of statistics that are measured once on the dense model."""
    if study.prune.statistics == "dense":
        return dense_kinds(study)
    own = {study.prune.pruner(name).measures for name in study.own_prices} - {None}
    return len(own) + any(ALLOCATIONS[name].measures_inputs for name in study.allocation.short_names)


def dense_kinds(study: Study) -> int:
    """Number of kinds of statistics that the pruners of a study need."""
    return len({study.methods.pruner(name).measures for name in study.methods.short_names} - {None})


def compared(study: Study) -> int:
    """Number of plans that all draws of the calibration text prune: at most those that lead, and their uniforms."""
    return max(1, study.leaders + min(study.leaders, len(study.methods.short_names)))


def step_tokens(amounts: Amounts) -> int:
    """Tokens of a step by prices; 0 without that allocation."""
    by_prices = amounts.study.allocation.by_prices
    return amounts.tokens.calibration // amounts.windows * _steps(amounts)[1] if by_prices else 0


def _path(amounts: Amounts) -> tuple[float, ...]:
    """The targets of a descent by prices."""
    return amounts.study.path or (amounts.study.highest,)


def descent_tokens(amounts: Amounts) -> int:
    """Tokens of the descents by prices, counted as those that dense statistics measure, which go through twice.

    There is one descent for each score, with rows and without, and for each pruner's own weights. One with rows needs
    the dense model's final states of what it draws from its pool, at most all, for KL. With a size widths have prices.
    """
    from atp_tune.blocks.gradients import PASSES
    from atp_tune.run.dense_model import POOL, items_of_costs

    steps, length = len(amounts.study.descents) * _steps(amounts)[0], amounts.tokens.calibration // amounts.windows
    widths = PASSES * items_of_costs(length) * length if amounts.study.size and steps else 0
    return round(steps * amounts.passes * step_tokens(amounts) + widths + rows_descents(amounts) * POOL) // 2


def _steps(amounts: Amounts) -> tuple[int, int]:
    """Steps of a descent by prices, of bits a single one, and windows of each."""
    from atp_tune.run.dense_model import items_of_costs, windows_of_step

    length = amounts.tokens.calibration // amounts.windows
    if amounts.study.methods.prunes:
        return steps_along(_path(amounts)), windows_of_step(length, _path(amounts))
    return 1, items_of_costs(length)


def rows_descents(amounts: Amounts) -> int:
    """The number of descents whose rows move too."""
    return sum(rows for _, rows in amounts.study.descents)


def continued(study: Study) -> tuple[int, int]:
    """How many models continue prompts at the end, and tokens of each that take as long to read."""
    tokens = study.continuations.tokens
    if not tokens or study.images is not None:
        return 0, 0
    return 2 + max(1, study.leaders), (len(PROMPTS) + len(study.continuations.prompts)) * tokens * GENERATED


def training(amounts: Amounts) -> tuple[float, int]:
    """Tokens of the training of the best plan's kept weights, at most, and how often a model is loaded for it.

    A token goes back through all blocks in the time of two forward passes. The plan is pruned again, and measured
    before and after; the dense model sees the held-out windows once.
    """
    recover = amounts.study.recover
    assert recover is not None
    length = recover.seqlen or amounts.tokens.validation // amounts.validation_windows
    trained, models = recover.steps * recover.batch * length, 1 + recover.has_teacher
    held_out, times = FEWEST * length, 1 + recover.steps // recover.eval_every
    forward = models * trained + held_out * (times + models - 1)
    texts = amounts.tokens.curve + amounts.pruning + 2 * (amounts.tokens.validation + amounts.tokens.test)
    return forward + 2 * trained + texts, 3 + models


def sums(parts: list[Part]) -> tuple[int, float | None, float | None]:
    """Tokens, seconds and seconds left of parts; None for seconds that are not known."""
    seconds = sum(part.number * part.seconds for part in parts if part.number)
    left = sum(part.left * part.seconds for part in parts if part.left)
    known = not math.isnan(seconds)
    return round(sum(part.number * part.tokens for part in parts)), seconds if known else None, left if known else None
