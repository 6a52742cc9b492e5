"""The console that all commands print to, and its two kinds of tables: for the terminal and in Markdown."""

from collections.abc import Iterable
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WRAPPED = ("remark", "what", "plan", "dense", "uniform", "best")  # columns that may take several lines
LEAST = len("φ=-0.0123456")  # columns of a plan, so that no parameter is broken
WIDE = 1000  # columns: no line of a Markdown table is broken


class LazyConsole:
    """The console, which is made when it is first used: `--help` and Tab need no rich, whose import takes longest."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_console(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_console(), name, value)

    def __enter__(self) -> Any:  # as rich's bars and live views do
        return _console().__enter__()

    def __exit__(self, *error: Any) -> None:
        _console().__exit__(*error)


@cache
def _console() -> "Console":
    from atp_tune.cli.console import Terminal

    return Terminal(soft_wrap=True, markup=False, highlight=False, emoji=False)  # paths and reasons may hold brackets


console = cast("Console", LazyConsole())


def table(*columns: str) -> "Table":
    """An empty table for the terminal."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for column in columns:
        least = LEAST if column == "plan" else None
        found.add_column(column, overflow="fold", no_wrap=column not in WRAPPED, min_width=least)
    return found


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; no row is wrapped, however narrow the terminal is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.MARKDOWN, header_style="")
    for column in head:
        made.add_column(column, no_wrap=True)
    for row in rows:
        made.add_row(*row)
    wide = Console(width=WIDE, file=StringIO())
    with wide.capture() as captured:
        wide.print(made)
    return "\n".join(line.strip() for line in captured.get().splitlines() if line.strip())


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / 1024**3:.2f} GiB"


def trials(number: int) -> str:
    """A number of trials in words: `1 trial`, `2 trials`."""
    return f"{number} trial" + "s" * (number != 1)
