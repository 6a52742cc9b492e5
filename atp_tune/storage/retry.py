"""Retries of calls to a server that is unreachable, with a warning when an outage begins and ends.

So no network failure or restart of the server costs a worker its result.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from threading import Lock, local
from time import monotonic
from typing import Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import UserError
from atp_tune.system import pause

RETRY_SECONDS = 3600  # seconds of an outage after which a worker gives up
RETRY_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts; the last one repeats

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Retrying:
    """Retries calls to one server (`name` in messages), from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._lock = Lock()
        self._thread = local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Retrying, (self._name,)  # a copy begins without an outage

    @property
    def has_repeated(self) -> bool:
        """Whether this thread's last call took several attempts, so that an earlier one may have succeeded unseen."""
        return bool(getattr(self._thread, "has_repeated", False))

    def ask(self, attempt: Callable[[], Answer], away: Callable[[Answer], str]) -> Answer:
        """The first answer for which `away` gives no reason; UserError after `RETRY_SECONDS` of one outage.

        The limit is for the outage, not the call: after a run has given up, its last calls do not wait again.
        """
        pauses, has_repeated = chain(RETRY_PAUSES, repeat(RETRY_PAUSES[-1])), False
        try:
            while reason := away(answer := attempt()):
                self._wait(reason, next(pauses))
                has_repeated = True
        finally:
            self._thread.has_repeated = has_repeated  # set at the end: an attempt may make a call of its own
        self._answered()
        return answer

    def _wait(self, reason: str, seconds: float) -> None:
        with self._lock:
            if self._since is None:
                self._since = monotonic()
                log.warning("%s %s; trying again, nothing is lost", self._name, reason)
        if monotonic() - self._since >= RETRY_SECONDS:
            raise UserError(
                f"{self._name} {reason}, for {RETRY_SECONDS / 60:.0f} minutes now. All earlier results are stored; "
                "the same command resumes the study"
            )
        pause(seconds)

    def _answered(self) -> None:
        with self._lock:
            if self._since is not None:
                self._since = None
                log.warning("%s answers again", self._name)


def is_told(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> bool:
    """Whether a trial has this state and these values."""
    return (trial.state, trial.values) == (state, list(values) if values else None)
