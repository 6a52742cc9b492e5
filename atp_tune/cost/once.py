"""What a study computes once beside its trials: descents by prices, texts, the training and speed of its best plan."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atp_tune.cost.forecast import Passes, ProbeRates, TrainingCost, passes
from atp_tune.cost.memory import Tokens
from atp_tune.metrics.continuations import PROMPTS
from atp_tune.metrics.speed import RUNS, STEPS, TOKENS
from atp_tune.spec.recover import FEWEST, RecoverConfig
from atp_tune.spec.study import Study

if TYPE_CHECKING:
    from atp_tune.cost.planning import Known

FLOAT32 = 4  # bytes
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
    """Number of plans that each draw of the calibration text finds anew by a descent.

    They are at most the best of each allocation; over an interval of sparsities the best of all.
    """
    allocations = len(known.study.allocation.by_prices)
    return min(1, allocations) if known.study.interval is not None else min(allocations, len(known.study.descents))


def share_anew(known: Amounts) -> float:
    """What all draws of the calibration text descend anew, as a share of the study's descents."""
    more = known.study.data.calibration.draws - 1
    return (more + known.is_short) * plans_anew(known) / max(1, len(known.study.descents)) if more else 0.0


def descents(known: Amounts) -> int:
    """Tokens of the descents by prices, counted as those that dense statistics measure, which go through twice.

    There is one descent for each score, with rows and without, and for each pruner's own weights. One with rows needs
    the dense model's final states of what it draws from its pool, at most all, for KL.
    """
    from atp_tune.run.prices import POOL

    return round(_steps(known) * known.passes * step_tokens(known) + _with_rows(known) * POOL) // 2


def _steps(known: Amounts) -> int:
    """Steps of all descents by prices."""
    from atp_tune.allocations.prices import steps_along

    return len(known.study.descents) * (1 if known.study.by_bits else steps_along(_path(known)))


def waiting_seconds(known: "Known", rates: ProbeRates) -> float:
    """Seconds in which descents wait for streamed blocks, which each step copies upwards and on the way back."""
    blocks = len(known.sizes.blocks)
    return max(0.0, blocks * (2 * _steps(known) * rates.fetch - descents(known) * rates.dense))


def _with_rows(known: Amounts) -> int:
    """The number of descents whose rows move too."""
    return sum(rows for _, rows in known.study.descents)


def levels_seconds(known: "Known", rates: ProbeRates) -> float:
    """Seconds in which pruners make the weights of descents by their own."""
    pruned = sum(rates.pruners[name].prune for name in known.study.own_prices)
    return LEVELS * len(_path(known)) * len(known.sizes.blocks) * pruned


def descent_bytes(known: "Known") -> int:
    """Bytes of a step by prices: the states that enter all blocks, and a block's weights with their gradients.

    With rows also the dense model's final states of the pool.
    """
    from atp_tune.run.prices import POOL

    if not (tokens := step_tokens(known)):
        return 0
    sizes, pool = known.sizes.blocks, POOL * (_with_rows(known) > 0)
    states = ((len(sizes) + 1) * tokens + pool) * known.width * known.itemsize
    errors = len(known.study.quantize.widths) * FLOAT32 if known.study.by_bits else 0
    return states + max(sizes) * (2 * known.itemsize + FLOAT32 + errors)


def continued(study: Study) -> tuple[int, int]:
    """How many models continue prompts at the end, and tokens of each that take as long to read."""
    tokens, allocations = study.continuations.tokens, {*study.allocation.short_names} - {"uniform"}
    if not tokens or study.images is not None:
        return 0, 0
    models = 2 + (1 if study.interval is not None else max(1, len(allocations)))
    return models, (len(PROMPTS) + len(study.continuations.prompts)) * tokens * GENERATED


def speed(known: Amounts) -> int:
    """Tokens that take as long to read as the best plan is pruned once more, and measured beside the dense model."""
    if not known.study.speed:
        return 0
    pruned = min(cost.total - cost.evaluate for cost in known.costs.values())
    return pruned + 2 * (1 + RUNS) * (TOKENS + STEPS * ALONE)


def after_seconds(known: Amounts, rates: ProbeRates, blocks: int) -> float:
    """Seconds of continuations and speed."""
    models, tokens = continued(known.study)
    read = models * tokens + speed(known)
    return read * (blocks * rates.run["validation"] + rates.ends) + known.study.speed * rates.load


def training(known: Amounts, recover: RecoverConfig) -> TrainingCost:
    """The training of the best plan's kept weights, at most; it is loaded with its dense model, and measured twice.

    The dense model sees the held-out windows once.
    """
    length = recover.seqlen or known.tokens.validation // known.validation_windows
    trained, models = recover.steps * recover.batch * length, 1 + recover.has_teacher
    held_out, times = FEWEST * length, 1 + recover.steps // recover.eval_every
    measured = 2 * (known.tokens.validation + known.tokens.test)
    return TrainingCost(models * trained + held_out * (times + models - 1), trained, measured, 3 + models)
