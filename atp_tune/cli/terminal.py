"""The console that commands print to, its tables, and what they run in: silenced libraries, Ctrl-C, progress."""

import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any

from atp_tune.errors import printable
from atp_tune.utils import system
from atp_tune.utils.system import as_typed, silenced

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WRAPPED = ("remark", "what", "plan", "dense", "uniform", "best")  # columns that may take several lines
LEAST = len("φ=-0.0123456")  # columns of a plan, so that no parameter is broken
STOPS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"
WIDE = 1000  # columns: no line of a Markdown table is broken


@cache
def console() -> "Console":
    """The console, which is made when it is first used: `--help` and Tab need no rich, whose import takes longest."""
    from rich.console import Console
    from rich.text import Text

    class Terminal(Console):
        """A console that escapes control characters, which strangers may have written, and types commands as here."""

        def render_str(self, text: str, **options: Any) -> Text:
            lines = "\n".join(map(printable, text.split("\n")))
            return super().render_str(as_typed(lines), **options)

    return Terminal(soft_wrap=True, markup=False, highlight=False, emoji=False)  # paths and reasons may hold brackets


def echo(*texts: Any, **options: Any) -> None:
    """Prints to the console."""
    console().print(*texts, **options)


def as_json(what: Any) -> str:
    """One JSON document of what a command found, or of several."""
    from atp_tune.results.status import to_json

    return to_json(what)


def table(*columns: str) -> "Table":
    """An empty table for the terminal."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for column in columns:
        grid.add_column(
            column,
            overflow="fold",
            no_wrap=column not in WRAPPED,
            min_width=LEAST if column == "plan" else None,
        )
    return grid


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table of cells as they are, without markup; no row is wrapped, however narrow the terminal is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.MARKDOWN, header_style="")
    for column in head:
        grid.add_column(column, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    text = StringIO()
    Console(width=WIDE, file=text, markup=False, emoji=False).print(grid)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip())


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 1024**3:.2f} GiB"


def trials(number: int) -> str:
    """A number of trials in words: `1 trial`, `2 trials`."""
    return f"{number} trial" + "s" * (number != 1)


@contextmanager
def quiet(tell: Callable[[str], None] | None = None) -> Iterator[None]:
    """Silences the logs and warnings of libraries; their exceptions still reach the caller.

    Log messages of this package go to `tell`, by default the console.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    own, words = logging.getLogger("atp_tune"), system.Said(tell or echo)
    own.addHandler(words)
    try:
        with silenced():
            yield
    finally:
        own.removeHandler(words)


@contextmanager
def interruptible(*stops: signal.Signals) -> Iterator[None]:
    """Ctrl-C or SIGTERM raises KeyboardInterrupt, never within a transaction; a second Ctrl-C ends the process at once.

    A second SIGTERM is ignored, since Slurm sends several.
    """
    stops = stops or STOPS

    def once() -> None:
        for stop in stops:
            signal.signal(stop, signal.SIG_DFL if stop == signal.SIGINT else signal.SIG_IGN)
        if console().is_terminal:
            with suppress(OSError, ValueError):  # not by `echo`, which may be writing just now
                os.write(console().file.fileno(), SHOW_CURSOR)

    with system.interruptible(*stops, once=once):
        yield


@contextmanager
def working(is_quiet: bool = False) -> Iterator[Any]:
    """Runs a command's work with silenced libraries, and yields its event handler, which shows progress.

    `is_quiet`: nothing else is printed meanwhile.
    """
    from atp_tune.cli.display import Display
    from atp_tune.events import ignore_events

    with quiet(), redirect_stdout(StringIO()) if is_quiet else nullcontext(), Display() as display:
        yield ignore_events if is_quiet else display
