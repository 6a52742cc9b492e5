"""Progress of a run: on a terminal a bar for the whole study and one for each worker, elsewhere plain lines."""

from datetime import timedelta
from math import ceil
from time import monotonic

from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from atp_tune.cli.terminal import console, echo
from atp_tune.cost.remaining import Remaining
from atp_tune.errors import printable
from atp_tune.events import Ahead, Event, EventHandler, Message, Step, TrialEnded, TrialStarted, ignore_events

PERIOD = 60  # seconds after which a plain line says how far a phase is


class TimeLeft(TimeRemainingColumn):
    """The time left of the whole study, beside its bar; beside other bars their own, where no study runs."""

    def render(self, task: Task) -> Text:
        """`ETA 0:03:50`, or nothing."""
        text = task.fields.get("left")
        return Text.assemble("ETA ", super().render(task)) if text is None else Text(text)


class Display:
    """Shows the progress of a run; a context manager, and the event handler of a run in one process."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(), TimeLeft(), console=console(), transient=True,
        )  # fmt: skip
        self.whole = self.bars.add_task("study", total=None, visible=False, count="", left="")
        self.remaining = Remaining()
        self.is_study = False
        self._began = monotonic()
        self._notes = set[str]()
        self._only: Line | None = None
        self.listener: EventHandler = ignore_events  # is told of each trial that ends, of any worker

    def __enter__(self) -> "Display":
        if console().is_terminal:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
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

    def hear(self, event: Event, line: "Line") -> float | None:
        """Takes an event of a line's process; the seconds that the whole study has yet to take, if they are known."""
        now = monotonic()
        self.is_study = self.is_study or isinstance(event, Ahead)
        self.remaining.hear(event, now, line)
        left = self.remaining.left(now)
        if left is not None:
            took = now - self._began
            self.bars.update(
                self.whole, completed=took, total=took + left, left=f"ETA {timedelta(seconds=ceil(left))}", visible=True
            )
        return left


class Line:
    """Shows the progress of one process; its event handler."""

    def __init__(self, display: Display, name: str = "") -> None:
        self._display = display
        self._name = name
        self._bar = display.bars.add_task("", total=None, visible=False, count="")
        self._title = self._plan = ""
        self._began = monotonic()
        self._phases = dict[str, tuple[int, float]]()  # first step of each, and when it ended
        self._said = self._began  # when a line was printed last

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        from atp_tune.results.formatting import best_so_far, duration, trial_line

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
                later = "" if console().is_terminal or not left else f", {left}"
                echo(trial_line(event, self._plan, now - self._began, later), markup=False)
                count = f"{event.done}/{event.total} {event.what}s"
                bars.update(self._display.whole, description=f"study ({best_so_far(event)})", count=count)
                self._display.listener(event)

    def hide(self) -> None:
        """Removes the bar of a process that has ended."""
        self._display.remaining.leave(self)
        self._display.bars.update(self._bar, visible=False)
