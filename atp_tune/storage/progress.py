"""The processes that run trials, and a study's progress: its measured trials in order, those that count, those lost."""

import faulthandler
import logging
import os
import platform
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from atp_tune.errors import UserError, printable
from atp_tune.events import Event, EventHandler, Step
from atp_tune.storage.attributes import Attributes, checked_trial
from atp_tune.utils.cache import cache_dir, sha256_of_json
from atp_tune.utils.compat import is_heartbeat_enabled


def experimental() -> Any:
    """A context in which Optuna does not warn that what is used is experimental."""
    return warnings.catch_warnings(action="ignore", category=ExperimentalWarning)


# --- The process that runs a trial: its identity, whether it is alive, and its trace.

HEARTBEAT = 15  # seconds between heartbeats of a running trial
GRACE = 60  # seconds without a heartbeat after which a trial is lost


def identity() -> dict[str, Any]:
    """Host, process id and start time of this process, and the boot time of its host.

    Times are in seconds since 1970 by the host's clock, which may be set while the process runs.
    """
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "booted": psutil.boot_time(),
    }


def is_dead(identity: Attributes) -> bool:
    """Whether the process ran on this host and has ended; False for processes of other hosts."""
    return _is_known(identity) and not is_alive(identity)


def is_alive(identity: Attributes) -> bool:
    """Whether the process runs on this host; False for processes of other hosts."""
    if not _is_known(identity):
        return False
    try:
        process = psutil.Process(identity["pid"])
        began, state = process.create_time(), process.status()
    except psutil.NoSuchProcess:
        return False
    # By the clock or by the time since boot: on Linux, setting the clock moves all start times, on macOS it does not.
    differs = began - float(identity["process_started"])
    return state != psutil.STATUS_ZOMBIE and min(abs(differs), abs(differs - _moved(identity))) <= 1


def _moved(identity: Attributes) -> float:
    """Seconds by which this host's clock was set after the process began, or a much larger number if it was booted."""
    return psutil.boot_time() - float(identity.get("booted", psutil.boot_time()))


def _is_known(identity: Attributes) -> bool:
    return identity.get("host") == platform.node() and "pid" in identity and "process_started" in identity


# --- The trace of a process: the last step of its trial, in a small file that another process of the host can read.
#
# The file is in the cache folder. A step costs a write of microseconds, to the page cache, which outlives the
# process; a row in the database would cost milliseconds. Python's faulthandler adds the signal of a crash.

WIDTH = 100  # bytes of the step; faulthandler's output follows
CRASH = re.compile(rb"^Fatal Python error: (.{1,100})", re.MULTILINE)

log = logging.getLogger(__name__)


class Trace:
    """The trace of a process, which runs one trial after another."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._last = dict[str, tuple[int, int]]()  # phase → its part, and the last step done

    def heard_by(self, watch: EventHandler) -> EventHandler:
        """The handler, with each `Step` written to the trace first."""

        def hear(event: Event) -> None:
            if isinstance(event, Step):  # `after evaluate 3 of 30`, with the part for a phase that repeats
                part, done = self._last.get(event.phase, (1, 0))
                part += event.done <= done
                self._last[event.phase] = part, event.done
                again = f", part {part}" if part > 1 else ""
                self._write(f"after {event.phase} {event.done} of {event.total}{again}")
            watch(event)

        return hear

    @contextmanager
    def of(self, study: str, trial: int) -> Iterator[None]:
        """Traces one trial; the file is removed when the trial ends. If it cannot be written, there is no trace."""
        with ExitStack() as stack:
            try:
                file = _file(study, trial, os.getpid())
                stack.callback(file.unlink, missing_ok=True)
                self._file = stack.enter_context(FileIO(file, "w"))
                if not faulthandler.is_enabled():  # by pytest, Ray or a user
                    faulthandler.enable(self._file, all_threads=False)
                    stack.callback(faulthandler.disable)
            except (OSError, UserError) as error:
                log.debug("no trace of trial %d: %s", trial, error)
            self._last.clear()
            self._write("at its beginning")
            try:
                yield
            finally:
                self._file = None

    def _write(self, text: str) -> None:
        if self._file is None:
            return
        with suppress(OSError):  # a full disk
            self._file.seek(0)
            self._file.write(text.encode()[:WIDTH].ljust(WIDTH))


def trace_left(study: str, trial: int, pid: int) -> tuple[str | None, str | None]:
    """The step and the crash in the trace of a process of this host; None where unknown."""
    try:
        left = _file(study, trial, pid).read_bytes()
    except (OSError, UserError):
        return None, None
    crash = CRASH.search(left[WIDTH:])
    return _text(left[:WIDTH]) or None, _text(crash[1]) if crash else None


def forget(study: str, trial: int, pid: int) -> None:
    """Removes the trace of a process of this host."""
    with suppress(OSError, UserError):
        _file(study, trial, pid).unlink(missing_ok=True)


def _file(study: str, trial: int, pid: int) -> Path:
    """The file of a trace, named by a hash: a study's name may not be a safe file name."""
    return cache_dir("running") / sha256_of_json([platform.node(), pid, study, trial])


def _text(left: bytes) -> str:
    return printable(left.decode(errors="replace").strip())


def trials_in(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials of a study, or only those in these states; they are not copied, and not to be changed."""
    return study.get_trials(deepcopy=False, states=states or None)


START = "start"  # attribute of the trials that a study queues before its search


def measured(study: optuna.Study) -> list[FrozenTrial]:
    """The fully measured trials, the best first."""
    return ranked(trials_in(study))


def ranked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The fully measured ones among these trials, the lowest value first; with two values, the first counts.

    Of equal accuracies, which are common, the one with the lower cross-entropy.
    """
    done = (trial for trial in trials if trial.state == TrialState.COMPLETE and trial.values is not None)
    return sorted((trial for trial in done if "stopped_after" not in trial.user_attrs), key=order)


def order(trial: FrozenTrial) -> list[float]:
    """The key that orders trials: the values, then, of accuracies, the cross-entropy."""
    nlls = trial.user_attrs.get("nlls") if "misses" in trial.user_attrs else None
    return [*objective_values(trial), *([statistics.fmean(nlls)] if nlls else [])]


def objective_values(trial: FrozenTrial) -> list[float]:
    """A trial's values, [] if it has none: Optuna's `value` fails where there are two."""
    return trial.values or []


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards the study's total: it has a value, its plan failed, or it was given up."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and ("failure" in trial.user_attrs or bool(given_up(trial)))
    )


def counted(study: optuna.Study) -> int:
    """Number of trials that count towards the total."""
    return sum(counts(trial) for trial in trials_in(study))


def running(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that run now, in this process or another."""
    return trials_in(study, TrialState.RUNNING)


def terminate_early(study: optuna.Study, total: int) -> None:
    """Lowers the study's total from the requested one to its counted and running trials."""
    have = counted(study) + len(running(study))
    study.set_user_attr("terminated_early", [total, have])
    study.set_user_attr("total", have)


def effective_total(study: optuna.Study, total: int, goes_on: bool = False) -> int:
    """The study's total where this one is requested: lower if the study terminated early before that total.

    `goes_on`: the request overrides the early termination.
    """
    request, have = study.user_attrs.get("terminated_early", (0, 0))
    return int(have) if total <= request and not goes_on else total


def requested(study: optuna.Study) -> int | None:
    """Trials that were asked for, if the study ended after fewer; None if it did not."""
    request, have = study.user_attrs.get("terminated_early", (0, 0))
    return int(request) if request and study.user_attrs.get("total") == have else None


def is_repetition(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether a first trial of the study has been measured, or is being measured, by an earlier trial.

    Two workers that begin a study at the same moment both queue its first trials.
    """
    before, trial = trials[:number], trials[number]
    queued = trial.system_attrs.get("fixed_params")
    same = (other for other in before if queued in (other.params, other.system_attrs.get("fixed_params")))
    return START in trial.user_attrs and any(other.state in (TrialState.RUNNING, TrialState.COMPLETE) for other in same)


def is_surplus(trials: Sequence[FrozenTrial], number: int, total: int) -> bool:
    """Whether earlier trials reach the total, or one of them repeats the same lost trial.

    Two workers may both begin the last trial, and both queue a lost one. Trial numbers are unique, so all workers agree
    on which trials are surplus.
    """
    begun = sum(counts(trial) or trial.state == TrialState.RUNNING for trial in trials[:number])
    return begun >= total or is_double(trials, number)


# --- Lost trials: their process ended first. They are found and queued again, or given up if they end it themselves.
#
# A trial that is lost with its machine is run again. A trial that crashes its process would do so each time. Each
# loss is stored as a `CutOff`, by which the two are distinguished: a crashing trial is lost alone, and at the same
# place.

INTERRUPTED = "interrupted"  # the attribute `lost` after Ctrl-C
SURPLUS = "not needed: other workers reached the total, or have it"
SAME = 3  # crashes, or losses at one place, after which a trial is given up
MOST = 25  # losses of any kind after which a trial is given up


@dataclass(frozen=True)
class CutOff:
    """One loss of a trial.

    `place`: the last step, if its host's trace is there; `crash`: the signal or exception that ended its process;
    `alone`: the host kept running and lost no other trial.
    """

    place: str | None = None
    crash: str | None = None
    alone: bool = False

    @classmethod
    def read(cls, stored: Attributes) -> "CutOff":
        """A cut-off from its attribute; values of other types are ignored."""
        step, crash = (value if isinstance(value := stored.get(key), str) else None for key in ("place", "crash"))
        return cls(step, crash, stored.get("alone") is True)

    def stored(self) -> dict[str, str | bool]:
        """The attribute of a trial."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        """` after prune 12 of 30 (Segmentation fault)`; "" if nothing is known."""
        text = f" {self.place}" if self.place else ""
        return text + (f" ({self.crash})" if self.crash else "")


def why_given_up(cut_offs: Sequence[CutOff]) -> str:
    """Why a trial with these cut-offs (earliest first) is given up, to follow `cut off`; "" if it is run again.

    - It crashed `SAME` times.
    - It was lost alone at one place `SAME` times, for example by the OOM killer; `SAME` + 1 times in a row if it was
      lost at other places too. Cut-offs without a place, or shared with other trials, do not count. Kills from outside,
      at random among n steps, meet this with probability 1/n², and 1/n³ for one time more.
    - It was lost `MOST` times, for example by a leak, or because its machine never lives long enough.
    """
    crashes = [one.crash for one in cut_offs if one.crash]
    steps = [one.place for one in cut_offs if one.alone and one.place]
    if len(crashes) >= SAME:
        return f"{len(crashes)} times by itself ({', '.join(dict.fromkeys(crashes))})"
    needed = SAME + (len(set(steps)) > 1)
    if len(steps) >= needed and len(set(steps[-needed:])) == 1:
        return f"{needed} times in a row {steps[-1]}"
    return f"{len(cut_offs)} times" if len(cut_offs) >= MOST else ""


def requeue_lost(study: optuna.Study, trials: Sequence[FrozenTrial] | None = None) -> list[int]:
    """Fails the running trials without a live process, and queues lost trials again or gives them up; their numbers.

    Queues also the trials that a process failed and died before it queued them. `trials`: all of the study, if the
    caller has just read them.
    """
    db = study._storage
    silent: list[int] = db._get_stale_trial_ids(study._study_id) if is_heartbeat_enabled(db) else []  # type: ignore[attr-defined]
    trials = trials_in(study) if trials is None else trials
    dead = [
        one
        for one in trials
        if one.state == TrialState.RUNNING and (one._trial_id in silent or is_dead(one.user_attrs) or _is_nameless(one))
    ]
    for trial in dead:
        is_silent = trial._trial_id in silent and not is_dead(trial.user_attrs)
        why = {
            "cut_off": _cut_off(study.study_name, trial, dead).stored(),
            "lost": "sent no heartbeat" if is_silent else "its process died",
        }
        if _end(study, trial, why):  # unless another process has done so
            forget(study.study_name, trial.number, trial.user_attrs.get("pid", 0))
    trials = trials_in(study) if dead else trials
    queued = {number for trial in trials for number in retry_history(trial)}
    orphans = [trial for trial in trials if is_lost(trial) and trial.number not in queued]
    for trial in orphans:
        queue_again(study, trial)
    # Fails waiting trials that are queued twice: two processes that find the same lost trial both queue it.
    now = trials_in(study) if orphans else trials
    for number, trial in enumerate(now):
        if trial.state == TrialState.WAITING and is_double(now, number):
            with suppress(UpdateFinishedTrialError):
                if study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):  # no worker has taken it
                    _end(study, trial, {"lost": SURPLUS})
    ended = [trials[trial.number] for trial in dead if given_up(trials[trial.number])]
    return sorted(trial.number for trial in (*orphans, *ended))


def end_interrupted(study: optuna.Study, number: int) -> None:
    """Fails a trial of this process that Ctrl-C interrupted, unless it has ended, and queues it again."""
    _end(study, trials_in(study)[number], {"lost": INTERRUPTED})
    requeue_lost(study)


def _end(study: optuna.Study, trial: FrozenTrial, attributes: Attributes) -> bool:
    """Fails a trial, with attributes that say why; False if it has ended already."""
    try:
        for name, value in attributes.items():
            study._storage.set_trial_user_attr(trial._trial_id, name, value)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False
    return True


def _cut_off(study: str, trial: FrozenTrial, dead: Sequence[FrozenTrial]) -> CutOff:
    """How a trial's process ended, from its trace; an empty cut-off if it ran on another host."""
    attrs = trial.user_attrs
    if not is_dead(attrs):
        return CutOff()
    others = {_process(other) for other in dead if is_dead(other.user_attrs)} - {_process(trial)}
    step, crash = trace_left(study, trial.number, attrs["pid"])
    return CutOff(step, crash, alone=not (others or abs(_moved(attrs)) > GRACE))


def _process(trial: FrozenTrial) -> tuple[Any, ...]:
    return tuple(trial.user_attrs.get(key) for key in ("pid", "process_started"))


def _is_nameless(trial: FrozenTrial) -> bool:
    """Whether a trial has lacked its process's identity for `GRACE` seconds; storing it takes milliseconds."""
    began, has_identity = trial.datetime_start, "process_started" in trial.user_attrs
    return not has_identity and began is not None and abs((datetime.now() - began).total_seconds()) > GRACE


def queue_lost(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queues a trial again that Optuna failed for lack of heartbeats, unless it is given up; a callback of Optuna's."""
    trial = checked_trial(trial, len(study.directions))
    if is_lost(trial):
        queue_again(study, trial)


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queues a lost trial with the same parameters."""
    history = [*retry_history(trial), trial.number]
    study.add_trial(
        optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs={
                **trial.system_attrs,
                "failed_trial": history[0],
                "retry_history": history,
                "cut_offs": [one.stored() for one in all_cut_offs(trial)],
            },
        )
    )


def retry_history(trial: FrozenTrial) -> list[int]:
    """Numbers of the lost trials that this one repeats, from Optuna's own attribute."""
    return list(trial.system_attrs.get("retry_history", []))


def all_cut_offs(trial: FrozenTrial) -> list[CutOff]:
    """The cut-offs of a trial and the trials that it repeats, the earliest first."""
    before = list(map(CutOff.read, trial.system_attrs.get("cut_offs", [])))
    return [*before, CutOff.read(trial.user_attrs.get("cut_off", {}))] if _is_cut_off(trial) else before


def _is_cut_off(trial: FrozenTrial) -> bool:
    """Whether a trial failed, but not because of its plan, Ctrl-C, or surplus."""
    has_reason = "failure" in trial.user_attrs or trial.user_attrs.get("lost") in (INTERRUPTED, SURPLUS)
    return trial.state == TrialState.FAIL and not has_reason


def given_up(trial: FrozenTrial) -> str:
    """Why a trial that was cut off is given up, to follow the words `cut off`; "" for any other trial."""
    return why_given_up(all_cut_offs(trial)) if _is_cut_off(trial) else ""


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial failed, but not because of its plan, and is to be run again."""
    own = "failure" in trial.user_attrs or trial.user_attrs.get("lost") == SURPLUS
    return trial.state == TrialState.FAIL and not own and not given_up(trial)


def is_double(trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether an earlier trial repeats the same lost trials."""
    history = retry_history(trials[number])
    return bool(history) and any(history == retry_history(trial) for trial in trials[:number])
