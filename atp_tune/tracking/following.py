"""Keeps trackers up to date with a study while it runs; one that fails is left out, and the study goes on."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType

import optuna
from optuna.trial import FrozenTrial

from atp_tune.checkpoints.convert import one_line
from atp_tune.events import Event, EventHandler, Message, TrialEnded
from atp_tune.measures import PERPLEXITY, TEXTS, Role
from atp_tune.results.results import DENSE, Model, Results, parameters_of
from atp_tune.results.summary import Summary, summarise
from atp_tune.tracking.trackers import SECONDS, TRACKERS, Beside, Tracker
from atp_tune.utils.cache import sha256_of_json

Numbers = dict[str, float]


class Follower:
    """An event handler that writes each trial that has ended to the trackers; a context manager.

    `load` reads the study from its storage, None before it is made; `tell` gets a message if a tracker fails.
    """

    def __init__(
        self, names: Sequence[str], load: Callable[[], optuna.Study | None], beside: Beside, tell: EventHandler
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
        self._study = study = self._study or self._load()
        if study is None or not (trials := study.get_trials(deepcopy=False)):
            return
        key = sha256_of_json([study.study_name, str(trials[0].datetime_start)])[:16]

        def begin(name: str) -> None:
            self._open[name] = tracker = TRACKERS[name](study.study_name, key, self._beside)
            self._tell(Message(f"--track {name}: {tracker.place}"))

        for name in self._waiting:
            self._guarded(name, partial(begin, name))
        self._waiting = []
        summary = summarise(study)
        rows = list(records(trials, summary))

        def write(tracker: Tracker) -> None:
            known = tracker.steps(SECONDS)
            for row in rows:
                if row[0] not in known:
                    tracker.log(*row)
            if final and rows:
                last, finals = rows[-1][0], final_numbers(summary)
                tracker.log(last, {name: finals[name] for name in finals if last not in tracker.steps(name)})

        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(write, tracker))

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        """Calls a function of a tracker; if it fails, the tracker is left out from now on."""
        try:
            call()
        except Exception as error:  # trackers raise many types
            self._open.pop(name, None)
            self._tell(Message(f"--track {name}: {one_line(error)}; the study goes on without it"))


def records(trials: Sequence[FrozenTrial], summary: Summary) -> Iterator[tuple[int, Numbers, str]]:
    """The trials that have ended, by number: numbers, with the best up to each and the baselines; plan and state."""
    best: Numbers = {}
    results = summary.results
    baselines = _scores(results, "baseline", {"dense": DENSE, "uniform": summary.uniform_trial}, "validation")
    for trial in trials:
        if trial.state.is_finished():
            found = {name: value for name, value in results.record(trial) if value is not None and math.isfinite(value)}
            if "stopped_after" not in trial.user_attrs:  # else the values are estimates
                for by in results.measures:
                    if by.name in found:
                        better = max if by.is_higher_better else min
                        best[by.name] = better(found[by.name], best.get(by.name, found[by.name]))
            drawn = {**trial.params, **parameters_of(trial)}  # over an interval of sparsities, not shares of the bounds
            parameters = {
                key: float(value)
                for key, value in drawn.items()
                if (isinstance(value, int | float) and not isinstance(value, bool))
            }
            numbers = {
                f"{table}/{key}": value
                for table, each in (("trial", found), ("best", best), ("parameters", parameters))
                for key, value in each.items()
            }
            seconds = trial.duration.total_seconds() if trial.duration else 0.0
            plan = " ".join(str(value) for key, value in drawn.items() if key not in parameters)
            yield trial.number, {**numbers, **baselines, SECONDS: seconds}, f"{plan} ({trial.state.name.lower()})"


def final_numbers(summary: Summary) -> Numbers:
    """Scores of dense, uniform and best on both texts, as far as they are known, and the best trial's number."""
    models = {"dense": DENSE, "uniform": summary.uniform_trial, "best": summary.best_trial}
    found: Numbers = {}
    for text in TEXTS:
        found |= _scores(summary.results, f"final/{text}", models, text)
    return found | ({"final/best_trial": float(summary.best_trial.number)} if summary.best_trial else {})


def _scores(results: Results, prefix: str, models: Mapping[str, Model | None], text: Role) -> Numbers:
    """Scores by model, of measures other than perplexity under their name."""
    scores = {
        "/".join([prefix, *([] if by is PERPLEXITY else [by.name]), name]): results.score(model, text, by)
        for by in results.measures
        for name, model in models.items()
    }
    return {name: found.value for name, found in scores.items() if found and math.isfinite(found.value)}
