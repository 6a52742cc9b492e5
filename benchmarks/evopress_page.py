"""The tables of docs/evopress.md, from the records that benchmarks/evopress.py wrote."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evopress_search import Run, read_run
from marked_page import write_between

from atp_tune.cache import write_atomically
from atp_tune.measures import change, perplexity

PAGE = Path(__file__).parents[1] / "docs" / "evopress.md"
MARKS = ("<!-- measured: python benchmarks/evopress.py -->", "<!-- end -->")
UNIFORM, PRICES, ROWS = "uniform", "prices, κ = 1", "row-prices, κ = 1"
POINTS = (
    "point",
    "zeros",
    "validation",
    "test",
    "test, against uniform",
    "validation, against prices κ = 1",
    "test, against prices κ = 1",
)
SEARCHES = ("search", "× prices", "s", "generations", "tokens of candidates", "KL", "NLL")


class Record:
    """What was found of one model, in a folder: a JSON file for each part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Any] = {
            file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))
        }

    def save(self, part: str) -> None:
        """Writes a part; another process may write others."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{part}.json", json.dumps(self.parts[part], default=asdict).encode())

    def keep(self, part: str, found: Any) -> None:
        """Sets and writes a part."""
        self.parts[part] = found
        self.save(part)

    def named(self, kind: str) -> dict[str, Any]:
        """The parts of one kind by their own names."""
        return {name.removeprefix(kind): found for name, found in self.parts.items() if name.startswith(kind)}


def write(folder: Path) -> None:
    """Writes the tables of all records between the marks of the page; nothing without records."""
    records = {each.name: Record(each) for each in sorted(folder.glob("*/"))}
    parts = [section(name, record) for name, record in records.items() if "prices" in record.parts]
    if parts:
        write_between(PAGE, MARKS, "\n\n".join(parts))


def section(name: str, record: Record) -> str:
    """The tables of one record."""
    facts, took = record.parts["facts"], record.parts["prices"]
    threads = "one thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    parts = [
        f"### {name}, {facts['target']:.0%}",
        f"{facts['machine']}, {threads}, {facts['dtype']}, torch {facts['torch']}. Prices took "
        f"{took['seconds']:.0f} s of the processor, in which {took['wall']:.0f} s passed"
        + (f", row-prices {by_rows['seconds']:.0f} s." if (by_rows := record.parts.get("row-prices")) else "."),
    ]
    for pruner, begun in record.named("points ").items():
        points = {title: point for title, point in begun.items() if point["nlls"]["test"]}
        if UNIFORM in points:
            rows = [point_row(title, point, points) for title, point in points.items()]
            parts += [f"{pruner}:", table(POINTS, rows)]
    searches = {title: read_run(stored) for title, stored in record.named("search ").items()}
    looks = record.named("fitness ")
    own = next((look["prices"] for look in looks.values() if "prices" in look), None)
    rows = [[PRICES, "1", f"{took['seconds']:.0f}", "", "", f"{own['kl']:.3f}", f"{own['nll']:.3f}"]] if own else []
    for title, run in searches.items():
        rows += search_rows(title, run, took["seconds"], looks.get(title, {}))
    return "\n\n".join([*parts, *map(settings, searches.items()), *([table(SEARCHES, rows)] if rows else [])])


def settings(titled: tuple[str, Run]) -> str:
    """What a search was run with."""
    title, run = titled
    kept, windows = zip(*run.settings.stages, strict=True)
    last = run.moments[-1]
    return (
        f"{title}: {run.settings.offspring} offspring, survivors {', '.join(map(str, kept))} on "
        f"{', '.join(map(str, windows))} windows, a level {run.settings.share:.2%} of a block's weights; so far "
        f"{len(run.moments) - 1} generations and {last.tokens:,} tokens of candidates in {last.seconds:.0f} s."
    )


def point_row(name: str, point: dict[str, Any], points: dict[str, Any]) -> list[str]:
    """A point, and its changes from uniform and from prices."""
    first = {role: draws[0] for role, draws in point["nlls"].items()}
    cells = [name, f"{point['realised']:.2%}", *(str(perplexity(first[role])) for role in ("validation", "test"))]
    cells.append("" if name == UNIFORM else str(change(points[UNIFORM]["nlls"]["test"][0], first["test"])))
    if name == PRICES or PRICES not in points:
        return [*cells, "", ""]
    theirs = points[PRICES]["nlls"]
    return [*cells, *(str(change(theirs[role][0], first[role])) for role in ("validation", "test"))]


def search_rows(title: str, run: Run, seconds: float, look: dict[str, dict[str, float]]) -> list[list[str]]:
    """The trajectory of a search."""
    found = []
    for multiple, fitness in look.items():
        if multiple != "prices" and (number := run.at(float(multiple) * seconds)) is not None:
            moment = run.moments[number]
            cells = [title, multiple, f"{moment.seconds:.0f}", str(number), f"{moment.tokens:,}"]
            found.append([*cells, f"{fitness['kl']:.3f}", f"{fitness['nll']:.3f}"])
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
