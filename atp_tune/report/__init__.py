"""Reports of one or several studies: a page, Markdown, JSON, a picture or a LaTeX table.

They need only the storage, neither torch nor the model, and work while a study runs.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from atp_tune import figures
from atp_tune.errors import UserError
from atp_tune.figures.sheet import check_installed, png
from atp_tune.report import html, latex, machine, markdown
from atp_tune.report.contents import Contents, gather
from atp_tune.utils.cache import write_out
from atp_tune.utils.paths import check_writable

__all__ = ["ENDINGS", "Contents", "gather", "kind_of", "name_of", "write"]

ENDINGS = {"html": "html", "md": "md", "json": "json", "png": "png", "latex": "tex"}


def kind_of(given: str | None, out: Path | None) -> str:
    """The format: by its name, else by the ending of `out`, else html; UserError if it is unknown."""
    if given is None:
        ending = out.suffix.removeprefix(".").lower() if out else "html"
        if ending not in ENDINGS.values():
            raise UserError(f"--out {out}: its ending must be one of {', '.join(ENDINGS.values())}, or give --format")
        return next(kind for kind, known in ENDINGS.items() if known == ending)
    if given not in ENDINGS:
        raise UserError(f"--format {given}: must be one of {', '.join(ENDINGS)}")
    return given


def check(kind: str, out: Path) -> None:
    """UserError if the report cannot be drawn or written; called before the study is read."""
    check_writable(out, instead="choose another place with --out FILE")
    if kind == "png":
        check_installed()


def name_of(studies: Sequence[str], kind: str) -> str:
    """The default name of a report of these studies."""
    more = f"+{len(studies) - 2}-more" if len(studies) > 2 else ""
    return f"{'+'.join(studies[:2])}{more}.report.{ENDINGS[kind]}"


def write(studies: Sequence[Contents], kind: str, out: Path) -> None:
    """Writes the report atomically; UserError if it cannot be written."""
    write_out(out, _MAKERS[kind](studies))


def make_picture(studies: Sequence[Contents]) -> bytes:
    """A PNG of all figures that have data, study by study; titles name the study if there are several."""
    drawn = []
    for summary in (contents.summary for contents in studies):
        for figure in figures.draw(summary).values():
            named = f"{escape(summary.name)}: {figure.layout.title.text}" if len(studies) > 1 else None
            drawn.append(figure.update_layout(title_text=named) if named else figure)
    if not drawn:
        raise UserError(f"study {studies[0].summary.name}: no trial has been measured yet, so there is nothing to draw")
    return png(drawn)


_MAKERS: dict[str, Callable[[Sequence[Contents]], bytes]] = {
    "html": html.make,
    "md": markdown.make,
    "json": machine.make,
    "png": make_picture,
    "latex": latex.make,
}
