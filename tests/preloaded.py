"""Everything that a run imports, and the faults that happen inside of it.

The commands that the tests start are forked from a process that has imported this, so it imports no test.
"""

import atexit
import ctypes
import fcntl
import gc
import os
import signal
import sys
import termios
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine

from atp_tune.cli.terminal import quiet

with quiet():  # which libraries read as they are imported
    import alembic.migration
    import optuna
    import transformers.models.llama.modeling_llama
    from plotly.graph_objects import Bar, Figure, Scatter
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import atp_tune.api.configuration
    import atp_tune.api.tuning
    import atp_tune.cli.application
    import atp_tune.folders.applying
    import atp_tune.inputs.sources
    import atp_tune.report
    import atp_tune.report.servers
    import atp_tune.search.objective
    import atp_tune.search.runner
    from atp_tune.blocks import prune_pass
    from atp_tune.checkpoints import devices
    from atp_tune.checkpoints.checkpoint import Checkpoint
    from atp_tune.cli import main
    from atp_tune.plan import Plan
    from atp_tune.pruners.wanda import Wanda
    from atp_tune.run import observers
    from atp_tune.search.objective import Objective
    from atp_tune.storage import fingerprint, opening, remote

    get_checkpoint_conversion_mapping("llama")  # compiles a thousand expressions, once
gc.collect()
gc.freeze()  # else each collection of a forked process looks at all of it, and has it copied
atexit.register(gc.unfreeze)  # or extensions complain of leaks

__all__ = ["Bar", "Figure", "Scatter", "alembic", "atp_tune", "transformers"]
TUNE = Path(__file__).parents[1] / "tune.py"
CLONE_NEWNET = 0x40000000
QUICK = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 1000, "grpc.max_reconnect_backoff_ms": 500}
TOTAL = 5  # trials of the study that is disturbed


def run(
    arguments: list[str],
    variables: Mapping[str, str],
    cwd: Path,
    out: Connection,
    err: Connection,
    inject: Callable[[], None] | None,
) -> None:
    """The command line, with its output in two pipes."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.argv = [str(TUNE), *arguments]
    sys.modules["__main__"] = ModuleType("__main__")  # not pytest's: workers import what is `__main__` here
    if inject is not None:
        inject()
    main()


def pass_for_a_gpu() -> None:
    """The CPU has another name, by which studies tell devices apart: where tests of a GPU are rehearsed on a CPU."""
    own = devices.device_name
    for module in [module for module in sys.modules.values() if getattr(module, "device_name", None) is own]:
        vars(module)["device_name"] = lambda device: f"what passes for a GPU, not {own(device)}"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


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
    "measuring the dense model": (observers, "head_scores", 1),
    "calibration": (prune_pass, "measure_and_advance", 10),
    "pruning": (Wanda, "prune", 31),
    "evaluation": (observers, "head_scores", 4),
    "measuring the test text": (observers, "head_scores", TOTAL + 3),
}


def held(folder: Path, *numbers: int) -> None:
    """The trials of these numbers wait, with their plans stored, until `go-NUMBER` is there: who looks on has time."""

    def instead(objective: Objective, trial: optuna.Trial, plan: Plan) -> tuple[float, ...]:
        while trial.number in numbers and not (folder / f"go-{trial.number}").exists():
            sleep(0.01)
        return measure(objective, trial, plan)

    measure = Objective._measure
    Objective._measure = instead  # type: ignore[method-assign]


def in_phase(phase: str, action: Callable[[], None]) -> None:
    at_call(*PHASES[phase], action)


def kill_in_transaction(number: int, journal: Path) -> None:
    """The process is killed before its commit of that number of something written: SQLite's journal lies there."""

    def before(_: object) -> None:
        if journal.exists():
            seen.append(1)
            if len(seen) == number:
                kill()

    seen: list[int] = []
    event.listen(Engine, "commit", before)


def enter(namespace: str, folder: Path, *numbers: int) -> None:
    """A process in a network namespace, as by `ip netns exec`, that waits less for a server; trials are `held`."""
    held(folder, *numbers)
    library = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if library.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    remote.DEADLINE = 3
    remote.CHANNEL = tuple((name, QUICK.get(name, value)) for name, value in remote.CHANNEL)


def add_trials(address: str, number: int) -> None:
    """Instead of the command, a process adds trials to a study that it makes if need be."""

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("pid", os.getpid())
        return trial.suggest_float("beta", 0, 1)

    with quiet():
        study = fingerprint.create_study(opening.open_storage(address, True), "s", {"sparsity": 0.5})
        study.sampler = optuna.samplers.RandomSampler()
        study.optimize(objective, number)
    raise SystemExit(0)


def at_terminal(name: str) -> None:
    """The process is at this terminal, whose Ctrl-C it hears, as if it had been started there."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def say(letters: int) -> None:
    """As many letters on stdout and on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * letters)
        stream.flush()


def abort() -> None:
    os.abort()


def wait_while(file: Path) -> None:
    """Returns when the file is gone."""
    while file.exists():
        sleep(0.01)


def doom(number: int, end: Callable[[], None], block: int = 3) -> None:
    """The trial that was first given this number ends its process each time, or does something else, at a block."""

    def measure(objective: Any, trial: Any, plan: Any) -> Any:
        attrs = trial.study.get_trials(deepcopy=False)[trial.number].system_attrs
        is_doomed[:] = [attrs.get("failed_trial", trial.number) == number]
        return whole(objective, trial, plan)

    def step(one: Any, plan: Any, index: int, hidden: Any) -> Any:
        if is_doomed == [True] and index == block:
            end()
        return advance(one, plan, index, hidden)

    is_doomed: list[bool] = []
    whole, advance = atp_tune.search.objective.Objective._measure, prune_pass.Pass.step
    atp_tune.search.objective.Objective._measure = measure  # type: ignore[method-assign]
    prune_pass.Pass.step = step  # type: ignore[method-assign]


def doom_with_patience(number: int, most: int) -> None:
    """The trial ends its process anywhere, and is given up after so many times."""
    atp_tune.storage.progress.MOST = most
    doom(number, kill, block=int.from_bytes(os.urandom(2)) % 24)
