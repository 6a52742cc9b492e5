"""The report in Markdown, as a LaTeX table and as JSON, and functions that escape text for Markdown."""

import json
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs
from pydantic import BaseModel

import atp_tune
from atp_tune.config.studyfile import settings
from atp_tune.errors import printable
from atp_tune.measures import TEXTS
from atp_tune.metrics import NAMES, ImageAnswer
from atp_tune.report import contents as tables
from atp_tune.report import figures
from atp_tune.report.contents import Contents
from atp_tune.report.figures import draw_history, perplexities, sparsities
from atp_tune.results.formatting import continuations_note, errors_of
from atp_tune.results.results import DENSE, NOTHING, Model
from atp_tune.results.status import status_of
from atp_tune.results.summary import Summary, Table, front, kinds, overview, trials


def escaped(text: str) -> str:
    """Text in one line without markup, HTML, formulas or entities."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&~])", r"\\\1", printable(" ".join(text.split())))


def fenced(language: str, text: str) -> str:
    """Text as a fenced code block, which text with fences in it cannot end."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def markdown(studies: Sequence[Contents]) -> bytes:
    """The report: a comparison if there are several studies, then each study."""
    sections = [_tables(contents) for contents in studies]
    return (rendered("report.md.jinja", studies=sections, comparison=_comparison(studies)) + "\n").encode()


def table(made: Table, gap: str = "") -> str:
    """A Markdown table with numbers aligned to the right; `gap`: written before each cell but a row's first."""
    rules = [":--" if column in made.words else "--:" for column in range(len(made.head))]
    rows = [[f"**{cell}**" if cell and index == made.best else cell for cell in map(escaped, row)]
            for index, row in enumerate(made.rows)]  # fmt: skip
    head, *body = (f"| {f' | {gap}'.join(cells)} |" for cells in (map(escaped, made.head), *rows))
    return "\n".join((head, f"| {' | '.join(rules)} |", *body))


# --- The documents are templates beside this file; values are escaped as their filters say, in HTML all of them.

HERE = Path(__file__).parent
PAGES = Environment(
    loader=FileSystemLoader(HERE), autoescape=lambda name: name == "page.html.jinja", trim_blocks=True,
    lstrip_blocks=True, undefined=StrictUndefined,
)  # fmt: skip
PAGES.filters |= {"escaped": escaped, "printable": printable}
PAGES.globals |= {
    "table": table, "fenced": fenced, "symbol": tables.symbol, "zero_shot_note": tables.zero_shot_note,
    "continuations_note": continuations_note, "version": atp_tune.__version__,
}  # fmt: skip


def rendered(name: str, **given: Any) -> str:
    """The text of a template, with one empty line between its paragraphs."""
    return re.sub(r" *\n{2,}", "\n\n", PAGES.get_template(name).render(given)).strip()


# --- A LaTeX table for a paper: dense, uniform and the best of each allocation.

_SPECIAL = {
    **{char: f"\\{char}" for char in "#$%&_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "–": "--", "’": "'", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
    "β": r"$\beta$", "γ": r"$\gamma$", "κ": r"$\kappa$",
    "δ": r"$\delta$", "φ": r"$\varphi$", "ν": r"$\nu$", "λ": r"$\lambda$", "ε": r"$\varepsilon$",
}  # fmt: skip


def latex(studies: Sequence[Contents]) -> bytes:
    r"""One table of all studies, with the columns of each; it needs \usepackage{booktabs}."""
    tables = [overview(contents.summary, "trial") for contents in studies]
    head = [*dict.fromkeys(name for table in tables for name in table.head)]
    parts = []
    for contents, table in zip(studies, tables, strict=True):
        rows = [dict(zip(table.head, cells, strict=True)) for cells in table.rows]
        lines = [" & ".join(_escaped(row.get(name, NOTHING)) for name in head) + r" \\" for row in rows]
        if len(studies) > 1:
            amount = contents.summary.amount.told.lower().partition("{")[0]
            title = contents.summary.name + (f", {amount}{contents.sparsity}" if contents.sparsity else "")
            lines.insert(0, f"\\multicolumn{{{len(head)}}}{{l}}{{{_escaped(title)}}} \\\\")
        parts.append("\n".join(lines))
    names = ", ".join(_escaped(contents.summary.name) for contents in studies)
    units = " or ".join(dict.fromkeys(contents.summary.results.unit for contents in studies))
    errors = errors_of(studies[0].summary) if len(studies) == 1 else f"standard error over {units}"
    measures = dict.fromkeys(by.title for contents in studies for by in contents.summary.results.measures)
    what, body = ", ".join(measures), "\n\\midrule\n".join(parts)
    return f"""\
% \\usepackage{{booktabs}}
\\begin{{table}}
\\centering
\\caption{{{what[0].upper()}{what[1:]} ($\\pm$: {_escaped(errors)}) of {names}.}}
\\begin{{tabular}}{{l{"r" * (len(head) - 1)}}}
\\toprule
{" & ".join(map(_escaped, head))} \\\\
\\midrule
{body}
\\bottomrule
\\end{{tabular}}
\\end{{table}}
""".encode()


def _escaped(text: str) -> str:
    """Text with LaTeX's special characters escaped; the sign of a number is a minus, no hyphen."""
    signed = re.sub(r"(?<!\S)-(?=\d)", "−", " ".join(text.split()))
    return "".join(_SPECIAL.get(char, char) for char in signed)


# --- The report for programs.

FORMAT = "atp_tune.report/3"
KEPT = ("errors", "device", "dtype")  # attributes of trials


def machine(studies: Sequence[Contents]) -> bytes:
    """The report for programs: a published JSON format (`atp_tune.report/3`); keys are added, never renamed or removed.

        format, made            `atp_tune.report/3`; local time, ISO 8601
        studies[]               the document of `status --json` of each study, without its clock, and:
          description           of the study
          state                 running, failed: numbers of trials
          realised              share of zeros counted in the best, null if unknown
          zero_shot             what `evaluate` measured of the best trial, as in its configuration; or null
          speed                 what `speedup`, or the end of a study, measured of it, likewise; or null
          recovered             training of the best's kept weights, as in its configuration; or null
          continuations         prompts, and what dense, uniform, best and `others`, the best of each other allocation,
                                make of each; or null
          importance            parameter → share of 1; empty with too few trials
          trials[]              also levels (of each block, as `plan.py` stores them, without those of rows), errors (by
                                block), times (phase → s), device, dtype
          time, devices         of all trials: seconds, names
          study_file            name and settings, as the study was made; or null
          fingerprint, versions facts that the values depend on, and versions of libraries

    Numbers that are not finite are null.
    """
    made = max((contents.made for contents in studies), default=None)
    document = {
        "format": FORMAT,
        "made": made.isoformat(timespec="seconds") if made else None,
        "studies": [_document(contents) for contents in studies],
    }
    return (json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _document(contents: Contents) -> dict[str, Any]:
    summary = contents.summary
    status = status_of(summary, contents.made).without_clock().model_dump(exclude={"format"})
    for trial, row in zip(summary.trials, status["trials"], strict=True):
        attrs = trial.user_attrs
        stored = json.dumps(attrs.get("plan", {}).get("levels"))
        row["levels"] = json.loads(stored, object_hook=lambda level: level.pop("rows", level) and level)
        row["times"] = attrs.get("seconds")
        row.update({key: attrs.get(key) for key in KEPT})
    return {
        **status,
        "description": contents.description,
        "state": {"running": contents.running, "failed": contents.failed},
        "realised": contents.realised,
        "zero_shot": _dumped(summary.zero_shot),
        "speed": _dumped(summary.speed),
        "recovered": _dumped(summary.recovered),
        "continuations": _dumped(summary.continuations),
        "importance": contents.importance,
        "time": contents.seconds,
        "devices": contents.devices,
        "study_file": settings(summary.made_from) if summary.made_from else None,
        "fingerprint": contents.facts,
        "versions": contents.versions,
    }


def _dumped(found: BaseModel | None) -> dict[str, Any] | None:
    return found.model_dump() if found else None


def finite(value: Any) -> Any:
    """The value with None for infinite numbers and NaN, which JSON cannot hold."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


# --- The report as one HTML file with figures, tables and commands, which needs no network.

TITLE = 32  # px of a figure's title, which the page shows instead
# Facts that must be equal for perplexities to compare.
SAME = ("model.content", "texts.validation.content", "images.validation.content")


def html(studies: Sequence[Contents]) -> bytes:
    """The page of the studies; a comparison comes first if there are several."""
    page = PAGES.get_template("page.html.jinja").render(
        studies=[_section(contents, index) for index, contents in enumerate(studies)],
        made=max(contents.made for contents in studies),
        comparison=_comparison(studies),
        overlays=_drawn(overlays(studies)),
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(get_plotlyjs()),
    )
    return (page.strip() + "\n").encode()


def _comparison(studies: Sequence[Contents]) -> Table | None:
    return tables.comparison(studies) if len(studies) > 1 else None


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


def _tables(contents: Contents) -> dict[str, Any]:
    """What the page and the Markdown show of a study: its contents, and their tables."""
    summary, makers = contents.summary, (tables.zero_shot, tables.speed, tables.continuations)
    measured = ((make, getattr(summary, make.__name__)) for make in makers)
    return {
        "contents": contents,
        "summary": summary,
        "headline": overview(summary),
        "kinds": kinds(summary),
        "front": front(summary),
        **{make.__name__: found and make(found) for make, found in measured},
        "importance": tables.importance(contents),
        "trials": trials(summary),
        "fingerprint": tables.fingerprint(contents),
        "commands": tables.commands(summary),
    }


def _section(contents: Contents, index: int) -> dict[str, Any]:
    summary = contents.summary
    found, results = figures.draw(summary), summary.results
    went = draw_history(summary) if "perplexity" in found else None
    models: dict[str, Model | None] = {"dense": DENSE, "uniform": summary.uniform_trial, "best": summary.best_trial}
    return {
        **_tables(contents),
        "id": f"study-{index + 1}",
        "figures": _drawn({**found, **({"history": went} if went else {})}),
        "scores": {
            name: model and {text: results.shown(model, text, results.main) for text in TEXTS}
            for name, model in models.items()
        },
        "answers": _answers(summary),
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
