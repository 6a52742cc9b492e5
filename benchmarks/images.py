"""Image classifiers at 40 to 70 % zeros by four allocations: measures what is missing, writes it into docs/images.md.

    python benchmarks/images.py                        all classifiers
    python benchmarks/images.py vit --seconds 600      one, for ten minutes; the same command goes on where it ended
    python benchmarks/images.py --show                 the table of what is there

Wanda, 128 calibration images. β at ±1/8 … ±3/4 of its bounds, κ at 1/2 and 1 are compared on the validation images;
uniform and the best of each row are measured on the test images. Everything measured is kept in docs/images.json.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from image_classifiers import CLASSIFIERS, ROOT, study_of
from marked_page import write_between

from atp_tune.allocations import ALLOCATIONS
from atp_tune.cli.terminal import quiet
from atp_tune.config.prune import make_plan
from atp_tune.measures import accuracy, change, gain, perplexity
from atp_tune.run.observers import RoleScores
from atp_tune.run.session import Session, Setup
from atp_tune.scores import Scores
from atp_tune.utils.cache import write_out
from atp_tune.utils.system import cpu_name

PAGE, KEPT = ROOT / "docs" / "images.md", ROOT / "docs" / "images.json"
MARKS = ("<!-- benchmarks/images.py -->", "<!-- end -->")
PRUNER, TARGETS = "wanda", (0.5, 0.6, 0.4, 0.7)  # in the order in which they are measured
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of the bound of β
KAPPAS = (0.5, 1.0)
ROWS = ("uniform", "ATP, β < 0", "ATP, β > 0", "gradient")
Point = tuple[str, dict[str, float]]  # allocation and parameters
Row = dict[str, Any]


def main() -> None:
    """Measures what is missing, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLASSIFIERS)}; default: all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no measurement after so many seconds")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    with quiet():
        for name in [] if options.show else options.names or CLASSIFIERS:
            rows = read().get(name, {})
            for _ in Measuring(name, rows).all():
                kept = {**read(), name: rows}  # another process may have measured another classifier
                write_out(KEPT, (json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode())
                if time.monotonic() > end:
                    break
    write_page(read())
    print(table(read()))


def read() -> dict[str, dict[str, Row]]:
    """What was measured, by classifier and plan."""
    found: dict[str, dict[str, Row]] = json.loads(KEPT.read_text("utf-8")) if KEPT.is_file() else {}
    return found


class Measuring:
    """Measures the plans of one classifier that are not among the kept ones."""

    def __init__(self, name: str, rows: dict[str, Row]) -> None:
        """`rows`: what is known, to which measurements are added."""
        self._rows, file = rows, study_of(name)
        self._context = Session.open(Setup.of_study(file.study, file.folder, False))
        self._known: dict[tuple[str, str], Scores] = {}
        self._rows["about"] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}

    def all(self) -> Iterator[None]:
        """Yields after each measurement."""
        yield from self._measure("dense", 0.0, None, "test")
        for target in TARGETS:
            for row in ROWS:
                keys = []
                for point in self._points(row, target):
                    keys.append(key_of(target, point))
                    yield from self._measure(row, target, point, "validation")
                best = min(keys, key=lambda key: self._rows[f"{key} validation"]["nll"])
                yield from self._measure(row, target, self._rows[f"{best} validation"]["point"], "test")

    def _points(self, row: str, target: float) -> list[Point]:
        if row == "uniform":
            return [("uniform", {})]
        if row == "gradient":
            return [("gradient", {"kappa": kappa}) for kappa in KAPPAS]
        low, high = ALLOCATIONS["atp"].bounds(self._context.budget(target))["beta"]
        return [("atp", {"beta": share * (low if "<" in row else high)}) for share in SHARES]

    def _measure(self, row: str, target: float, point: Point | None, role: str) -> Iterator[None]:
        """Adds one measurement, unless it is there; None: of the dense model."""
        key = f"{key_of(target, point)} {role}"
        if key in self._rows:
            return
        began = time.monotonic()
        own = self._scores(target, point, role)
        found: Row = {
            "row": row, "target": target, "point": point, "nll": math.log(perplexity(own["nlls"]).value),
            "perplexity": perplexity(own["nlls"]).model_dump(), "accuracy": accuracy(own["ranks"]).model_dump(),
        }  # fmt: skip
        if point is not None and point[0] != "uniform":
            uniform = self._scores(target, ("uniform", {}), role)
            found["change"] = change(uniform["nlls"], own["nlls"]).model_dump()
            found["gain"] = gain(uniform["ranks"], own["ranks"]).model_dump()
        self._rows[key] = {**found, "seconds": round(time.monotonic() - began, 1)}
        said = f"{key}: perplexity {perplexity(own['nlls'])}, accuracy {accuracy(own['ranks'])}"
        print(f"{said}, {self._rows[key]['seconds']} s", flush=True)
        yield

    def _scores(self, target: float, point: Point | None, role: str) -> Scores:
        if point is None:
            own: Scores = self._context.measure(None, [RoleScores(role)])[0]
            return own
        key = (key_of(target, point), role)
        if key not in self._known:
            plan = make_plan(PRUNER, point[0], self._context.budget(target), dict(point[1]))
            [self._known[key]] = self._context.measure(plan, [RoleScores(role)])
        return self._known[key]


def key_of(target: float, point: Point | None) -> str:
    """The name of a plan among the kept ones."""
    return "dense" if point is None else f"{target:g} {shown(point)}"


def shown(point: Point) -> str:
    """A plan in the table."""
    letters = {"beta": "β", "kappa": "κ"}
    return ", ".join([point[0], *(f"{letters[key]} = {value:.4g}" for key, value in point[1].items())])


def table(kept: dict[str, dict[str, Row]]) -> str:
    """The rows on the test images, by classifier and share of zeros."""
    lines = []
    for name, rows in kept.items():
        found = [row for key, row in rows.items() if key.endswith(" test")]
        if not found:
            continue
        about, asked = rows["about"], CLASSIFIERS[name]
        lines += [
            f"**{asked.title}.** {asked.validation:,} validation and {asked.test:,} test images; {about['cpu']}, "
            f"{about['threads']} thread{'s' * (about['threads'] != 1)}, torch {about['torch'].partition('+')[0]}.",
            "",
            "| zeros | plan | perplexity over classes | against uniform | accuracy | against uniform |",
            "|---|---|---|---|---|---|",
            *(_line(row) for row in sorted(found, key=lambda row: (row["target"], ["dense", *ROWS].index(row["row"])))),
            "",
        ]
    return "\n".join(lines).strip()


def _line(row: Row) -> str:
    own, hits = row["perplexity"], row["accuracy"]
    relative, points = row.get("change"), row.get("gain")
    cells = [
        f"{row['target']:.0%}",
        "dense" if row["point"] is None else shown(row["point"]).replace("atp", "ATP"),
        f"{own['value']:.2f} ± {own['stderr']:.2f}",
        "" if relative is None else f"{relative['value']:+.1%} ± {relative['stderr']:.1%}",
        f"{hits['value']:.1%} ± {hits['stderr']:.1%}",
        "" if points is None else f"{100 * points['value']:+.1f} ± {100 * points['stderr']:.1f} points",
    ]
    return f"| {' | '.join(cells)} |"


def write_page(kept: dict[str, dict[str, Row]]) -> None:
    """Puts the table between its marks."""
    write_between(PAGE, MARKS, table(kept))


if __name__ == "__main__":
    main()
