"""The report as one picture: the figures of one study."""

from collections.abc import Sequence

from atp_tune import figures
from atp_tune.errors import UserError
from atp_tune.figures.sheet import png
from atp_tune.report.contents import Contents


def make(studies: Sequence[Contents]) -> bytes:
    """The PNG of all figures for which there are data, study by study."""
    drawn = [figure for contents in studies for figure in figures.draw(contents.summary).values()]
    if not drawn:
        raise UserError(f"study {studies[0].summary.name}: no trial has been measured yet, so there is nothing to draw")
    return png(drawn)
