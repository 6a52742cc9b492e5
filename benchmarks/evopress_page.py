"""The tables of docs/evopress.md, from the records that benchmarks/evopress.py wrote."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atp_tune.metrics.draws import over_draws
from atp_tune.metrics.perplexity import change, perplexity

PAGE = Path(__file__).parents[1] / "docs" / "evopress.md"
MARKS = ("<!-- measured: python benchmarks/evopress.py -->", "<!-- end -->")
UNIFORM, PRICES = "uniform", "prices, κ = 1"
POINTS = (
    "point",
    "zeros",
    "validation",
    "test",
    "test, against uniform",
    "validation, against prices κ = 1",
    "test, against prices κ = 1",
    "the same over draws",
)
SEARCHES = ("search", "× prices", "s", "generations", "tokens of candidates", "KL", "NLL")


def write(folder: Path) -> None:
    """Writes the tables of all records between the marks of the page; nothing without records."""
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    if records:
        inside = re.compile(f"(?<={re.escape(MARKS[0])}).*(?={re.escape(MARKS[1])})", re.DOTALL)
        text = "\n\n".join(section(name, record) for name, record in records.items())
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(inside.sub(lambda _: f"\n\n{text}\n\n", page), encoding="utf-8")


def section(name: str, record: dict[str, Any]) -> str:
    """The tables of one record."""
    facts, took = record["facts"], record.get("prices")
    parts = [f"### {name}, {facts['target']:.0%}"]
    if took:
        threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
        parts.append(
            f"{facts['machine']}, {threads}, {facts['dtype']}, torch {facts['torch']}. Prices took "
            f"{took['seconds']:.0f} s of the processor, in which {took['wall']:.0f} s passed."
        )
    for pruner, points in record["points"].items():
        if UNIFORM in points:
            rows = [point_row(title, point, points) for title, point in points.items()]
            parts += [f"{pruner}:", table(POINTS, rows)]
    if record["runs"]:
        rows = [row for title, run in record["runs"].items() for row in search_rows(title, run)]
        own = [PRICES, "1", f"{took['seconds']:.0f}", "", "", *(f"{took[kind]:.3f}" for kind in ("kl", "nll"))]
        parts += [*map(settings, record["runs"].items()), table(SEARCHES, [own, *rows])]
    return "\n\n".join(parts)


def settings(titled: tuple[str, dict[str, Any]]) -> str:
    """What a search was run with."""
    title, run = titled
    own = run["settings"]
    kept, windows = zip(*own["stages"], strict=True)
    return (
        f"{title}: {own['offspring']} offspring, survivors {', '.join(map(str, kept))} on "
        f"{', '.join(map(str, windows))} windows, a level {own['share']:.2%} of a block's weights."
    )


def point_row(name: str, point: dict[str, Any], points: dict[str, Any]) -> list[str]:
    """A point, and its changes from uniform and from prices."""
    nlls = point["nlls"]
    first = {role: draws[0] for role, draws in nlls.items()}
    cells = [name, f"{point['realised']:.2%}", *(str(perplexity(first[role])) for role in ("validation", "test"))]
    cells.append("" if name == UNIFORM else str(change(points[UNIFORM]["nlls"]["test"][0], first["test"])))
    if name == PRICES or PRICES not in points:
        return [*cells, "", "", ""]
    theirs = points[PRICES]["nlls"]
    cells += [str(change(theirs[role][0], first[role])) for role in ("validation", "test")]
    spread = over_draws(nlls["test"], theirs["test"])
    return [*cells, spread.changed if spread else ""]


def search_rows(title: str, run: dict[str, Any]) -> list[list[str]]:
    """The trajectory of a search."""
    return [
        [title, f"{mark['multiple']:g}", f"{mark['seconds']:.0f}", str(mark["generation"]), f"{mark['tokens']:,}",
         f"{mark['kl']:.3f}", f"{mark['nll']:.3f}"]
        for mark in run["marks"]
    ]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
