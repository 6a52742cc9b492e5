"""What the tests of faults are made of: commands that start fast and can be killed, small disks, and the table."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from tinystudy import Answer, finish, start

from atp_tune.storage import progress

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by tests/test_faults.py: -->\n", "<!-- : written by tests/test_faults.py -->"
HEAD = [
    "| fault | times injected | trials lost | measured twice | same result as undisturbed | recovery, seconds |",
    "|---|---:|---:|---:|---|---:|",
]

Inject = Callable[[], None]


class Rows:
    """The table of docs/reliability.md: tests add rows, which replace earlier ones of the same fault."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}

    def add(
        self, fault: str, times: int, lost: int = 0, twice: int = 0, same: str = "yes", seconds: float | None = None
    ) -> None:
        took = "–" if seconds is None else f"{seconds:.1f}"
        self.made[fault] = f"| {fault} | {times} | {lost} | {twice} | {same} | {took} |"

    def write(self, document: Path) -> None:
        before, _, rest = document.read_text().partition(BEGIN)
        inside, _, after = rest.partition(END)
        known = {line.split(" | ")[0].removeprefix("| "): line for line in inside.splitlines()[2:] if line}
        lines = [*HEAD, *{**known, **self.made}.values()]
        document.write_text(f"{before}{BEGIN}" + "\n".join(lines) + f"\n{END}{after}")


class Command:
    """A command that can be killed, and in which something can be injected."""

    def __init__(self, *arguments: str | Path, inject: Inject | None = None) -> None:
        self.began = monotonic()
        self.process = start(*arguments, inject=inject)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> Answer:
        self.process.kill()
        return self.finish()

    def finish(self) -> Answer:
        return finish(self.process)

    def kill_when(self, condition: Callable[[], object]) -> bool:
        """Kills it as soon as a condition holds; False if it ended before."""
        while not condition():
            if not self.lives:
                return False
            sleep(0.002)
        return self.kill().code == -signal.SIGKILL


def curve(values: Sequence[float], title: str) -> str:
    """A line over the numbers of the values, from 0 up, as SVG."""
    top, width, height = max(values), 480, 120
    across, up = width / (len(values) - 1), height / top
    points = " ".join(f"{k * across:.1f},{height - value * up:.1f}" for k, value in enumerate(values))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-6 -6 {width + 12} {height + 30}" font-family="sans-serif" '
        f'font-size="11" fill="#888">\n<path d="M0,0V{height}H{width}" fill="none" stroke="#888"/>\n'
        f'<polyline points="{points}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>\n'
        f'<text x="4" y="{height - top * up + 14:.0f}">{values[0]:.0f} → {values[-1]:.0f}</text>\n'
        f'<text x="0" y="{height + 18}">{title}</text>\n</svg>\n'
    )


# --- looking at a study from outside


def row(database: Path, query: str, *values: object) -> tuple[Any, ...] | None:
    """The first row of a query; None while the file or its tables are being made, or a writer keeps it locked."""
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=0.5)) as connection:
            return connection.execute(query, values).fetchone()
    except sqlite3.OperationalError:
        return None


def has(database: Path, query: str, *values: object) -> bool:
    """Whether a query has a row, as far as one can see."""
    return row(database, query, *values) is not None


def measured(study: optuna.Study) -> list[tuple[dict[str, Any], float]]:
    """Parameters and values of what was measured; what was queued again came later than it would have."""
    done = (trial for trial in study.trials if trial.state == TrialState.COMPLETE)
    found = [(trial.params, trial.value or 0.0) for trial in done if "repeats" not in trial.user_attrs]
    return sorted(found, key=json.dumps)


def check_equal(study: optuna.Study, undisturbed: optuna.Study, total: int) -> None:
    """Nothing is lost, nothing measured twice, and all numbers are those of an undisturbed run."""
    assert progress.counted(study) == total
    assert not {TrialState.RUNNING, TrialState.WAITING} & {trial.state for trial in study.trials}
    found = measured(study)
    assert len({json.dumps(params, sort_keys=True) for params, _ in found}) == len(found)
    known = measured(undisturbed)
    assert not [one for one in found if one not in known], (found, known)
    assert found == known
    assert reports(study) == reports(undisturbed)


def reports(study: optuna.Study) -> dict[str, list[float]]:
    """Window NLLs on the test text by the parameters of their trial."""
    found = study.user_attrs["test_nlls"]
    names = {name: "dense" if name == "dense" else json.dumps(study.trials[int(name)].params) for name in found}
    return {names[name]: found[name] for name in found}


def check_best(file: Path, other: Path) -> None:
    """Two best.json are equal but for the number of the trial and where and when they were made."""
    one, two = (json.loads(path.read_text()) for path in (file, other))
    for key in ("trial", "folder", "study"):
        one.pop(key), two.pop(key)
    assert one == two


# --- disks


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A small disk of its own, mounted on a folder; only root can do it."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        if "CI" in os.environ:
            raise
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fills a disk with one file, but for so many bytes; what others write meanwhile may take some of them."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream:  # one write, which ends where the disk is full
        stream.write(bytes(max(0, shutil.disk_usage(folder).free - leave)))
    return filler


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}
