"""The report as one picture: the figures of each study."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from atp_tune import figures
from atp_tune.errors import UserError
from atp_tune.figures.sheet import png
from atp_tune.report.contents import Contents


def make(studies: Sequence[Contents]) -> bytes:
    """The PNG of all figures for which there are data, study by study."""
    drawn = [figure for contents in studies for figure in _figures(contents, named=len(studies) > 1)]
    if not drawn:
        raise UserError(f"study {studies[0].summary.name}: no trial has been measured yet, so there is nothing to draw")
    return png(drawn)


def _figures(contents: Contents, named: bool) -> list[go.Figure]:
    """The figures of a study, with its name in their titles where there are others."""
    drawn = list(figures.draw(contents.summary).values())
    for figure in drawn if named else ():
        figure.update_layout(title_text=f"{escape(contents.summary.name)}: {figure.layout.title.text}")
    return drawn
