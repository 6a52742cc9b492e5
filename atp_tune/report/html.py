"""The report as one HTML file with figures, tables and commands, which needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

import atp_tune
from atp_tune import figures
from atp_tune.figures import draw_history, perplexities, sparsities
from atp_tune.measures import TEXTS
from atp_tune.metrics import NAMES, ImageAnswer
from atp_tune.report import contents as tables
from atp_tune.report.contents import Contents
from atp_tune.results.formatting import continuations_note
from atp_tune.results.results import DENSE, Model
from atp_tune.results.summary import Summary
from atp_tune.results.tables import front, kinds, overview, trials

TITLE = 32  # px of a figure's title, which the page shows instead
HERE = Path(__file__).parent
# Facts that must be equal for perplexities to compare.
SAME = ("model.content", "texts.validation.content", "images.validation.content")


def make(studies: Sequence[Contents]) -> bytes:
    """The page of the studies; a comparison comes first if there are several."""
    places = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    page = places.get_template("page.html.jinja").render(
        studies=[_section(contents, index) for index, contents in enumerate(studies)],
        made=max(contents.made for contents in studies),
        comparison=tables.comparison(studies) if len(studies) > 1 else None,
        overlays=_drawn(overlays(studies)),
        symbol=tables.symbol,
        zero_shot_note=tables.zero_shot_note,
        continuations_note=continuations_note,
        version=atp_tune.__version__,
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),
    )
    return (page.strip() + "\n").encode()


def overlays(studies: Sequence[Contents]) -> dict[str, go.Figure]:
    """Figures that compare several studies; perplexities only if all have one model and text."""
    if len(studies) < 2:
        return {}
    summaries = [contents.summary for contents in studies]
    comparable = len({tuple(contents.facts.get(key) for key in SAME) for contents in studies}) == 1
    found = {
        "perplexities": perplexities(summaries) if comparable else None,
        "sparsities": sparsities(summaries),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def _section(contents: Contents, index: int) -> dict[str, Any]:
    summary = contents.summary
    found, results = figures.draw(summary), summary.results
    went = draw_history(summary) if "perplexity" in found else None
    models: dict[str, Model | None] = {"dense": DENSE, "uniform": summary.uniform_trial, "best": summary.best_trial}
    made = _drawn({**found, **({"history": went} if went else {})})
    return {
        "id": f"study-{index + 1}",
        "contents": contents,
        "summary": summary,
        "figures": made,
        "headline": overview(summary),
        "scores": {
            name: model and {text: results.shown(model, text, results.main) for text in TEXTS}
            for name, model in models.items()
        },
        "kinds": kinds(summary),
        "front": front(summary),
        "zero_shot": tables.zero_shot(summary.zero_shot) if summary.zero_shot else None,
        "speed": tables.speed(summary.speed) if summary.speed else None,
        "continuations": tables.continuations(summary.continuations) if summary.continuations else None,
        "answers": _answers(summary),
        "importance": sorted(contents.importance.items(), key=lambda pair: -pair[1]),
        "trials": trials(summary),
        "fingerprint": tables.fingerprint(contents),
        "commands": tables.commands(summary),
        "file_name": f"{tables.plain_name(summary.name)}.toml",
    }


def _answers(summary: Summary) -> list[tuple[str, str, list[tuple[str, ImageAnswer, bool]]]]:
    """PNG, class and the answer of each model, and whether it is right, for the test images of an image classifier."""
    found = summary.answers
    if found is None:
        return []
    return [
        (picture, label, [(name, (own := found.of(name)[index]), own.index == right) for name in NAMES])
        for index, (picture, label, right) in enumerate(zip(found.pictures, found.labels, found.indices, strict=True))
    ]


def _drawn(made: Mapping[str, go.Figure]) -> dict[str, tuple[str, Markup]]:
    """Titles and data of figures; the page sets the titles itself."""
    return {name: (figure.layout.title.text, _data(figure)) for name, figure in made.items()}


def _data(figure: go.Figure) -> Markup:
    """A figure's JSON without `<`, so that no name of a study ends the script element around it."""
    plain = figure.to_dict()
    del plain["layout"]["title"]
    plain["layout"]["margin"]["t"] -= TITLE
    return Markup(to_json_plotly(plain).replace("<", "\\u003c"))


def _own(name: str) -> Markup:
    return Markup((HERE / name).read_text(encoding="utf-8"))
