"""Calls to a server that is away are made again until it answers; a line says so when it goes and when it is back.

A worker that has computed for an hour does not lose the result to a cable or a restart.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from threading import Lock, local
from time import monotonic, sleep
from typing import Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import UserError

RETRY_SECONDS = 3600  # seconds of silence after which a worker gives up
RETRY_PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts; the last one again and again

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class Retrying:
    """Waits for one server; any thread may ask through it. `name` is what users call the server."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._since: float | None = None
        self._lock = Lock()
        self._thread = local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Retrying, (self._name,)  # a copy has not waited yet

    @property
    def has_repeated(self) -> bool:
        """Whether this thread's last question was put more than once, so that an answer to it may have got lost."""
        return bool(getattr(self._thread, "has_repeated", False))

    def ask(self, attempt: Callable[[], Answer], away: Callable[[Answer], str]) -> Answer:
        """The answer of the first attempt that is not `away`, which says why; UserError after `RETRY_SECONDS`.

        The time is that of the whole outage, so that the last words of a run that gave up do not wait again.
        """
        pauses, has_repeated = chain(RETRY_PAUSES, repeat(RETRY_PAUSES[-1])), False
        try:
            while reason := away(answer := attempt()):
                self._wait(reason, next(pauses))
                has_repeated = True
        finally:
            self._thread.has_repeated = has_repeated  # at the end: an attempt may ask something else on its way
        self._answered()
        return answer

    def _wait(self, reason: str, pause: float) -> None:
        with self._lock:
            if self._since is None:
                self._since = monotonic()
                log.warning("%s %s; trying again, nothing is lost", self._name, reason)
        if monotonic() - self._since >= RETRY_SECONDS:
            raise UserError(
                f"{self._name} {reason}, for {RETRY_SECONDS / 60:.0f} minutes now. What was told before is stored; the "
                "same command goes on from there"
            )
        sleep(pause)

    def _answered(self) -> None:
        with self._lock:
            if self._since is not None:
                self._since = None
                log.warning("%s answers again", self._name)


def is_told(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> bool:
    """Whether a trial was told just this, by the first of several attempts whose answer got lost."""
    return (trial.state, trial.values) == (state, list(values) if values else None)
