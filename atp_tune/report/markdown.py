"""The report as Markdown tables, and how text of others stands in Markdown."""

import re
from collections.abc import Sequence

from atp_tune.errors import printable
from atp_tune.report import tables
from atp_tune.report.contents import Contents
from atp_tune.report.tables import ReportTable

_RATES = "Rates are medians; the last column is the median (lowest to highest) of the ratios, run by run."
_KL = " KL: from the dense model's next-token distribution to the pruned one's, nats per token."


def escaped(text: str) -> str:
    """Text that stands for itself, in one line: no markup, no HTML, no formula, no entity."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&~])", r"\\\1", printable(" ".join(text.split())))


def fenced(language: str, text: str) -> str:
    """Lines that are shown as they are, whatever they hold."""
    fence = "`" * (3 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def make(studies: Sequence[Contents]) -> bytes:
    """One document: the comparison where there are several studies, then each."""
    parts = ["# Comparison", table(tables.comparison(studies))] if len(studies) > 1 else []
    for contents in studies:
        parts += _study(contents)
    return ("\n\n".join(parts) + "\n").encode()


def _study(contents: Contents) -> list[str]:
    summary = contents.summary
    parts = [f"# {escaped(summary.name)}", escaped(contents.description), escaped(contents.verdict)]
    parts.append(f"{contents.state}; as of {contents.made:%Y-%m-%d %H:%M}. {_sparsity(contents)}".strip())
    parts += [escaped(contents.beginning), escaped(contents.mixture)]
    parts += [table(tables.headline(summary)), contents.errors + (_KL if "kl" in summary.objectives else "")]
    if summary.front:
        parts += ["## Pareto front", table(tables.front(summary))]
    if len(summary.ranks) > 1:
        parts += ["## Allocations", table(tables.ranks(summary))]
    if summary.zero_shot:
        made = tables.zero_shot(summary.zero_shot)
        parts += ["## Zero-shot accuracy", table(made), escaped(tables.zero_shot_note(summary.zero_shot))]
    if summary.speed:
        parts += ["## Size and speed", table(tables.speed(summary.speed)), _RATES]
    if contents.importance:
        parts += ["## Importance", table(tables.importance(contents))]
    parts += ["## Trials", table(tables.trials(summary)), "## How to reproduce"]
    parts.append(fenced("sh", "\n".join(command for _, command in tables.commands(summary))))
    if contents.study_file is not None:
        parts.append(fenced("toml", contents.study_file))
    return [part for part in [*parts, table(tables.fingerprint(contents))] if part]


def _sparsity(contents: Contents) -> str:
    if contents.target is None:
        return ""
    counted = f", {contents.realised:.4f} counted" if contents.realised is not None else ""
    return f"Sparsity {contents.target:g}{counted}."


def table(made: ReportTable) -> str:
    """A table with its numbers to the right."""
    rules = [":--" if column in made.words else "--:" for column in range(len(made.head))]
    rows = [[f"**{cell}**" if cell and index == made.best else cell for cell in map(escaped, row)]
            for index, row in enumerate(made.rows)]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (map(escaped, made.head), rules, *rows))
