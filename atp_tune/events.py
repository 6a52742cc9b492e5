"""What a run reports while it goes on: plain values that the command line draws and tests can read."""

from collections.abc import Callable
from dataclasses import dataclass

from atp_tune.plan import Plan


@dataclass(frozen=True)
class Message:
    """One line that a person should read."""

    text: str


@dataclass(frozen=True)
class TrialStarted:
    """A trial begins, or what is measured beside the trials (dense, final report): that has no `number`."""

    title: str
    plan: Plan | None
    number: int | None = None


@dataclass(frozen=True)
class Step:
    """Part `done` of `total` of a phase (prune, evaluate, …) of what was started last."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class TrialEnded:
    """A trial has its values (perplexity, and `kl` if the study minimises it), or None and the reason; `what` it is, a
    trial or a screening of points. Of `best` and `best_kl` the one by which trials are compared is there.
    """

    number: int
    value: float | None
    reason: str | None
    best: float | None
    done: int
    total: int
    what: str = "trial"
    kl: float | None = None
    best_kl: float | None = None


Event = Message | TrialStarted | Step | TrialEnded
EventHandler = Callable[[Event], None]


def ignore_events(event: Event) -> None:
    """For callers that do not want to know."""
