"""What `speedup` does and shows."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from atp_tune.cli.display import Display
from atp_tune.cli.runtime import quiet
from atp_tune.cli.terminal import console, markdown, markdown_table
from atp_tune.metrics.speed import PHASES, Measured, Phase, Sizes, Speed, spread
from atp_tune.spec.config import read_config

PLAIN = (
    "Zeros in a dense file make nothing smaller or faster by themselves: the file keeps its bytes, and torch "
    "multiplies by each 0."
)


def run_setup() -> None:
    """Makes DeepSparse's environment, and says where."""
    from atp_tune.speed.deepsparse_home import setup

    with quiet(), Display() as display:
        home = setup(display)
    console.print(f"DeepSparse is in {home}", highlight=False)


def run_speedup(
    config: Path | None,
    model: Path | None,
    engine: str,
    task: tuple[int, int],
    device: str,
    storage: str | None,
    allowed: Mapping[str, bool],
) -> None:
    """Measures, stores and shows; `task`: tokens of the prompt and number of runs."""
    with quiet(), Display() as display:
        from atp_tune.results.annotations import attach
        from atp_tune.speed.benchmark import check, measure
        from atp_tune.speed.model_pair import about, find_pair
        from atp_tune.speed.throughput import Task

        path = about(model) if model is not None else config or Path()
        read = read_config(path)
        check(engine, read.prune.pattern, device)
        pair = find_pair(read, path.parent / read.folder, model, device, display, allowed)
        found = measure(pair, engine, Task(tokens=task[0], runs=task[1]), device, display)
        places = attach(path, read, "speed", found, storage)
    show_speed(found)
    console.print(f"kept in {', '.join(places)}", highlight=False)


def show_speed(found: Speed) -> None:
    """Bytes, zeros and rates as Markdown tables."""
    for table in (_sizes(found.sizes), _zeros(found.zeros), rates_table(found)):
        console.print(markdown(table), "\n", highlight=False, sep="")
    for line in summary_of(found):
        console.print(line, style="dim", highlight=False)
    console.print(PLAIN)


def summary_of(found: Speed) -> Iterator[str]:
    """What was measured, and on what: a line for all engines, and one for each."""
    row = found.engines[0]
    yield (
        f"tokens per second, median (lowest to highest) of {len(row.decode.dense)} runs in which dense and sparse took "
        f"turns; prefill: a prompt of {row.tokens} tokens; decode: the {row.steps} tokens after it, one at a time"
    )
    for row in found.engines:
        exact = "" if row.logits is None else f"; logits are transformers' within {row.logits:.0e} of the largest"
        yield f"{row.name}: version {row.version} on {row.where}{exact}"


def _sizes(sizes: Sizes) -> Table:
    table = markdown_table("weight files", "dense", "with zeros", "smaller")
    for name, dense, sparse in (
        ("as they are", sizes.dense, sizes.sparse),
        ("compressed with zstd", sizes.dense_zstd, sizes.sparse_zstd),
    ):
        table.add_row(name, _megabytes(dense), _megabytes(sparse), f"{dense / sparse:.2f}×")
    return table


def _zeros(zeros: Mapping[str, float]) -> Table:
    table = markdown_table("linear", "zeros")
    for kind, share in zeros.items():
        table.add_row(kind, f"{share:.2%}")
    return table


def rates_table(found: Speed) -> Table:
    """A row for each engine and phase: dense, sparse, against itself, against torch's best dense."""
    table = markdown_table("engine", "phase", "dense", "sparse", "sparse / dense", "sparse / torch's best dense")
    for row in found.engines:
        for phase in PHASES:
            table.add_row(*_rates(found, row, phase))
    return table


def _rates(found: Speed, row: Measured, phase: Phase) -> Iterator[str]:
    rates = row.rates(phase)
    yield from (row.name, phase)
    yield from (spread(values, ".1f") for values in (rates.dense, rates.sparse))
    yield spread(rates.ratios, ".2f") + "×"
    yield f"{found.over_torch(row, phase):.2f}×"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
