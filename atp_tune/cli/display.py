"""Progress of a run: two bars on a terminal, plain lines elsewhere."""

from time import monotonic
from types import TracebackType

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from atp_tune.cli.tables import console, duration
from atp_tune.errors import printable
from atp_tune.events import Event, Note, Step, TrialEnded, TrialStarted


class Display:
    """Draws events; a context manager, and what a run takes as its `watch`."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True,
        )  # fmt: skip
        self._trials = self._bars.add_task("trials", total=None, visible=False)
        self._steps = self._bars.add_task("", total=None, visible=False)
        self._title = ""
        self._plan = ""
        self._began = self._first = monotonic()
        self._ended = 0

    def __enter__(self) -> "Display":
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Takes the bars off the screen."""
        if self._bars.live.is_started:
            self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Draws one event."""
        match event:
            case Note(text):
                console.print(text, highlight=False)
            case TrialStarted(title, plan):
                self._start(title, str(plan) if plan else "")
            case Step(phase, done, total):
                self._bars.update(
                    self._steps,
                    description=printable(f"{self._title}: {phase}"),
                    completed=done,
                    total=total,
                    visible=True,
                )
            case TrialEnded():
                self._end(event)

    def _start(self, title: str, plan: str) -> None:
        self._title, self._plan, self._began = title, plan, monotonic()
        self._bars.reset(self._steps, description=printable(title), visible=True)
        if not console.is_terminal and not title.startswith("trial"):
            console.print(f"{title} {plan}".rstrip(), highlight=False)

    def _end(self, event: TrialEnded) -> None:
        self._ended += 1
        now = monotonic()
        value = f"perplexity {event.value:.2f}" if event.value is not None else f"failed: {event.reason}"
        best = f"best {event.best:.2f}" if event.best is not None else "no best yet"
        left = (now - self._first) / self._ended * (event.total - event.done)
        eta = f", {duration(left)} left" if event.done < event.total and not console.is_terminal else ""
        console.print(
            f"[{event.done}/{event.total}] trial {event.number}: {self._plan}: {value} in {now - self._began:.0f} s "
            f"({best}{eta})",
            highlight=False, markup=False,
        )  # fmt: skip
        self._bars.update(
            self._trials,
            description=f"trials ({best})",
            completed=event.done,
            total=event.total,
            visible=True,
        )
