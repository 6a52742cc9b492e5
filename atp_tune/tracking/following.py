"""Keeps trackers up to date with a study while it runs; one that fails is left out, and the study goes on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import optuna

from atp_tune.cache import sha256_of_json
from atp_tune.checkpoints.convert import one_line
from atp_tune.events import Event, EventHandler, Message, TrialEnded
from atp_tune.results.summary import summarise
from atp_tune.tracking import TRACKERS, TrackedStudy, Tracker
from atp_tune.tracking.records import final_numbers, records


class Follower:
    """An event handler that writes each trial that has ended to the trackers; a context manager.

    `load` reads the study from its storage, None before it is made; `beside` gives the path of a file beside its
    database; `tell` gets a message if a tracker fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        load: Callable[[], optuna.Study | None],
        beside: Callable[[str], Path],
        tell: EventHandler,
    ) -> None:
        self._waiting = list(dict.fromkeys(names))  # not yet opened
        self._open: dict[str, Tracker] = {}
        self._load, self._beside, self._tell = load, beside, tell
        self._study: optuna.Study | None = None

    def __enter__(self) -> "Follower":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self._write(final=True)
        for name in list(self._open):
            self._guarded(name, self._open[name].close)

    def __call__(self, event: Event) -> None:
        """Writes what has ended by now, once a trial of the study itself ends."""
        if isinstance(event, TrialEnded) and event.what == "trial":
            self._write()

    def _write(self, final: bool = False) -> None:
        if not (self._waiting or self._open):
            return
        self._study = self._study or self._load()
        study = self._study
        if study is None or not (trials := study.get_trials(deepcopy=False)):
            return
        key = sha256_of_json([study.study_name, str(trials[0].datetime_start)])[:16]
        for name in self._waiting:
            self._guarded(name, partial(self._begin, name, TrackedStudy(study.study_name, key, self._beside)))
        self._waiting = []
        summary = summarise(study)
        rows = list(records(study, summary))

        def write(tracker: Tracker) -> None:
            known = tracker.known()
            for row in rows:
                if row.number not in known:
                    tracker.log(row)
            if final and rows:
                tracker.finish(final_numbers(summary), rows[-1].number)

        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(write, tracker))

    def _begin(self, name: str, study: TrackedStudy) -> None:
        self._open[name] = tracker = TRACKERS[name](study)
        self._tell(Message(f"--track {name}: {tracker.place}"))

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Calls a function of a tracker; if it fails, the tracker is left out from now on."""
        try:
            call()
        except Exception as error:  # trackers raise many types
            self._open.pop(name, None)
            self._tell(Message(f"--track {name}: {one_line(error)}; the study goes on without it"))
