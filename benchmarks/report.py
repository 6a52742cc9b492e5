#!/usr/bin/env python
"""Seconds to build the report of a long study: `python benchmarks/report.py [500]`.

The trials are made up (tests/synthetic.py) but lie in a real SQLite storage, from which they are read each time.
"""

import sys
import tempfile
from datetime import datetime
from pathlib import Path
from time import perf_counter

import optuna

from atp_tune import figures
from atp_tune.report import ENDINGS, gather, write
from atp_tune.results.summary import summarise
from atp_tune.storage.opening import find_study, open_storage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
KINDS = [kind for kind in ENDINGS if kind != "png"]  # which waits for a browser


def main(trials: int = 500) -> None:
    """Makes the study, builds each report and prints seconds and sizes."""
    from synthetic import long_study

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "long.db"
        long_study(database, trials)
        for kind in KINDS:
            seconds, size = build(database, kind)
            print(f"{trials} trials, {kind:6}{seconds:6.2f} s {size / 1e6:8.3f} MB")
        for name, figure in figures.draw(summarise(read(database))).items():
            print(f"figure {name:12}{len(figure.to_json()) / 1e3:8.1f} kB")


def read(database: Path) -> optuna.Study:
    """The study, from a storage that has cached nothing yet."""
    storage = open_storage(f"sqlite:///{database}", create=False)
    study = find_study(storage, "made-up") if storage else None
    assert study is not None
    return study


def build(database: Path, kind: str) -> tuple[float, int]:
    """Seconds from opening the storage to the written file, and its bytes."""
    start = perf_counter()
    out = database.with_suffix(f".report.{ENDINGS[kind]}")
    write([gather(read(database), datetime.now())], kind, out)
    return perf_counter() - start, out.stat().st_size


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
