"""Everything that a run imports, and the faults that happen inside of it.

The commands that the tests of faults kill are forked from a process that has imported this, so it imports no test.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama

import atp_tune.cli.running
import atp_tune.report
import atp_tune.search.objective
import atp_tune.search.tuning
import atp_tune.sparse.applying
from atp_tune.blocks import prune_pass
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.cli import main
from atp_tune.pruners.wanda import Wanda
from atp_tune.scores import evaluation

__all__ = ["atp_tune", "transformers"]
torch.set_num_threads(1)
TOTAL = 5  # trials of the study that is disturbed


def run(
    arguments: list[str], variables: Mapping[str, str], out: Path, err: Path, inject: Callable[[], None] | None
) -> None:
    """The command line, with its output in files."""
    os.environ.update(variables)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["tune.py", *arguments]
    if inject is not None:
        inject()
    main()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def at_call(owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """From the call of that number on, a function does something else first."""

    def instead(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) >= number:
            action()
        return function(*args, **options)

    calls: list[str] = []
    function = getattr(owner, name)
    setattr(owner, name, instead)


PHASES: dict[str, tuple[Any, str, int]] = {  # what is called in it, and how often before the fault
    "loading": (Checkpoint, "load", 1),
    "measuring the dense model": (evaluation, "head_scores", 1),
    "calibration": (prune_pass, "measure", 10),
    "pruning": (Wanda, "prune", 31),
    "evaluation": (evaluation, "head_scores", 4),
    "report": (evaluation, "head_scores", TOTAL + 3),
}


def in_phase(phase: str, action: Callable[[], None]) -> None:
    at_call(*PHASES[phase], action)


def kill_in_the_first_trial() -> None:
    """Whichever it is: one that was queued again comes first."""
    at_call(prune_pass, "measure", 1, kill)


def kill_at_rename() -> None:
    """The process is killed in the moment in which best.json is to get its name."""

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("tiny.best.json"):
            kill()

    sys.addaudithook(audit)


def kill_at_write(number: int, below: str) -> None:
    """The process is killed at its write of that number below a folder: a file opened or renamed, a folder made."""
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    seen: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        is_write = event in ("os.mkdir", "os.rename", "os.chmod") or (event == "open" and int(arguments[2]) & writes)
        if is_write and str(arguments[0]).startswith(below):
            seen.append(event)
            if len(seen) == number:
                kill()

    sys.addaudithook(audit)


def abort() -> None:
    os.abort()


def doom(number: int, end: Callable[[], None], anywhere: bool = False) -> None:
    """The trial that was first given this number ends its process each time: at the same block, or anywhere."""

    def measure(objective: Any, trial: Any, plan: Any) -> Any:
        attrs = trial.study.get_trials(deepcopy=False)[trial.number].system_attrs
        is_doomed[:] = [attrs.get("failed_trial", trial.number) == number]
        return whole(objective, trial, plan)

    def step(one: Any, plan: Any, index: int, hidden: Any) -> Any:
        if is_doomed == [True] and index == block:
            end()
        return advance(one, plan, index, hidden)

    block = int.from_bytes(os.urandom(2)) % 24 if anywhere else 3
    is_doomed: list[bool] = []
    whole, advance = atp_tune.search.objective.Objective._measure, prune_pass.Pass.step
    atp_tune.search.objective.Objective._measure = measure  # type: ignore[method-assign]
    prune_pass.Pass.step = step  # type: ignore[method-assign]


def doom_with_patience(number: int, most: int) -> None:
    """The trial ends its process anywhere, and is given up after so many times."""
    atp_tune.trials.cutoffs.MOST = most
    doom(number, kill, anywhere=True)
