"""What a search costs: the paper's procedure against `tune.py`, with each lever alone and with all of them.

    python benchmarks/search_cost.py                              50 and 60 %, about 15 minutes on 2 cores
    python benchmarks/search_cost.py --scale 4 --rows paper all   four times the text to calibrate on and to search on

The paper's search is a shell loop: for each β of the grid 0.002, 0.004, … a process loads the checkpoint, tokenises,
passes the calibration text twice (dense, then pruned) at one window a time, sorts every row for its mask, evaluates
window by window, and prints a perplexity; the least is chosen. It is written here as plainly as that, on the same
model, texts, number format and threads. `tune.py` is run as a person would run it.

`to its β` is the wall time, process start and model loading included, until no more β can be chosen: a screening that
hands on one point has chosen it, and what follows measures it. `to the choice` is the time until that is done too, the
last trial of a β; `all` is the whole command, which also measures dense, uniform and best on the test text (the
paper's loop does not). Tokens
are those of the calibration and validation texts that pass through all blocks until the choice. The test perplexity is
that of the chosen point, measured as the row measures; the change is from the paper's choice, over paired windows.
`at its β` is the change where the chosen β is pruned as the paper does, so that only the choice differs.
Dense statistics that an earlier run left in the cache are removed first.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter

import optuna

from atp_tune.config.studyfile import load
from atp_tune.measures import change, perplexity
from atp_tune.results.summary import made_from, summarise
from atp_tune.storage.opening import find_study, open_storage
from atp_tune.utils.cache import cache_dir

HERE = Path(__file__).parent
STEP = 0.002
GRID = ("search.sampler=grid", f"search.step={STEP}")
PART = 8  # windows of the validation text that a screening looks at
SCREEN = ("search.sampler=gp", "search.screen.trials=9")
FAST = "smol-fast"
REST = ("prune.statistics=sequential", "search.stopper=wilcoxon")
LEVERS = {
    "off": GRID,
    "sequential": (*GRID, "prune.statistics=sequential"),
    "stopper": (*GRID, "search.stopper=wilcoxon"),
    "early_termination": ("search.sampler=gp", "search.early_termination=true"),
    "screen": (*SCREEN, "search.screen.confirm=1"),
    "all": (*SCREEN, "search.screen.confirm=1", *REST),
    "all-2": (*SCREEN, "search.screen.confirm=2", *REST),
    FAST: (),  # the study of that name, unchanged: `all-2`, screened on a quarter of the validation text
}


@dataclass
class Row:
    """One way to search."""

    name: str
    to_beta: float  # seconds
    to_choice: float
    all: float
    tokens: float
    beta: float
    trials: str
    report: list[float]  # window NLLs
    as_paper: list[float]  # those of the same β, pruned as the paper does


def texts(scale: int) -> dict[str, int]:
    """The settings of smol-60's texts, so many times as long."""
    found = load("smol-60").study.texts
    assert found is not None
    return {
        f"texts.{role}.nsamples": scale * (getattr(found, role).nsamples or 0) for role in ("calibration", "validation")
    }


def paper(sparsity: float, work: Path, scale: int) -> Row:
    """The loop of the research scripts, a process for each β."""
    blocks, command = 30, [sys.executable, str(HERE / "research_loop.py"), str(work), str(sparsity)]
    bound = 2 * min(sparsity, 1 - sparsity) / (blocks - 1)
    betas = [round(STEP * k, 10) for k in range(1, int(bound / STEP + 1e-9) + 1)]
    began, found = perf_counter(), {}
    for beta in betas:
        nlls = _nlls([*command, str(beta), "validation"])
        found[beta] = perplexity(nlls).value
        print(f"  paper β={beta:g}: {found[beta]:.2f}", file=sys.stderr, flush=True)
    seconds = perf_counter() - began
    best = min(found, key=lambda beta: found[beta])
    N, E = _tokens(scale)
    report = _report(best, sparsity, work)
    return Row("paper", seconds, seconds, seconds, len(betas) * (2 * N + E), best, str(len(betas)), report, report)


def _report(beta: float, sparsity: float, work: Path) -> list[float]:
    return _nlls([sys.executable, str(HERE / "research_loop.py"), str(work), str(sparsity), str(beta), "test"])


def _nlls(command: Sequence[str]) -> list[float]:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def ours(name: str, sparsity: float, work: Path, scale: int) -> Row:
    """One command of `tune.py` with some levers."""
    storage, label = f"sqlite:///{work}/search.db", f"{name}-{sparsity:g}"
    grid = int(2 * min(sparsity, 1 - sparsity) / 29 / STEP + 1e-9)
    sizes = texts(scale)
    overrides = [f"sparsity={sparsity}", *LEVERS[name], *(f"{key}={value}" for key, value in sizes.items())]
    if "search.screen" in str(LEVERS[name]):
        confirm = int(next(key for key in LEVERS[name] if "confirm" in key)[-1])
        every = sizes["texts.validation.nsamples"] // PART
        overrides += [f"search.screen.stride={every}", f"search.trials={confirm + 1}"]
    elif name != FAST:
        overrides += [f"search.trials={grid + 1}"]
    sets = [word for override in overrides for word in ("--set", override)]
    file = name if name == FAST else "smol-60"
    command = [sys.executable, "tune.py", "--study", file, "--storage", storage, "--study-name", label, *sets]
    shutil.rmtree(cache_dir("statistics"), ignore_errors=True)
    began, started = datetime.now(), perf_counter()
    subprocess.run(command, check=True, cwd=HERE.parent, stdout=sys.stderr)
    seconds = perf_counter() - started
    study = _stored(label, storage)
    choice = max(trial.datetime_complete for trial in study.trials if trial.datetime_complete and trial.params["beta"])
    known = _screened(label, storage) if "search.screen.confirm=1" in LEVERS[name] else choice
    summary = summarise(study)
    best = summary.best_trial
    assert best is not None
    report = study.user_attrs["test_nlls"][str(best.number)]
    trials, tokens = _work(study, label, storage, scale)
    beta = best.params["beta"]
    as_paper = _report(beta, sparsity, work)
    to_beta, to_choice = ((moment - began).total_seconds() for moment in (known, choice))
    return Row(name, to_beta, to_choice, seconds, tokens, beta, trials, report, as_paper)


def _stored(name: str, address: str) -> optuna.Study:
    db = open_storage(address, create=False)
    study = find_study(db, name) if db else None
    assert study is not None
    return study


def _screened(label: str, storage: str) -> datetime:
    """When the screening of a study ended."""
    trials = _stored(f"{label}.screen", storage).trials
    return max(trial.datetime_complete for trial in trials if trial.datetime_complete)


def _work(study: optuna.Study, label: str, storage: str, scale: int) -> tuple[str, float]:
    """Trials, in full, stopped and screened, and tokens through the model until the choice, the dense model's too."""
    N, E = _tokens(scale)
    made = made_from(study.user_attrs["made_from"])
    passes = 1 if made and made.study.prune.statistics == "sequential" else 2
    windows, shown, tokens = len(study.user_attrs["dense"]), f"{len(study.trials)}", 0.0
    stopped = sum("stopped_after" in trial.user_attrs for trial in study.trials)
    if f"{label}.screen" in optuna.get_all_study_names(storage):
        screened = _stored(f"{label}.screen", storage)
        tokens += N + E * len(screened.user_attrs["dense"]) / windows * (1 + len(screened.trials))
        shown += f" + {len(screened.trials)} screened"
        measured = [trial for trial in study.trials if trial.params["beta"]]  # uniform comes after the choice
    else:
        measured, tokens = study.trials, float(E)
    tokens += sum(passes * N + E * len(trial.user_attrs["nlls"]) / windows for trial in measured)
    return shown + (f", {stopped} stopped" if stopped else ""), tokens


def _tokens(scale: int) -> tuple[int, int]:
    found = load("smol-60").study.texts
    assert found is not None
    calibration, search = (scale * (text.nsamples or 0) * text.seqlen for text in (found.calibration, found.validation))
    return calibration, search


def prepare(work: Path, scale: int) -> None:
    """Model folder and windows for the plain loop, and warm caches for all."""
    sizes = [f"{key}={value}" for key, value in texts(scale).items()]
    command = [sys.executable, str(HERE / "research_loop.py"), str(work), "prepare", *sizes]
    subprocess.run(command, check=True)


def table(rows: list[Row], sparsity: float) -> str:
    """Markdown, one line a row."""
    first = rows[0]
    head = (
        f"**{sparsity:.0%}**\n\n| search | to its β s | times faster | to the choice s | times faster | all s | "
        "tokens | trials | β | test perplexity | against the paper's choice | at its β |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {row.name} | {row.to_beta:.0f} | {first.to_beta / row.to_beta:.1f} | {row.to_choice:.0f} | "
        f"{first.to_choice / row.to_choice:.1f} | {row.all:.0f} | {row.tokens:,.0f} | {row.trials} | "
        f"{row.beta:.4g} | {perplexity(row.report)} | {change(first.report, row.report)} | "
        f"{change(first.report, row.as_paper)} |"
        for row in rows
    ]
    return "\n".join([head, *lines, ""])


def main() -> None:
    """Prints a table for each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--rows", nargs="+", default=["paper", *LEVERS], choices=["paper", *LEVERS])
    parser.add_argument("--scale", type=int, default=1, help="times smol-60's texts to calibrate on and to search on")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work, asked.scale)
        print("{} cores, {:,} tokens to calibrate, {:,} to search\n".format(os.cpu_count(), *_tokens(asked.scale)))
        for sparsity in asked.sparsity:
            ways = [paper if name == "paper" else partial(ours, name) for name in asked.rows]
            rows = [way(sparsity, work, asked.scale) for way in ways]
            print(table(rows, sparsity), flush=True)


if __name__ == "__main__":
    main()
