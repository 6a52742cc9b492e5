"""The command `plan`: reads a study's sizes, probes its model, and forecasts its cost; stores nothing."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any

import optuna
import psutil

from atp_tune.allocations import Budget
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
    bytes_of,
    parts,
    peaks,
    problems,
    rows_descents,
    step_tokens,
    sums,
)
from atp_tune.events import Ahead, Event, EventHandler, Message, Opened, Step, TrialEnded, TrialStarted
from atp_tune.search.goals import goal_of
from atp_tune.storage import fingerprint, opening, progress
from atp_tune.storage.fingerprint import SUFFIX

if TYPE_CHECKING:
    from atp_tune.checkpoints.models import ModelFolder
    from atp_tune.run.session import Session, Setup

# --- The time that a study has yet to take, from what is ahead and the seconds that its parts have taken. Needs no
# torch.
#
# A part that has not been measured takes as long for its size as those that were. What is under way and takes
# longer than it should is thought to be 9/10 done, so the time left is never 0.

Key = tuple[str, str]

# The parts, by the first word of the titles, and the stages in which a study runs them.
STAGES = {
    "dense": 0, "screening": 0, "gradient": 0, "trial": 0,
    "test": 1, "generate": 1, "continuations": 1, "draw": 2, "training": 3, "speed": 4,
}  # fmt: skip
SHARED = ("screening", "gradient", "trial")  # by all workers
EVEN = ("step", "block", "generate", "loss")  # phases that are a part, or most of it, in steps of one length
OVER = 0.1  # of its seconds so far, the least that is left of what is under way
LEAST = 1.0  # seconds


@dataclass
class Part:
    """Work of one kind that is ahead: `number` of times, and the `size` of each in tokens."""

    number: int
    size: float
    took: list[float] = field(default_factory=list)  # seconds of each that ended

    def each(self, rate: float | None) -> float | None:
        """Seconds of each; `rate`: seconds per token of other parts, if one is known."""
        return fmean(self.took) if self.took else rate and rate * self.size


@dataclass
class Item:
    """The present work of a process: the part, since when, and the share that is done, if that is known."""

    part: str
    began: float
    share: float = 0.0


class Remaining:
    """Hears the events of a study's processes, and estimates the seconds that the whole of it has yet to take."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._at: dict[Hashable, Item] = {}  # by process
        self._descended: set[Key] = set()
        self._stage = 0

    def hear(self, event: Event, now: float, who: Hashable = None) -> None:
        """Takes an event of one process."""
        match event:
            case Ahead(parts):
                self._parts = {name: Part(*part) for name, part in parts.items()}
            case TrialStarted(title, plan):
                self._start(title.split()[0].rstrip(":"), now, who)
                if plan is not None and "gradient" in plan.allocation and "gradient" in self._parts:
                    if (key := (plan.method, plan.allocation)) not in self._descended:
                        self._parts["gradient"].number -= 1
                    self._descended.add(key)
            case Step(phase, done, total):
                if phase == "generate":
                    self._start(phase, now, who)
                if phase.split()[0] in EVEN and who in self._at:
                    self._at[who].share = done / total
            case TrialEnded(what=what, done=done, total=total) if what in self._parts:
                self._end(who, now)
                self._parts[what].number = total - done
                self._at[who] = Item(what, now)

    def leave(self, who: Hashable) -> None:
        """Counts a process that has ended no more."""
        self._at.pop(who, None)

    def left(self, now: float) -> float | None:
        """Seconds, at least 1; None where nothing has been measured yet."""
        rate = self._rate()
        found = [self._left(name, part, rate, now) for name, part in self._parts.items()]
        known = [seconds for seconds in found if seconds is not None]
        return max(LEAST, sum(known)) if len(known) == len(found) > 0 else None

    def _start(self, word: str, now: float, who: Hashable) -> None:
        name, stage = "generate" if word == "continuations" else word, STAGES.get(word, -1)
        before = self._at.get(who)
        if name not in self._parts or stage < self._stage or (before and before.part == name == "generate"):
            return
        if before and before.part not in ("trial", "screening"):  # which end by events of their own
            self._end(who, now)
            self._parts[before.part].number -= before.part != "gradient"  # each worker descends by itself
        for other, part in self._parts.items():
            if STAGES[other] < stage or (other, name) == ("screening", "trial"):
                part.number = 0
        self._stage, self._at[who] = stage, Item(name, now)

    def _end(self, who: Hashable, now: float) -> None:
        if who in self._at:
            self._parts[self._at[who].part].took.append(now - self._at[who].began)

    def _rate(self) -> float | None:
        """Seconds per token."""
        known = [part for part in self._parts.values() if part.took and part.size]
        tokens = sum(len(part.took) * part.size for part in known)
        return sum(sum(part.took) for part in known) / tokens if tokens else None

    def _left(self, name: str, part: Part, rate: float | None, now: float) -> float | None:
        running = [item for item in self._at.values() if item.part == name]
        number, each = max(part.number, 0), part.each(rate)
        if not part.took and (by_steps := [(now - item.began) / item.share for item in running if item.share]):
            each = fmean(by_steps)
        if number == 0:
            return 0.0
        if each is None:
            return None
        under_way = sum(max(each - now + item.began, OVER * (now - item.began)) for item in running[:number])
        whole = under_way + each * max(0, number - len(running))
        return whole / max(1, sum(item.part in SHARED for item in self._at.values())) if name in SHARED else whole


def foretold(watch: EventHandler) -> EventHandler:
    """A handler that adds to the opening of a study what is ahead of it."""

    def on_event(event: Event) -> None:
        watch(Ahead(_parts(event)) if isinstance(event, Opened) else event)

    return on_event


def _parts(opened: Opened) -> dict[str, tuple[int, float]]:
    """The number and the mean size of what is ahead, by part."""
    from atp_tune.blocks.gradients import PASSES
    from atp_tune.cost.forecast import UNKNOWN, Amounts, Done, Tokens, parts

    study, windows = opened.study, {role: number for role, (number, _) in opened.items.items()}
    size = {role: number * length for role, (number, length) in opened.items.items()}
    tokens = Tokens(size["calibration"], size["validation"], size.get("test", 0), 0)
    known = Amounts(study, tokens, windows["calibration"], windows["validation"], PASSES, opened.is_short)
    screened = study.search.screen.trials if study.search.screen else 0
    found: dict[str, tuple[int, float]] = {}
    for part in parts(known, Done(opened.total, opened.done, screened), UNKNOWN):
        if part.name in STAGES and part.number:
            number, each = found.get(part.name, (0, 0.0))
            whole = number + int(part.number)
            found[part.name] = whole, (number * each + part.number * part.size) / whole
    found["trial"] = opened.total - opened.done, found["trial"][1]
    return found


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
        named = self.study.model.offload
        size = self.itemsize
        chosen = choose(self.sizes.total * size, sum(self.sizes.blocks) * size, self.free, self.held(0).states)
        return chosen if named == "auto" else named

    def held(self, work: int) -> Bytes:
        """The parts of the peak memory."""
        found = bytes_of(self.sizes, self.itemsize, self.width, self.tokens, work, self.process)
        if self.study.compares_all:  # both go through the blocks together
            both = (self.tokens.validation + self.tokens.test) * self.width * self.itemsize
            found = replace(found, validation=both)
        if "kl" not in self.study.search.objective:
            return found
        finals = (self.tokens.validation + self.tokens.test) * self.width * self.itemsize
        return replace(found, dense=found.dense + finals)


def foresee(file: StudyFile, name: str, watch: EventHandler) -> Forecast:
    """The cost of a study. The model is loaded and probed for some seconds, unless it does not fit into memory.

    UserError for bad input, and for a model or texts that cannot be loaded.
    """
    from atp_tune.checkpoints.devices import device_name, find_device, find_dtype, oom_as_user_error
    from atp_tune.checkpoints.models import resolve
    from atp_tune.run.session import Session, Setup

    # Without `bos` in the study file the forecast ignores BOS: its cost is too small.
    setup = Setup.of_study(file.study, file.folder, bool(fingerprint.bos_of(file.study, _stored(file, name))), watch)
    device = find_device(setup.place.device)
    dtype = find_dtype(setup.model.dtype, device)
    if said := file.study.without_effect:
        watch(Message(said))
    watch(Message(f"loading the model and the {file.study.data.table}"))
    folder = resolve(setup.model, setup.place.base, setup.place.note)
    known = _known(file, name, setup, folder, device, dtype.itemsize)
    session, rates = None, None
    needed = peaks(known.held(0), known.offload(), known.free, known.has_own_memory)
    if not problems(known.held(0), needed, known.offload(), known.windows):
        with oom_as_user_error("loading"):
            began = perf_counter()
            session = Session.open(setup)
            load = perf_counter() - began
            from atp_tune.cost.probe import probe

            known = _with_model(known, session)
            session.watch(Message("probing: one batch of each text in three blocks"))
            spec = file.study
            rates = probe(session, spec.methods.short_names, spec.highest, load, "kl" in spec.search.objective)
    format_ = str(dtype).removeprefix("torch.")
    where = device_name(device)
    offload = session.checkpoint.offload if session else known.offload()
    work = max(rates.work if rates else 0, _descent_bytes(known))
    if known.study.search.stopper != "none" and offload == "none":  # all pruned blocks stay between groups of windows
        work += known.held(0).blocks
    if session is not None:
        work += _rank_bytes(known.study, session)
    held = known.held(work)
    if session is not None and known.study.prune.statistics == "sequential":
        from atp_tune.blocks.replay import held_bytes

        held = replace(held, sequential=known.tokens.calibration * held_bytes(session.checkpoint))
    needed = peaks(held, offload, known.free, known.has_own_memory)
    blocks = len(known.sizes.blocks)
    return Forecast(
        study=name,
        device=where,
        dtype=format_,
        weights=Weights(bytes=held.total, blocks=blocks, largest_block=held.largest, offload=offload),
        memory=needed,
        trial=tuple(_trials(known, rates)),
        whole=_whole(known, session, rates),
        problems=problems(held, needed, offload, known.windows),
    )


def foresee_open(file: StudyFile, name: str, session: "Session", other: Study | None) -> list[StudyCost]:
    """The costs of a study whose session is open, from here on, and of another study of its model, by one probe.

    `other`: as if each of its texts had all windows that it asks for.
    """
    from atp_tune.cost.probe import probe
    from atp_tune.run.session import Setup

    setup, study = Setup.of_study(file.study, file.folder, session.bos), file.study
    device, dtype = session.checkpoint.device, session.checkpoint.dtype
    known = _with_model(_known(file, name, setup, session.folder, device, dtype.itemsize), session)
    rates = probe(session, study.methods.short_names, study.highest, 0.0, "kl" in study.search.objective)
    return [_whole(each, session, rates) for each in (known, *([_asked(known, other)] if other else []))]


def _asked(known: Known, study: Study) -> Known:
    """The facts of another study of a model before its texts are read."""
    from atp_tune.run.dense_model import CURVE_TOKENS

    texts = study.texts
    assert texts is not None
    roles = {"calibration": texts.calibration, "validation": texts.validation, "test": texts.test}
    windows = {role: 0 if text is None else text.nsamples or WHOLE_TEXT for role, text in roles.items()}
    length = texts.validation.seqlen
    size = {role: number * length for role, number in windows.items()}
    curve = min(windows["calibration"], max(1, CURVE_TOKENS // length)) * length
    return replace(
        known, study=study, tokens=Tokens(size["calibration"], size["validation"], size["test"], curve),
        windows=windows["calibration"], validation_windows=windows["validation"],
        main=None, screening=None,
    )  # fmt: skip


def _known(file: StudyFile, name: str, setup: "Setup", folder: "ModelFolder", device: Any, itemsize: int) -> Known:
    from atp_tune.blocks.gradients import PASSES
    from atp_tune.checkpoints.blocks import model_config, width_of
    from atp_tune.checkpoints.devices import device_limit, free_memory, host_memory
    from atp_tune.inputs import KINDS
    from atp_tune.run.dense_model import CURVE_TOKENS

    study = file.study
    items = KINDS[setup.inputs].read(setup.texts, folder, setup.place.base, bool(setup.bos))
    size = {role: len(each) * each.positions for role, each in items.items()}
    windows, length = len(items["calibration"]), items["calibration"].positions
    curve = min(windows, max(1, CURVE_TOKENS // length)) * length
    tokens = Tokens(size["calibration"], size["validation"], size.get("test", 0), curve)
    width = width_of(model_config(folder.path, folder.trusted), setup.inputs == IMAGES)
    bounded = device.type != "cpu" or device_limit() is not None
    free = Free(free_memory(device), host_memory(), bounded)
    return Known(
        study, tokens, windows, len(items["validation"]), PASSES, False,
        _stored(file, name), _stored(file, name + SUFFIX), read_sizes(folder.path), width,
        itemsize, free, device.type == "cuda", psutil.Process().memory_info().rss,
    )  # fmt: skip


def _with_model(known: Known, session: "Session") -> Known:
    """Adds the sizes of the model's own blocks, since names of tensors do not tell those of stages, and its passes."""
    from atp_tune.blocks.gradients import passes

    known = replace(known, is_short=session.is_short)
    if (tokens := step_tokens(known)) and not known.study.by_bits:  # whose gradients are those of single items
        known = replace(known, passes=passes(session.checkpoint, tokens))
    if len(known.sizes.blocks) == len(session.checkpoint.blocks):
        return known
    blocks = tuple(sum(part.numel() for part in block.parameters()) for block in session.checkpoint.blocks)
    return replace(known, sizes=replace(known.sizes, blocks=blocks))


def _stored(file: StudyFile, name: str) -> optuna.Study | None:
    db = opening.open_storage(file.storage_url, create=False)
    return opening.find_study(db, name) if db else None


def _progress(study: optuna.Study | None, asked: int) -> tuple[int, int]:
    """Trials done, and the total, which early termination may have lowered."""
    return (progress.counted(study), progress.total_of(study, asked)) if study else (0, asked)


def _trials(known: Known, rates: ProbeRates | None) -> Iterator[TrialCost]:
    """Yields the cost of a trial of each pruner, in the study and in its screening."""
    alone = Passes(listen=0, run=0, evaluate=known.screened)
    for what, costs in (
        ("trial", known.costs),
        ("screening", dict.fromkeys(known.costs, alone) if known.screened else {}),
    ):
        for pruner, cost in costs.items():
            seconds = rates.trial(pruner, cost) if rates else None
            yield TrialCost(what=what, pruner=pruner, tokens=cost, seconds=seconds)


def _descent_bytes(known: Known) -> int:
    """Bytes of a step by prices: the states that enter all blocks, and a block's weights with their gradients.

    With rows also the dense model's final states of the pool.
    """
    from atp_tune.run.dense_model import POOL

    if not (tokens := step_tokens(known)):
        return 0
    sizes, pool = known.sizes.blocks, POOL * (rows_descents(known) > 0)
    states = ((len(sizes) + 1) * tokens + pool) * known.width * known.itemsize
    errors = len(known.study.quantize.widths) * FLOAT32 if known.study.by_bits else 0
    return states + max(sizes) * (2 * known.itemsize + FLOAT32 + errors)


def _rank_bytes(study: Study, session: "Session") -> int:
    """Bytes of the ranks, which pruning with the dense model's statistics keeps."""
    from atp_tune.blocks.dense_metrics import RANK_BYTES, can_rank

    if study.prune.statistics != "dense" and study.search.screen is None:
        return 0
    pruners = [study.methods.pruner(name) for name in study.methods.short_names]
    return RANK_BYTES * sum(session.checkpoint.sizes) if any(can_rank(x, session.checkpoint) for x in pruners) else 0


def _whole(known: Known, session: "Session | None", rates: ProbeRates | None) -> StudyCost:
    """The sum of a study's parts; without tokens and seconds where the number of its trials is not known."""
    study, trials, main, screen = known.study, known.study.search.trials, known.main, known.study.search.screen
    if session is not None:
        trials = goal_of(study, session.budget(study.highest)).total
    elif study.interval is not None:  # the total depends on no size of the model
        trials = goal_of(study, Budget(study.highest, known.sizes.blocks)).total
    done, total = (0, None) if trials is None else _progress(main, trials)
    screened, asked = _progress(known.screening, screen.trials) if screen else (0, 0)
    is_trained = main is not None and "recovered" in main.user_attrs
    found = list(parts(known, Done(total or 0, done, asked, screened, is_trained), rates or UNKNOWN))
    tokens, seconds, left = (None, None, None) if total is None else sums(found)
    by_prices = sum(part.number * part.prices for part in found)
    training = next((part.seconds for part in found if part.name == "training"), None)
    return StudyCost(
        trials=total, done=done, screened=asked, tokens=tokens, seconds=seconds, seconds_left=left,
        early_termination=study.search.early_termination or study.limit is not None,
        without_tasks=study.limit is not None and study.limit.min_accuracy is not None,
        descents=by_prices or None if rates else None, training=training if rates else None,
    )  # fmt: skip
