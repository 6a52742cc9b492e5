"""The report in Markdown, and functions that escape text for Markdown."""

import re
from collections.abc import Sequence

from atp_tune.errors import printable
from atp_tune.report import contents as tables
from atp_tune.report.contents import Contents
from atp_tune.results.formatting import continuations_note
from atp_tune.results.tables import Table, front, kinds, overview, trials

_RATES = "Rates are medians over runs; the last column is the median (lowest to highest) of the runs' ratios."


def escaped(text: str) -> str:
    """Text in one line without markup, HTML, formulas or entities."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&~])", r"\\\1", printable(" ".join(text.split())))


def fenced(language: str, text: str) -> str:
    """Text as a fenced code block, which text with fences in it cannot end."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def make(studies: Sequence[Contents]) -> bytes:
    """The report: a comparison if there are several studies, then each study."""
    parts = ["# Comparison", table(tables.comparison(studies))] if len(studies) > 1 else []
    for contents in studies:
        parts += _study(contents)
    return ("\n\n".join(parts) + "\n").encode()


def _study(contents: Contents) -> list[str]:
    summary = contents.summary
    parts = [f"# {escaped(summary.name)}", escaped(contents.description), escaped(contents.verdict)]
    amount = summary.amount.told.format(contents.sparsity, summary.amount.best(summary)) if contents.sparsity else ""
    parts.append(f"{contents.state}; as of {contents.made:%Y-%m-%d %H:%M}. {amount}".strip())
    parts += [
        *map(escaped, contents.notes),
        table(overview(summary)),
        *([table(found)] if (found := kinds(summary)) else []),
        contents.errors + "".join(f" {by.note}" for by in summary.results.measures if by.note),
    ]
    if found := front(summary):
        parts += ["## Pareto front", table(found)]
    if summary.zero_shot:
        made = tables.zero_shot(summary.zero_shot)
        parts += ["## Zero-shot accuracy", table(made), escaped(tables.zero_shot_note(summary.zero_shot))]
    if summary.speed:
        parts += ["## Size and speed", table(tables.speed(summary.speed)), _RATES]
    if summary.continuations:
        made = tables.continuations(summary.continuations)
        parts += ["## Continuations", table(made), escaped(continuations_note(summary.continuations)) + "."]
    if contents.importance:
        parts += ["## Importance", table(tables.importance(contents))]
    parts += ["## Trials", table(trials(summary)), "## How to reproduce"]
    parts.append(fenced("sh", "\n".join(command for _, command in tables.commands(summary))))
    if contents.study_file is not None:
        parts.append(fenced("toml", contents.study_file))
    return [part for part in [*parts, table(tables.fingerprint(contents))] if part]


def table(made: Table, gap: str = "") -> str:
    """A Markdown table with numbers aligned to the right; `gap`: written before each cell but a row's first."""
    rules = [":--" if column in made.words else "--:" for column in range(len(made.head))]
    rows = [[f"**{cell}**" if cell and index == made.best else cell for cell in map(escaped, row)]
            for index, row in enumerate(made.rows)]  # fmt: skip
    head, *body = (f"| {f' | {gap}'.join(cells)} |" for cells in (map(escaped, made.head), *rows))
    return "\n".join((head, f"| {' | '.join(rules)} |", *body))
