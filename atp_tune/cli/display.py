"""Progress of a run: on a terminal a bar for the whole study and one for each worker, elsewhere plain lines."""

import shlex
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime, timedelta
from math import ceil
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING

from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import SQLAlchemyError

from atp_tune.cli.terminal import console, echo, interruptible, markdown, table
from atp_tune.config.best import read_config
from atp_tune.config.finding import known
from atp_tune.config.plugged import permission
from atp_tune.config.studyfile import StudyFile, read
from atp_tune.cost.planning import Remaining
from atp_tune.errors import UserError, printable
from atp_tune.events import Ahead, Event, EventHandler, Message, Step, TrialEnded, TrialStarted
from atp_tune.measures import MEASURES, PERPLEXITY
from atp_tune.metrics import Continuations
from atp_tune.plan import percent
from atp_tune.report.formats import speed
from atp_tune.results import summary as tables
from atp_tune.results.formatting import (
    continuations_note,
    duration,
    errors_of,
    in_one_line,
    limit_of,
    sizes_note,
    study_remarks,
    texts_note,
    wanted,
)
from atp_tune.results.results import is_uniform
from atp_tune.results.status import Status, TrialStatus, status_of, to_json
from atp_tune.results.summary import Summary, summarise
from atp_tune.storage import opening
from atp_tune.storage.database import without_password

if TYPE_CHECKING:
    from rich.table import Table

PERIOD = 60  # seconds after which a plain line says how far a phase is


class TimeLeft(TimeRemainingColumn):
    """The time left of the whole study, beside its bar; beside other bars their own, where no study runs."""

    def render(self, task: Task) -> Text:
        """`ETA 0:03:50`, or nothing."""
        said = task.fields.get("left")
        return Text.assemble("ETA ", super().render(task)) if said is None else Text(said)


class Display:
    """Shows the progress of a run; a context manager, and the event handler of a run in one process."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), TimeLeft(), console=console(), transient=True,
        )  # fmt: skip
        self._whole = self.bars.add_task("study", total=None, visible=False, count="", left="")
        self._remaining = Remaining()
        self.is_study = False
        self._began = monotonic()
        self._notes: set[str] = set()
        self._only: Line | None = None
        self.listeners: list[EventHandler] = []  # are told of each trial that ends, of any worker

    def __enter__(self) -> "Display":
        if console().is_terminal:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the bars from the screen."""
        if self.bars.live.is_started:
            self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Shows an event of a run in one process."""
        self._only = self._only or Line(self)
        self._only(event)

    def note(self, text: str) -> None:
        """Prints a line unless it was printed before: several workers may send the same."""
        if text not in self._notes:
            echo(text)
        self._notes.add(text)

    def leave(self, line: "Line") -> None:
        """Counts the process of a line no more among those that share the trials that are left."""
        self._remaining.leave(line)

    def hear(self, event: Event, line: "Line") -> float | None:
        """Takes an event of a line's process; the seconds that the whole study has yet to take, if they are known."""
        now = monotonic()
        self.is_study = self.is_study or isinstance(event, Ahead)
        self._remaining.hear(event, now, line)
        left = self._remaining.left(now)
        if left is not None:
            took, said = now - self._began, f"ETA {timedelta(seconds=ceil(left))}"
            self.bars.update(self._whole, completed=took, total=took + left, left=said, visible=True)
        return left

    def end(self, event: TrialEnded, plan: str, seconds: float, left: str) -> None:
        """Prints the result of a trial; `left`: the time left."""
        from atp_tune.results.formatting import best_so_far, trial_line

        echo(trial_line(event, plan, seconds, "" if console().is_terminal or not left else f", {left}"), markup=False)
        count = f"{event.done}/{event.total} {event.what}s"
        self.bars.update(self._whole, description=f"study ({best_so_far(event)})", count=count)
        for listen in self.listeners:
            listen(event)


class Line:
    """Shows the progress of one process; its event handler."""

    def __init__(self, display: Display, name: str = "") -> None:
        self._display = display
        self._name = name
        self._bar = display.bars.add_task("", total=None, visible=False, count="")
        self._title = self._plan = ""
        self._began = monotonic()
        self._phases: dict[str, tuple[int, float]] = {}  # first step of each, and when it ended
        self._said = self._began  # when a line was printed last

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        from atp_tune.results.formatting import duration

        now, whole, bars = monotonic(), self._display.hear(event, self), self._display.bars
        left = "" if whole is None else f"{duration(ceil(whole))} left"
        match event:
            case Message(text):
                self._display.note(text)
            case TrialStarted(title, plan):
                self._title, self._plan, self._began = title, str(plan) if plan else "", now
                self._phases, self._said = {}, now
                bars.reset(self._bar, description=printable(f"{self._name}{title}"), visible=True)
                if not console().is_terminal and not title.startswith(("trial", "screening")):
                    echo(f"{title} {self._plan}".rstrip() + (left and f" ({left})"))
            case Step(phase, done, total):
                title = printable(f"{self._name}{self._title}: {phase}")
                bars.update(
                    self._bar, description=title, completed=done, total=total, visible=True,
                    count=f"{done}/{total}", left="" if self._display.is_study else None,
                )  # fmt: skip
                # Elsewhere a line says how far a phase is, once in a `PERIOD`; phases may take turns.
                first, began = self._phases.setdefault(phase, (done, now))
                if done <= first:  # it begins, perhaps again
                    self._phases[phase] = done, now
                elif done < total and now - self._said >= PERIOD and not console().is_terminal:
                    left = left or f"{duration((now - began) / (done - first) * (total - done))} left"
                    echo(f"{title} {done} of {total}, {left}", markup=False)
                    self._said = now
            case TrialEnded():
                self._display.end(event, self._plan, now - self._began, left)

    def hide(self) -> None:
        """Removes the bar of a process that has ended."""
        self._display.leave(self)
        self._display.bars.update(self._bar, visible=False)


# --- Tables of a study for the terminal: trials, progress, summary. Needs neither torch nor a model.

MARK = " ←"  # at the best of several points
WIDE_ENOUGH = 33  # columns for each of the texts side by side


def show_summary(summary: Summary, file: StudyFile) -> None:
    """Prints dense, uniform and the best of each allocation as a Markdown table, then the next commands."""
    spec = (summary.made_from or file).study
    asked = wanted(spec)
    if summary.sparsity and spec.bits is None:  # as stored: the file may have changed since
        asked = f"{percent(summary.sparsity)} sparsity"
    echo(f"{printable(summary.name)}: {asked}\n")
    echo(drawn(tables.overview(summary, summary.goal.hidden)))
    if kinds := tables.kinds(summary):
        echo(f"\n{drawn(kinds)}")
    # The legend of the table.
    items = summary.results.unit
    same = f"same {summary.amount.method}{summary.goal.same}, same {items}"
    paired = f"against uniform: {same}, error of the difference"
    notes = [f"±: {errors_of(summary)}; {paired}", sizes_note(summary), summary.goal.draws(summary)]
    notes += [texts_note(summary), *(by.note for by in summary.results.measures), summary.results.words.note]
    if summary.limit:
        by_tasks = "min_accuracy" in summary.limit
        where = "at the lower end" if by_tasks else f"validation {summary.results.data}, at the upper end"
        notes.append(f"limit: {limit_of(summary.limit)}, {where} of the standard error")
    echo("\n" + "\n".join(filter(None, notes)), style="dim")
    best = summary.best_trial
    if best is not None:
        echo(summary.goal.outcome(summary))
    if summary.choices:
        echo("`export` writes another point: --sparsity, --max-increase or --trial names it")
    if front := tables.front(summary):
        echo(f"\nPareto front\n\n{drawn(front)}\n")
    _show_rest(summary)
    if (scores := summary.zero_shot) is not None and scores.mean:
        means = ", ".join(f"{name} {mean.value:.1%}" for name, mean in scores.mean.items())
        echo(f"zero-shot accuracy: {means} (mean of {len(scores.tasks)} tasks; the report has them)")
    if summary.speed is not None and summary.speed.engines:
        made = speed(summary.speed, where=False)
        where = ", ".join(dict.fromkeys(row.where for row in summary.speed.engines))
        echo(f"\n{markdown((f'best, on {where}', *made.head[1:]), made.rows)}\n")
    for remark in study_remarks(summary):
        echo(remark)
    if summary.continuations:
        show_continuations(summary.continuations)
    if best is not None:
        show_next(summary, file)


def drawn(made: tables.Table) -> str:
    """A table in Markdown, with an arrow at the best trial."""
    where = list(made.head).index("trial") if "trial" in made.head else -1
    rows = [
        [f"{cell}{MARK}" if (row, column) == (made.best, where) else cell for column, cell in enumerate(cells)]
        for row, cells in enumerate(made.rows)
    ]
    return markdown(made.head, rows)


def show_continuations(found: Continuations) -> None:
    """Prints what each model makes of each prompt: side by side on a wide terminal, else one below the other."""
    is_wide = console().is_terminal and console().width >= WIDE_ENOUGH * len(found.names)
    width = max(8, *map(len, found.names))
    for prompt, texts in found.rows():
        echo(f"\n{in_one_line(prompt)} …", style="bold")
        if is_wide:
            side_by_side = table(*texts)
            side_by_side.add_row(*map(in_one_line, texts.values()))
            echo(side_by_side, soft_wrap=False)
        else:
            for name, text in texts.items():
                echo(f"  {name:<{width}} {in_one_line(text)}")
    echo(f"\n{continuations_note(found)}\n", style="dim")


def _show_rest(summary: Summary) -> None:
    others = any(trial.values is not None and not is_uniform(trial) for trial in summary.trials)
    if summary.goal.compares and summary.best_trial is not None and is_uniform(summary.best_trial) and others:
        echo("no trial is better than uniform")
    screening = summary.screening
    if screening is not None and not summary.trials:
        done = f"{screening.done} of {screening.total} trials are done"
        echo(f"screening: {done}; they are the study {printable(screening.study)}")
    if summary.requested is not None:
        echo(f"ended early, after {summary.total} of {summary.requested} trials")
    if summary.total is not None and summary.done < summary.total:
        echo(f"{summary.done} of {summary.total} trials are done")
    elif not summary.complete and summary.best_trial is not None and not summary.is_tested:
        echo("the test text is not measured yet: the same command resumes the study")
    elif not summary.complete and summary.best_trial is not None and summary.done == summary.total:
        echo("not all final numbers are measured yet: the same command resumes the study")


def show_status(summary: Summary, file: StudyFile) -> None:
    """Prints all trials of a study, then its summary."""
    echo(trials_table(summary, summary.trials))
    found = (summary.results.score(trial, "validation") for trial in summary.trials)
    values = [score.value for score in found if score is not None]
    if len(values) > 1 and summary.goal.compares:
        echo(f"spread: {min(values):.2f} to {max(values):.2f}, median {statistics.median(values):.2f}")
    show_summary(summary, file)


def trials_table(summary: Summary, trials: list[FrozenTrial]) -> Table:
    """Some of a study's trials, one a row."""
    made = tables.trials(summary, trials)
    drawn = table(*made.head)
    for row in made.rows:
        drawn.add_row(*row)
    return drawn


def progress_line(status: Status) -> str:
    """One line: trials done, best value, running trials with their times, time left."""
    done = f"[{status.done}/{status.total}]" if status.total else f"[{status.done}]"
    best = "no best yet"
    if status.best and (score := status.best.scores[status.objective[0]]["validation"]):
        measure = MEASURES[status.objective[0]]
        name = "" if measure is PERPLEXITY else f"{measure.column} "
        at = "" if status.best.sparsity is None else f" at {percent(status.best.sparsity)}"
        best = f"best {name}{measure.written(score.value)}{at} (trial {status.best.trial})"
    running = [
        f"trial {one.trial} " + ("was lost with its process" if one.lost else f"runs for {duration(one.seconds)}")
        for one in status.running
    ]
    if not running:
        if status.screening and not status.trials:
            running = [f"screening: {status.screening.done} of {status.screening.total} trials"]
        elif status.complete:
            running = ["complete"]
        elif status.total is None or status.done < status.total:
            running = ["no trial runs"]
        else:
            lacks = status.best is None or status.best.scores["perplexity"]["test"] is None
            running = ["the test text is not measured yet" if lacks else "not all final numbers are measured yet"]
    left = [] if status.seconds_left is None else [f"about {duration(status.seconds_left)} left"]
    return f"{done} {', '.join([best, *running, *left])}"


# --- The last words of a run: the file of the best configuration, and the commands that come next.


def show_next(summary: Summary, file: StudyFile) -> None:
    """Prints the file of the best configuration, if it holds the best trial, and the commands that come next."""
    best = file.best_of(summary.name)
    try:
        made = read_config(best) if best.exists() else None
    except UserError:
        return
    is_there = made is not None and summary.best_trial and made.trial == summary.best_trial.number
    if made is None or not summary.is_tested or not is_there:
        return
    is_slim = summary.of_channels
    form = "slim" if is_slim else summary.amount.form
    # A name that no file has here: the name itself, or followed by -2, -3 and so on.
    name = f"{printable(summary.name).replace('/', '_')}-{form}"
    names = (name, *(f"{name}-{number}" for number in range(2, 1000)))
    config, out = _from_here(best), next((free for free in names if not Path(free).exists()), name)
    # The words that name the stored study from here.
    is_known = file.path.absolute() in [path.absolute() for path in known()]
    study = ["--study", file.name if is_known else _from_here(file.path)]
    study += ["--study-name", printable(summary.name)] if summary.name != file.name else []
    url = file.study.storage
    is_elsewhere = url is not None and url != read(file.path).get("storage")
    study += ["--storage", without_password(url)] if url and is_elsewhere else []
    if points := summary.choices:
        middle = points[len(points) // 2].sparsity
        second = ("another point", ["export", *study, "--sparsity", f"{middle:.4g}"])
    else:
        second = ("page with figures", ["report", *study])
    rows = [
        (
            f"{form} checkpoint",
            ["apply", "--config", config, "--out", out, *["--slim"] * is_slim, *permission(file.study)],
        ),
        second,
        *[("top-1 and top-5", ["evaluate", "--config", config])] * (summary.results.data == "images"),
    ]
    echo(f"best configuration: {config}")
    if summary.results.data == "text":
        rows.insert(0, ("talk with it", ["chat", *study, *permission(file.study)]))
    for what, words in rows:
        echo(f"{what + ':':<19} {shlex.join(['python', 'tune.py', *words])}")


def _from_here(path: Path) -> str:
    """A path relative to the current folder, if it is inside."""
    here = Path.cwd()
    return printable(str(path.relative_to(here) if path.is_relative_to(here) else path))


# --- `status` and `status --watch`: on a terminal, in a pipe, or as JSON.


def watch(file: StudyFile, name: str, every: float, as_json: bool) -> None:
    """Shows a study until it is complete, then its summary; Ctrl-C ends it with exit code 130, as it does a run.

    A terminal's alternate screen has as many trials as it has rows for; after Ctrl-C the normal screen has the last
    state. Elsewhere what changed is printed.
    """
    live = Live(console=console(), screen=True, auto_refresh=False) if console().is_terminal and not as_json else None
    changes, last, waits = Changes(as_json), None, f"study {name}: has no trials yet; waiting for it"
    try:
        with interruptible(), live or nullcontext():
            try:
                for summary in looks(file, name, every):
                    last = summary
                    if live:
                        shown = _line(waits) if summary is None else fitting(summary, datetime.now())
                        live.update(shown, refresh=True)
                    else:
                        changes.show(summary, waits)
            except KeyboardInterrupt:
                if live:  # another one would leave the terminal without its screen and cursor
                    signal.signal(signal.SIGINT, signal.SIG_IGN)
                    live.stop()
                if live and last:
                    echo(fitting(last, datetime.now()))
                raise
    except KeyboardInterrupt:
        sys.exit(130)
    if last is not None and not as_json:
        show_status(last, file)


def looks(file: StudyFile, name: str, every: float) -> Iterator[Summary | None]:
    """Summaries of the study every so many seconds, until it is complete; None while it does not exist."""
    db = study = None
    while True:
        db = db or opening.open_storage(file.storage_url, create=False)
        study = study or (opening.find_study(db, name) if db else None)
        try:
            summary = summarise(study) if study else None
        except (StorageInternalError, SQLAlchemyError, KeyError) as error:
            reason = "it is gone" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(f"study {name}: cannot be read any more: {reason}") from None
        yield summary
        if summary and summary.complete:
            return
        sleep(every)


class Changes:
    """Prints the states of a study, each only if it differs from the one before: what changed of it, or JSON lines."""

    def __init__(self, as_json: bool = False) -> None:
        self._as_json = as_json
        self._said: Status | str | None = ""
        self._known: dict[int, TrialStatus] = {}

    def show(self, summary: Summary | None, waits: str = "") -> None:
        """Prints a state; nothing of a complete study, but in JSON, since its summary follows.

        `waits`: what is said, once, of a study that does not exist yet.
        """
        status = None if summary is None else status_of(summary, datetime.now())
        before, self._said = self._said, status and status.without_clock()
        if before == self._said:  # times that the clock alone changes do not count
            return
        if summary is None or status is None:
            print(waits, file=sys.stderr, flush=True) if self._as_json else echo(waits)
        elif self._as_json:
            print(to_json(status, indent=None), flush=True)
        elif not summary.complete:
            changed = {trial.number for trial in status.trials if self._known.get(trial.number) != trial}
            self._known = {trial.number: trial for trial in status.trials}
            if changed:
                echo(trials_table(summary, [trial for trial in summary.trials if trial.number in changed]))
            echo(progress_line(status))


def fitting(summary: Summary, now: datetime) -> RenderableType:
    """All trials and the progress; only the best and the last trials where the terminal has too few rows."""
    progress = _line(progress_line(status_of(summary, now)))
    for trials in _choices(summary, console().height):
        waiting = sum(trial.state == TrialState.WAITING for trial in summary.trials)
        counts = ((len(summary.trials) - len(trials) - waiting, "earlier"), (waiting, "waiting"))
        hidden = " and ".join(f"{count} {word}" for count, word in counts if count)
        more = [_line(f"and {hidden}", "dim")] if len(trials) < len(summary.trials) else []
        drawn = Group(trials_table(summary, trials), *more, progress)
        if len(console().render_lines(drawn)) <= console().height:
            return drawn
    return progress


def _choices(summary: Summary, rows: int) -> Iterator[list[FrozenTrial]]:
    """All trials, then the best trial with ever fewer of the last trials that have begun."""
    yield summary.trials
    begun = [trial for trial in summary.trials if trial.state != TrialState.WAITING]
    best = summary.best_trial
    for count in range(min(rows, len(begun)), 0, -1):
        last = begun[-count:]
        leads = best is not None and best.number < last[0].number
        yield [best, *last[1:]] if best is not None and leads else last


def _line(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style, no_wrap=False, overflow="fold")
