"""The time that a study has yet to take, from what is ahead and the seconds that its parts have taken. Needs no torch.

A part that has not been measured takes as long for its size as those that were. What is under way and takes longer than
it should is thought to be 9/10 done, so the time left is never 0.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import fmean

from atp_tune.events import Ahead, Event, EventHandler, Opened, Step, TrialEnded, TrialStarted

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


@dataclass
class Item:
    """The present work of a process: the part, since when, and the share that is done, if that is known."""

    part: str
    began: float
    share: float = 0.0


class Remaining:
    """Hears the events of a study's processes, and estimates the seconds that the whole of it has yet to take."""

    def __init__(self) -> None:
        self._parts = dict[str, Part]()
        self._at = dict[Hashable, Item]()  # by process
        self._descended = set[Key]()
        self._stage = 0

    def hear(self, event: Event, now: float, who: Hashable = None) -> None:
        """Takes an event of one process."""
        match event:
            case Ahead(parts):
                self._parts = {name: Part(*part) for name, part in parts.items()}
            case TrialStarted(title, plan):
                self._start(title.split()[0].rstrip(":"), now, who)
                if plan is not None and "gradient" in plan.allocation and "gradient" in self._parts:
                    key = plan.method, plan.allocation
                    self._parts["gradient"].number -= key not in self._descended
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
        measured = [part for part in self._parts.values() if part.took and part.size]
        tokens = sum(len(part.took) * part.size for part in measured)
        rate = sum(sum(part.took) for part in measured) / tokens if tokens else None  # seconds per token
        times = [self._left(name, part, rate, now) for name, part in self._parts.items()]
        known = [seconds for seconds in times if seconds is not None]
        return max(LEAST, sum(known)) if len(known) == len(times) > 0 else None

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
        if item := self._at.get(who):
            self._parts[item.part].took.append(now - item.began)

    def _left(self, name: str, part: Part, rate: float | None, now: float) -> float | None:
        running = [item for item in self._at.values() if item.part == name]
        number, each = max(part.number, 0), fmean(part.took) if part.took else rate and rate * part.size
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
    return lambda event: watch(Ahead(_parts(event)) if isinstance(event, Opened) else event)


def _parts(opened: Opened) -> dict[str, tuple[int, float]]:
    """The number and the mean size of what is ahead, by part."""
    from atp_tune.blocks.gradients import PASSES
    from atp_tune.cost.forecast import UNKNOWN, Amounts, Done, Tokens, parts

    study, (windows, _), (own, _) = opened.study, opened.items["calibration"], opened.items["validation"]
    amounts = Amounts(study, Tokens.of(opened.items, 0), windows, own, PASSES, opened.is_short)
    screened = study.search.screen.trials if study.search.screen else 0
    sizes = dict[str, tuple[int, float]]()
    for part in parts(amounts, Done(opened.total, opened.done, screened), UNKNOWN):
        if part.name in STAGES and part.number:
            number, each = sizes.get(part.name, (0, 0.0))
            whole = number + int(part.number)
            sizes[part.name] = whole, (number * each + part.number * part.size) / whole
    sizes["trial"] = opened.total - opened.done, sizes["trial"][1]
    return sizes
