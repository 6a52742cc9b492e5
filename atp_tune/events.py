"""Events that a run reports, for the command line and other handlers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atp_tune.config.study import Study
    from atp_tune.plan import Plan


@dataclass(frozen=True)
class Message:
    """One line for the user."""

    text: str


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins, or another measurement (dense model, final scores), which has no `number`."""

    title: str
    plan: "Plan | None"
    number: int | None = None


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps of a phase (prune, evaluate, …) of the last `TrialStarted`."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended with its scores on the validation text by measure, or none and the reason.

    `best`: that of the study's best by the measure that is minimised; `best_params`: those of its
    trial. `what`: `trial`, or `screening` for a trial of a screening.
    """

    number: int
    scores: Mapping[str, float]
    reason: str | None
    best: Mapping[str, float]
    done: int
    total: int
    what: str = "trial"
    best_params: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A study is open, with this total and these trials done; `items`: number and tokens of each text's windows.

    `is_short`: see `Session.is_short`.
    """

    study: "Study"
    total: int
    done: int
    items: Mapping[str, tuple[int, int]]
    is_short: bool = False


@dataclass(frozen=True)
class Ahead:
    """The work that is left of a study: number and size (in tokens through all blocks) of each part."""

    parts: Mapping[str, tuple[int, float]]


Event = Message | TrialStarted | Step | TrialEnded | Opened | Ahead
EventHandler = Callable[[Event], None]
Notify = Callable[[str], None]  # takes one line about a slow step


def ignore_events(event: Event | str) -> None:
    """The handler for callers that need no events, or no messages."""


silent: Notify = ignore_events


@dataclass(frozen=True)
class Place:
    """Where a command works: the folder at which relative paths start (`base`), the device, permissions, listener.

    `allowed`: keys of `study.ModelConfig` that a configuration, which may be a stranger's, cannot set, and
    `trust_plugins`, by which the code of its plug-ins may run.
    """

    base: Path
    device: str = "auto"
    allowed: Mapping[str, bool] = field(default_factory=dict)
    watch: EventHandler = ignore_events

    def note(self, text: str) -> None:
        """Reports one line."""
        self.watch(Message(text))


def calling(watch: EventHandler, folder: str, name: str) -> EventHandler:
    """A handler that has a name for a folder that is removed in the end."""

    def on_event(event: Event) -> None:
        match event:
            case Message(text):
                event = Message(text.replace(folder, name))
            case TrialStarted(title):
                event = replace(event, title=title.replace(folder, name))
        watch(event)

    return on_event
