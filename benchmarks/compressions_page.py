"""What benchmarks/compressions.py has measured: its files, and the tables and the figure that it writes of them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import log1p
from pathlib import Path
from statistics import median
from typing import Any

import plotly.graph_objects as go
from marked_page import write_between
from pydantic import TypeAdapter

from atp_tune.cli.terminal import markdown
from atp_tune.figures.sheet import svg
from atp_tune.figures.style import BLUE, GOLD, GREEN, INK, ORANGE, PINK, PURPLE, faint, log_axis, new_figure, rounded
from atp_tune.measures import Estimate, accuracy, change, perplexity
from atp_tune.metrics import speed
from atp_tune.metrics.speed import Rates

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PICTURE = DOCS / "compressions.md", DOCS / "compressions.svg"
POINTS, RATES = (DOCS / "compressions" / f"{name}.jsonl" for name in ("points", "rates"))
MARKS = ("<!-- measured: python benchmarks/compressions.py -->", "<!-- end -->")
TITLES = {
    "smol-bits": "SmolLM2-135M",
    "fashion": "DINOv2-small, Fashion-MNIST",
    "vit": "ViT of width 64, trained on Fashion-MNIST",
}
DENSE = "dense"
SPEED = TypeAdapter[speed.Measured | speed.MeasuredImages](speed.Measured | speed.MeasuredImages)
Key = tuple[str, ...]  # study, series, name, values
HEAD = ("kept as", "MB", "bits", "validation", "test", "nats, validation", "nats, test")
FORMATS = {"bf16": "", "int8": ", int8", "bits": ""}
STYLES = {  # colour and symbol
    DENSE: (INK, "star"),
    "bits, GPTQ": (BLUE, "circle"),
    "bits, GPTQ, prices": (PURPLE, "circle"),
    "bits, GPTQ, act-order": (BLUE, "circle-dot"),
    "bits, RTN": (BLUE, "circle-open"),
    "zeros and bits": (PINK, "diamond-open"),
    "zeros and bits, prices": (PINK, "diamond"),
    "zeros": (GREEN, "square-open"),
    "zeros, prices": (GREEN, "square"),
    "zeros, SparseGPT": (PURPLE, "triangle-up"),
    "2:4": (GOLD, "x"),
    "channels": (ORANGE, "triangle-down"),
}


@dataclass(frozen=True)
class Measured:
    """One point as it is kept: `bytes` of the whole model, `bits` of a weight of the blocks with all that belongs to
    it, share of zeros, scores by text, seconds to compress; `facts`: SHA-256 of what determines them.
    """

    study: str
    series: str
    name: str
    values: str
    facts: str
    bytes: int
    bits: float
    zeros: float
    nlls: dict[str, list[float]]
    ranks: dict[str, list[int]]
    seconds: float
    cpu: str
    date: str

    @property
    def legend(self) -> str:
        """The name of its line in the figure."""
        return self.series + FORMATS[self.values]

    @property
    def key(self) -> Key:
        """What it is called."""
        return self.study, self.series, self.name, self.values

    def nats(self, dense: "Measured", role: str) -> Estimate:
        """The difference of its mean NLL from the dense model's, paired by items."""
        ratio = change(dense.nlls[role], self.nlls[role])
        return Estimate(value=log1p(ratio.value), stderr=ratio.stderr / (1 + ratio.value))


@dataclass(frozen=True)
class Rate:
    """Tokens, or images, per second of a point and of the dense model, which took turns."""

    key: Key
    date: str
    speed: speed.Measured | speed.MeasuredImages

    @property
    def last(self) -> Rates:
        """What is compared: decoding, or classifying."""
        return self.speed.rates(self.speed.phases[-1])


def keep(found: Measured) -> None:
    """Adds a line to the points."""
    _append(POINTS, asdict(found))


def keep_rate(rate: Rate) -> None:
    """Adds a line to the rates."""
    _append(RATES, {"key": rate.key, "date": rate.date, "speed": rate.speed.model_dump(mode="json")})


def known() -> list[Measured]:
    """What is measured; of a point that was measured again, under other facts, the last line."""
    found = (Measured(**line) for line in _lines(POINTS))
    return list({one.key: one for one in found}.values())


def rates() -> list[Rate]:
    """Rates that are measured; of each point the last line."""
    found = (Rate(tuple(x["key"]), x["date"], SPEED.validate_python(x["speed"])) for x in _lines(RATES))
    return list({rate.key: rate for rate in found}.values())


def _append(file: Path, line: dict[str, object]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.exists() else [])


def write_page() -> None:
    """Writes the tables of all studies between the marks of the page, and the figure of those that have rates."""
    studies = {name: [one for one in known() if one.study == name] for name in dict.fromkeys(x.study for x in known())}
    text = "\n\n".join(f"### {TITLES.get(name, name)}\n\n{table(found)}" for name, found in studies.items())
    write_between(PAGE, MARKS, text)
    measured = {rate.key: rate for rate in rates()}
    shown = {name: found for name, found in studies.items() if {one.key for one in found} & measured.keys()}
    drawn = [figure(TITLES.get(name, name), found) for name, found in shown.items()]
    PICTURE.write_text(svg([*drawn, *(by_speed(name, found, measured) for name, found in shown.items())]))


def envelope(points: Sequence[Measured], value: Callable[[Measured], float]) -> list[Measured]:
    """The points that none beats with as few bytes and as low a value, the smallest first."""
    found: list[Measured] = []
    for one in sorted(points, key=lambda x: (x.bytes, value(x))):
        if not found or value(one) < value(found[-1]):
            found.append(one)
    return found


def on_validation(one: Measured) -> float:
    """The perplexity by which points are chosen: the other text is only reported."""
    return perplexity(one.nlls["validation"]).value


def table(found: Sequence[Measured]) -> str:
    """The points by series; bold: on the envelope of the validation text."""
    dense = next((one for one in found if one.series == DENSE), None)
    lowest, measured = envelope(found, on_validation), {rate.key: rate for rate in rates()}
    is_image = any(one.ranks for one in found)
    head = ["", *HEAD, *(["accuracy, test", "images/s (dense)"] if is_image else ["tokens/s (dense)"]), "of dense"]
    rows = []
    order = sorted(found, key=lambda one: (list(STYLES).index(one.series), one.values, one.bytes))
    for one in order:
        name = f"{one.series}: {one.name}"
        row = [f"**{name}**" if one in lowest else name, one.values, f"{one.bytes / 1e6:.1f}", f"{one.bits:.2f}"]
        row += [str(perplexity(one.nlls[role])) for role in ("validation", "test")]
        row += ["–" if dense in (None, one) else _signed(one.nats(dense, role)) for role in ("validation", "test")]
        row += [str(accuracy(one.ranks["test"]))] if is_image else []
        rows.append([*row, *_rate(one, measured)])
    return markdown(head, rows)


def _signed(found: Estimate) -> str:
    return f"{found.value:+.3f} ± {found.stderr:.3f}"


def _rate(one: Measured, measured: dict[Key, Rate]) -> list[str]:
    """Median rate, that of the dense model beside it, and the ratio; empty where nothing is measured."""
    if one.series == DENSE:
        own = [x for key, rate in measured.items() if key[0] == one.study for x in rate.last.dense]
        return [f"{median(own):.1f}", "1"] if own else ["", ""]
    if one.key not in measured:
        return ["", ""]
    found = measured[one.key].last
    return [f"{median(found.sparse):.1f} ({median(found.dense):.1f})", f"{speed.spread(found.ratios, '.2f')}×"]


def figure(title: str, found: Sequence[Measured]) -> go.Figure:
    """Bytes against the perplexity of the test text; rings: the envelope of the validation text."""
    drawn = new_figure(title, "MB of the whole model", "perplexity, test text")
    lowest = envelope(found, on_validation)
    drawn.add_scatter(
        x=[one.bytes / 1e6 for one in lowest], y=rounded(perplexity(one.nlls["test"]).value for one in lowest),
        name="best on validation", mode="lines+markers", line={"color": faint(INK, 0.5), "width": 1, "dash": "dot"},
        marker={"symbol": "circle-open", "size": 15, "color": INK},
    )  # fmt: skip
    order = sorted(found, key=lambda one: (list(STYLES).index(one.series), one.values, one.bytes))
    for name, group in groupby(order, key=lambda one: one.legend):
        _add(drawn, name, list(group))
    _finish(drawn, found)
    return drawn


def by_speed(study: str, found: Sequence[Measured], measured: dict[Key, Rate]) -> go.Figure:
    """How many times the dense model's speed against the perplexity of the test text: what was measured."""
    ran = [one for one in found if one.series == DENSE or one.key in measured]
    title = f"{TITLES.get(study, study)}: speed"
    drawn = new_figure(title, "times the dense model's speed, CPU", "perplexity, test text")

    def ratio(one: Measured) -> float:
        return 1.0 if one.series == DENSE else median(measured[one.key].last.ratios)

    order = sorted(ran, key=lambda one: (list(STYLES).index(one.series), one.values, one.bytes))
    for name, group in groupby(order, key=lambda one: one.legend):
        _add(drawn, name, list(group), ratio)
    _finish(drawn, ran)
    return drawn


def _finish(drawn: go.Figure, shown: Sequence[Measured]) -> None:
    values = [perplexity(one.nlls["test"]) for one in shown]
    low, high = min(x.value - x.stderr for x in values), max(x.value + x.stderr for x in values)
    drawn.update_yaxes(log_axis(low, high))
    drawn.update_layout(legend={"font": {"size": 10}, "entrywidth": 145}, margin={"b": 110})


def megabytes(one: Measured) -> float:
    """Bytes of the whole model / 10⁶."""
    return one.bytes / 1e6


def _add(drawn: go.Figure, name: str, group: Sequence[Measured], x: Callable[[Measured], float] = megabytes) -> None:
    colour, symbol = STYLES[group[0].series]
    values = [perplexity(one.nlls["test"]) for one in group]
    drawn.add_scatter(
        x=rounded(map(x, group)), y=rounded(x.value for x in values), name=name, mode="lines+markers",
        line={"color": colour, "width": 1.2, "dash": "dot" if group[0].values == "int8" else "solid"},
        marker={"color": colour, "size": 8, "symbol": symbol},
        error_y={"array": rounded((x.stderr for x in values), 4), "color": faint(colour, 0.6), "thickness": 1.2,
                 "width": 0},
        text=[one.name for one in group], hovertemplate="%{text}: %{x}, %{y:.2f}<extra></extra>",
    )  # fmt: skip
