"""Progress of a run: on a terminal a bar for the trials and one for each worker, elsewhere plain lines."""

from statistics import fmean
from time import monotonic
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from atp_tune.cli.terminal import console
from atp_tune.errors import printable
from atp_tune.events import Event, EventHandler, Message, Step, TrialEnded, TrialStarted

PERIOD = 60  # seconds after which a plain line says how far a phase is


class Display:
    """Shows the progress of a run; a context manager, and the event handler of a run in one process."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._trials = self.bars.add_task("trials", total=None, visible=False)
        self._took: list[float] = []  # seconds of each trial that ended
        self._running: set[Line] = set()  # of processes whose trials have ended, and that go on
        self._what = ""
        self._notes: set[str] = set()
        self._only: Line | None = None
        self.listeners: list[EventHandler] = []  # are told of each trial that ends, of any worker

    def __enter__(self) -> "Display":
        if console.is_terminal:
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
            console.print(text)
        self._notes.add(text)

    def leave(self, line: "Line") -> None:
        """Counts the process of a line no more among those that share the trials that are left."""
        self._running.discard(line)

    def end(self, event: TrialEnded, plan: str, seconds: float, line: "Line") -> None:
        """Prints the result of a trial, and advances the bar of the trials."""
        from atp_tune.results.formatting import best_so_far, duration, trial_line

        if event.what != self._what:
            self._what, self._took = event.what, []
        self._took.append(seconds)
        self._running.add(line)
        left = fmean(self._took) * (event.total - event.done) / len(self._running)
        rest = f" of {event.what}s left"  # the test text is measured after them
        eta = f", {duration(left)}{rest}" if event.done < event.total and not console.is_terminal else ""
        console.print(trial_line(event, plan, seconds, eta), markup=False)
        best = best_so_far(event)
        self.bars.update(
            self._trials, description=f"{event.what}s ({best})", completed=event.done, total=event.total, visible=True
        )
        for listen in self.listeners:
            listen(event)


class Line:
    """Shows the progress of one process; its event handler."""

    def __init__(self, display: Display, name: str = "") -> None:
        self._display = display
        self._name = name
        self._bar = display.bars.add_task("", total=None, visible=False)
        self._title = self._plan = ""
        self._began = monotonic()
        self._phases: dict[str, tuple[int, float]] = {}  # first step of each, and when it ended
        self._said = self._began  # when a line was printed last

    def __call__(self, event: Event) -> None:
        """Shows one event."""
        match event:
            case Message(text):
                self._display.note(text)
            case TrialStarted(title, plan):
                self._start(title, str(plan) if plan else "")
            case Step(phase, done, total):
                title = printable(f"{self._name}{self._title}: {phase}")
                self._display.bars.update(self._bar, description=title, completed=done, total=total, visible=True)
                if not console.is_terminal:
                    self._say(title, phase, done, total)
            case TrialEnded():
                self._display.end(event, self._plan, monotonic() - self._began, self)

    def hide(self) -> None:
        """Removes the bar of a process that has ended."""
        self._display.leave(self)
        self._display.bars.update(self._bar, visible=False)

    def _start(self, title: str, plan: str) -> None:
        self._title, self._plan, self._began = title, plan, monotonic()
        self._phases, self._said = {}, self._began
        self._display.bars.reset(self._bar, description=printable(f"{self._name}{title}"), visible=True)
        if not console.is_terminal and not title.startswith(("trial", "screening")):
            console.print(f"{title} {plan}".rstrip())

    def _say(self, title: str, phase: str, done: int, total: int) -> None:
        """Prints how far a phase is, once in a `PERIOD`; phases may take turns."""
        from atp_tune.results.formatting import duration

        now = monotonic()
        first, began = self._phases.setdefault(phase, (done, now))
        if done <= first:  # it begins, perhaps again
            self._phases[phase] = done, now
        elif first < done < total and now - self._said >= PERIOD:
            left = (now - began) / (done - first) * (total - done)
            console.print(f"{title} {done} of {total}, {duration(left)} left", markup=False)
            self._said = now
