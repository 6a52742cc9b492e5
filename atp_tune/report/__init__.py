"""Reports of one or several studies: a page, Markdown, JSON, a picture or a LaTeX table.

They need only the storage, neither torch nor the model, and work while a study runs.
"""

import asyncio
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go

from atp_tune.errors import UserError
from atp_tune.report import figures, formats
from atp_tune.report.formats import Contents
from atp_tune.utils.cache import write_out
from atp_tune.utils.system import check_writable, install, require

# --- Several figures in one picture, rendered by Chrome or Chromium through kaleido.

WIDTH, HEIGHT = 640, 440  # px of a figure
COLUMNS = 2
SCALE = 2  # px of a PNG per px of the layout
PAGE, TEXT = "#ffffff", "#24292f"
BROWSER = "a Chrome or Chromium, found in PATH or named by BROWSER_PATH"


def check_installed() -> None:
    """UserError if kaleido is missing."""
    require("png", "a picture", otherwise=" and a Chrome or Chromium")


def picture(figures: Sequence[go.Figure]) -> bytes:
    """All figures on white, two in a row, as PNG; UserError if kaleido or a browser is missing."""
    check_installed()
    try:
        return asyncio.run(_draw(figures))
    except Exception as error:  # kaleido and its browser driver have no common class of errors
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        needs = f"it needs: {install('png')} and {BROWSER}"
        raise UserError(f"a picture could not be drawn ({reason.rstrip('.')}); {needs}") from None


async def _draw(figures: Sequence[go.Figure]) -> bytes:
    import kaleido

    page, (width, height) = "", (min(len(figures), COLUMNS) * WIDTH, -(-len(figures) // COLUMNS) * HEIGHT)
    async with kaleido.Kaleido() as browser:
        # SVGs of one size in one, two in a row.
        for index, figure in enumerate(figures):
            shown = go.Figure(figure).update_layout({"font_color": TEXT, "width": WIDTH, "height": HEIGHT})
            cell: bytes = await browser.calc_fig(
                shown.to_dict(), opts={"format": "svg", "width": WIDTH, "height": HEIGHT}
            )
            x, y = index % COLUMNS * WIDTH, index // COLUMNS * HEIGHT
            page += f'<g transform="translate({x},{y})">{cell.decode()}</g>'
        box = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        ground = f'<rect width="100%" height="100%" fill="{PAGE}"/>'
        picture = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{ground}{page}</svg>'.encode()
        # A figure that holds only this, which the browser renders as PNG.
        source = f"data:image/svg+xml;base64,{b64encode(picture).decode()}"
        position = {"xref": "paper", "yref": "paper", "x": 0, "y": 1, "sizex": 1, "sizey": 1, "sizing": "stretch"}
        layout = {
            "template": "none", "margin": dict.fromkeys("lrtb", 0), "images": [{"source": source, **position}],
            "xaxis": {"visible": False}, "yaxis": {"visible": False}, "width": width, "height": height,
        }  # fmt: skip
        options = {"format": "png", "width": width, "height": height, "scale": SCALE}
        return bytes(await browser.calc_fig(go.Figure(layout=layout).to_dict(), opts=options))


def check(kind: str, out: Path) -> None:
    """UserError if the report cannot be drawn or written; called before the study is read."""
    check_writable(out, instead="choose another place with --out FILE")
    if kind == "png":
        check_installed()


def report_name(studies: Sequence[str], kind: str) -> str:
    """The default name of a report of these studies."""
    more = f"+{len(studies) - 2}-more" if len(studies) > 2 else ""
    return f"{'+'.join(studies[:2])}{more}.report{FORMATS[kind][0]}"


def write(studies: Sequence[Contents], kind: str, out: Path) -> None:
    """Writes the report atomically; UserError if it cannot be written."""
    write_out(out, FORMATS[kind][1](studies))


def make_picture(studies: Sequence[Contents]) -> bytes:
    """A PNG of all figures that have data, study by study; titles name the study if there are several."""
    drawn = []
    for contents in studies:
        for figure in figures.draw(contents.summary).values():
            if len(studies) > 1:
                figure.update_layout(title_text=f"{escape(contents.summary.name)}: {figure.layout.title.text}")
            drawn.append(figure)
    if not drawn:
        raise UserError(f"study {studies[0].summary.name}: no trial has been measured yet, so there is nothing to draw")
    return picture(drawn)


FORMATS = {  # ending and maker
    "html": (".html", formats.html),
    "md": (".md", formats.markdown),
    "json": (".json", formats.machine),
    "png": (".png", make_picture),
    "latex": (".tex", formats.latex),
}
