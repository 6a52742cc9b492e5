"""The command `plan`: reads a study's sizes, probes its model, and forecasts its cost; stores nothing."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import optuna
import psutil

from atp_tune.allocations import Budget
from atp_tune.allocations.types import BLOCKS
from atp_tune.checkpoints.files import Free, ModelSizes, Offload, choose, read_sizes
from atp_tune.config.data import IMAGES
from atp_tune.config.study import Study
from atp_tune.config.studyfile import StudyFile
from atp_tune.cost.forecast import (
    UNKNOWN,
    Amounts,
    Bytes,
    Done,
    Forecast,
    Passes,
    ProbeRates,
    StudyCost,
    Tokens,
    TrialCost,
    Weights,
    parts,
    peaks,
    problems,
    rows_descents,
    step_tokens,
    sums,
)
from atp_tune.events import EventHandler, Message
from atp_tune.search.goals import make_goal
from atp_tune.storage import fingerprint, opening, progress
from atp_tune.storage.fingerprint import SUFFIX

if TYPE_CHECKING:
    from atp_tune.checkpoints.models import ModelFolder
    from atp_tune.run.session import Session, Setup

FLOAT32 = 4  # bytes
WHOLE_TEXT = 150  # windows of a text without a number: of 2048 tokens, the test part of WikiText-2


@dataclass(frozen=True)
class Known(Amounts):
    """The facts of a study that are known before its model is loaded."""

    main: optuna.Study | None  # the stored study
    screening: optuna.Study | None  # the stored screening
    sizes: ModelSizes
    width: int  # of a hidden state
    itemsize: int
    free: Free
    has_own_memory: bool  # the device's memory is not the host's
    process: int  # bytes

    def offload(self) -> Offload:
        """The offload of the study file, or the automatic choice."""
        setting, held = self.study.model.offload, self.held(0)
        return choose(held.total, held.blocks, self.free, held.states) if setting == "auto" else setting

    def held(self, work: int) -> Bytes:
        """The parts of the peak memory."""
        sizes, tokens, state = self.sizes, self.tokens, self.width * self.itemsize  # bytes of a state
        both, dense = tokens.validation + tokens.test, len(sizes.blocks) * tokens.curve
        if "kl" in self.study.search.objective:  # final states of the dense model
            dense += both
        return Bytes(
            total=sizes.total * self.itemsize,
            blocks=sum(sizes.blocks) * self.itemsize,
            largest=max(sizes.blocks) * self.itemsize,
            files=sizes.bytes,
            converts=sizes.bytes != sizes.total * self.itemsize,
            calibration=tokens.calibration * state,
            # Both go through the blocks together where every trial is tested.
            validation=(both if self.study.compares_all else max(tokens.validation, tokens.test)) * state,
            dense=dense * state,
            work=work,
            process=self.process,
        )


def foresee(file: StudyFile, name: str, watch: EventHandler) -> Forecast:
    """The cost of a study. The model is loaded and probed for some seconds, unless it does not fit into memory.

    UserError for bad input, and for a model or texts that cannot be loaded.
    """
    from atp_tune.checkpoints.devices import device_name, find_device, find_dtype, oom_as_user_error
    from atp_tune.checkpoints.models import resolve
    from atp_tune.run.session import Session, Setup

    # Without `bos` in the study file the forecast ignores BOS: its cost is too small.
    bos = fingerprint.stored_bos(file.study, opening.stored(file.storage_url, name))
    setup = Setup.of_study(file.study, file.folder, bool(bos), watch)
    device = find_device(setup.place.device)
    dtype = find_dtype(setup.model.dtype, device)
    if note := file.study.without_effect:
        watch(Message(note))
    watch(Message(f"loading the model and the {file.study.data.table}"))
    folder = resolve(setup.model, setup.place.base, setup.place.note)
    amounts = _amounts(file, name, setup, folder, device, dtype.itemsize)
    session = rates = None
    held, offload = amounts.held(0), amounts.offload()
    needed = peaks(held, offload, amounts.free, amounts.has_own_memory)
    if not problems(held, needed, offload, amounts.windows):
        with oom_as_user_error("loading"):
            began = perf_counter()
            session = Session.open(setup)
            load = perf_counter() - began
            from atp_tune.cost.probe import probe

            amounts = _with_model(amounts, session)
            session.watch(Message("probing: one batch of each text in three blocks"))
            rates, offload = probe(session, file.study, load), session.checkpoint.offload
    work = max(rates.work if rates else 0, _descent_bytes(amounts))
    if amounts.study.search.stopper != "none" and offload == "none":  # all pruned blocks stay between groups of windows
        work += amounts.held(0).blocks
    sequential = 0
    if session is not None:
        work += _rank_bytes(amounts.study, session)
        if amounts.study.prune.statistics == "sequential":
            from atp_tune.blocks.replay import block_bytes

            # A suspended block holds inputs and outputs of its widest linear.
            sequential = amounts.tokens.calibration * block_bytes(session.checkpoint, max)
    held = replace(amounts.held(work), sequential=sequential)
    needed = peaks(held, offload, amounts.free, amounts.has_own_memory)
    return Forecast(
        study=name,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        weights=Weights(
            bytes=held.total, blocks=len(amounts.sizes.blocks), largest_block=held.largest, offload=offload
        ),
        memory=needed,
        trial=tuple(_trials(amounts, rates)),
        whole=_whole(amounts, session, rates),
        problems=problems(held, needed, offload, amounts.windows),
    )


def foresee_open(file: StudyFile, name: str, session: "Session", other: Study | None) -> list[StudyCost]:
    """The costs of a study whose session is open, from here on, and of another study of its model, by one probe.

    `other`: as if each of its texts had all windows that it asks for.
    """
    from atp_tune.cost.probe import probe
    from atp_tune.run.session import Setup

    setup = Setup.of_study(file.study, file.folder, session.bos)
    device, dtype = session.checkpoint.device, session.checkpoint.dtype
    amounts = _with_model(_amounts(file, name, setup, session.folder, device, dtype.itemsize), session)
    rates = probe(session, file.study, 0.0)
    return [_whole(each, session, rates) for each in (amounts, *([_with_study(amounts, other)] if other else []))]


def _with_study(amounts: Known, study: Study) -> Known:
    """The facts of another study of a model before its texts are read."""
    from atp_tune.run.dense_model import CURVE_TOKENS

    texts = study.texts
    assert texts is not None
    roles = {"calibration": texts.calibration, "validation": texts.validation, "test": texts.test}
    length = texts.validation.seqlen
    items = {role: (0 if text is None else text.nsamples or WHOLE_TEXT, length) for role, text in roles.items()}
    return replace(
        amounts, study=study, tokens=Tokens.of(items, CURVE_TOKENS),
        windows=items["calibration"][0], validation_windows=items["validation"][0],
        main=None, screening=None,
    )  # fmt: skip


def _amounts(file: StudyFile, name: str, setup: "Setup", folder: "ModelFolder", device: Any, itemsize: int) -> Known:
    from atp_tune.blocks.gradients import PASSES
    from atp_tune.checkpoints.blocks import hidden_width, model_config
    from atp_tune.checkpoints.devices import device_limit, free_memory, host_memory
    from atp_tune.inputs import KINDS
    from atp_tune.run.dense_model import CURVE_TOKENS

    study = file.study
    items = KINDS[setup.inputs].read(setup.texts, folder, setup.place.base, bool(setup.bos))
    tokens = Tokens.of({role: (len(each), each.positions) for role, each in items.items()}, CURVE_TOKENS)
    width = hidden_width(model_config(folder.path, folder.trusted), setup.inputs == IMAGES)
    free = Free(free_memory(device), host_memory(), device.type != "cpu" or device_limit() is not None)
    return Known(
        study, tokens, len(items["calibration"]), len(items["validation"]), PASSES, False,
        opening.stored(file.storage_url, name), opening.stored(file.storage_url, name + SUFFIX),
        read_sizes(folder.path), width, itemsize, free, device.type == "cuda", psutil.Process().memory_info().rss,
    )  # fmt: skip


def _with_model(amounts: Known, session: "Session") -> Known:
    """Adds the sizes of the model's own blocks, since names of tensors do not tell those of stages, and its passes."""
    from atp_tune.blocks.gradients import passes

    amounts = replace(amounts, is_short=session.is_short)
    if (tokens := step_tokens(amounts)) and amounts.study.methods.prunes:  # gradients of bits are those of single items
        amounts = replace(amounts, passes=passes(session.checkpoint, tokens))
    if len(amounts.sizes.blocks) == len(session.checkpoint.blocks):
        return amounts
    blocks = tuple(sum(part.numel() for part in block.parameters()) for block in session.checkpoint.blocks)
    return replace(amounts, sizes=replace(amounts.sizes, blocks=blocks))


def _progress(study: optuna.Study | None, trials: int) -> tuple[int, int]:
    """Trials done, and the total, which early termination may have lowered."""
    return (progress.counted(study), progress.effective_total(study, trials)) if study else (0, trials)


def _trials(amounts: Known, rates: ProbeRates | None) -> Iterator[TrialCost]:
    """Yields the cost of a trial of each pruner, in the study and in its screening."""
    alone = Passes(listen=0, run=0, evaluate=amounts.screened)
    for what, costs in (
        ("trial", amounts.costs),
        ("screening", dict.fromkeys(amounts.costs, alone) if amounts.screened else {}),
    ):
        for pruner, cost in costs.items():
            yield TrialCost(what=what, pruner=pruner, tokens=cost, seconds=rates and rates.trial(pruner, cost))


def _descent_bytes(amounts: Known) -> int:
    """Bytes of a step by prices: the states that enter all blocks, and a block's weights with their gradients.

    With rows also the dense model's final states of the pool.
    """
    from atp_tune.run.dense_model import POOL

    if not (tokens := step_tokens(amounts)):
        return 0
    sizes, pool = amounts.sizes.blocks, POOL * (rows_descents(amounts) > 0)
    states = ((len(sizes) + 1) * tokens + pool) * amounts.width * amounts.itemsize
    study, own = amounts.study, amounts.study.quantize
    errors = len(BLOCKS if own.by_types else own.widths) * FLOAT32 if study.by_bits or study.size else 0
    return states + max(sizes) * (2 * amounts.itemsize + FLOAT32 + errors)


def _rank_bytes(study: Study, session: "Session") -> int:
    """Bytes of the ranks, which pruning with the dense model's statistics keeps."""
    from atp_tune.blocks.dense_metrics import RANK_BYTES, can_rank

    if study.prune.statistics != "dense" and study.search.screen is None:
        return 0
    pruners = map(study.methods.pruner, study.methods.short_names)
    return RANK_BYTES * sum(session.checkpoint.sizes) if any(can_rank(x, session.checkpoint) for x in pruners) else 0


def _whole(amounts: Known, session: "Session | None", rates: ProbeRates | None) -> StudyCost:
    """The sum of a study's parts; without tokens and seconds where the number of its trials is not known."""
    study, trials, main, screen = amounts.study, amounts.study.search.trials, amounts.main, amounts.study.search.screen
    if session is not None:
        trials = make_goal(study, session.budget(study.highest)).total
    elif study.interval is not None:  # the total depends on no size of the model
        trials = make_goal(study, Budget(study.highest, amounts.sizes.blocks)).total
    done, total = (0, None) if trials is None else _progress(main, trials)
    screened, screening_total = _progress(amounts.screening, screen.trials) if screen else (0, 0)
    is_trained = main is not None and "recovered" in main.user_attrs
    pieces = list(parts(amounts, Done(total or 0, done, screening_total, screened, is_trained), rates or UNKNOWN))
    tokens, seconds, left = (None, None, None) if total is None else sums(pieces)
    by_prices = sum(part.number * part.prices for part in pieces)
    training = next((part.seconds for part in pieces if part.name == "training"), None)
    return StudyCost(
        trials=total, done=done, screened=screening_total, tokens=tokens, seconds=seconds, seconds_left=left,
        early_termination=study.search.early_termination or study.limit is not None,
        without_tasks=bool(study.tasks),
        descents=by_prices or None if rates else None, training=training if rates else None,
    )  # fmt: skip
