"""The engine `deepsparse`: exports both models to ONNX; DeepSparse runs them in a process, in its own environment.

The environment lies in the user's cache; `setup` makes it, if necessary with an older Python. Version 1.8.0 is the last
that runs (1.9.0 is an empty stub). DeepSparse is no dependency, because it is proprietary, licensed for evaluation
only, and no longer developed.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.cache import cache_dir, folder_atomically, temporary_folder
from atp_tune.checkpoints.classes import model_config
from atp_tune.cpu import cpu_flags, cpu_name
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Message, Step
from atp_tune.metrics.speed import PHASES, SIDES, Phase, Side
from atp_tune.speed.graphs import capacity, check_family, check_onnx, export
from atp_tune.speed.model_pair import Pair
from atp_tune.speed.throughput import About, SpeedEngine, Workload
from atp_tune.speed.torch_engine import random_ids

VERSION = "1.8.0"
PACKAGES = (f"deepsparse=={VERSION}", "numpy<2")  # it needs onnx < 1.15 itself, which needs numpy 1
PYTHONS = ("3.11", "3.10", "3.9", "3.8")
LICENCE = (
    "DeepSparse is proprietary: its Community License allows evaluation, not production; read LICENSE in it. It is no "
    "longer developed. It is installed in an environment of its own, and its telemetry is turned off."
)
SETUP = "python tune.py speedup --engine deepsparse --setup"
WORKER = Path(__file__).with_name("deepsparse_worker.py")
SILENT = {"NM_DISABLE_ANALYTICS": "1"}  # turns telemetry off
TOLERANCE = 1e-3  # of the largest logit; another order of float32 sums changes 1e-5 of it


class DeepSparse:
    """The process of DeepSparse, and its answers."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self._process, self._errors = process, errors
        self.about: About

    def seconds(self, side: Side, phase: Phase) -> float:
        """Seconds of one run of a phase."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer` reports why it died
            self._process.stdin.write(json.dumps([side, phase]) + "\n")
            self._process.stdin.flush()
        return float(self.answer())

    def answer(self) -> Any:
        """The next answer; UserError with the last line of stderr if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()] or [f"exit code {code}"]
        raise UserError(f"--engine deepsparse: its process has ended: {said[-1]}")


def opened(pair: Pair, task: Workload, watch: EventHandler) -> AbstractContextManager[SpeedEngine]:
    """Opens both models in float32; UserError at once if DeepSparse is not installed or cannot run the model."""
    check_onnx()
    check_family(model_config(pair.dense, False), capacity(task))
    return _compiled(python_of(), pair, task, watch)


@contextmanager
def _compiled(python: Path, pair: Pair, task: Workload, watch: EventHandler) -> Iterator[SpeedEngine]:
    """Exports and compiles both models; UserError if their logits differ from transformers'."""
    cores = torch.get_num_threads()
    with temporary_folder(cache_dir("engines") / "graphs") as folder:
        wanted = dict(_exported(pair, task, folder, cores, watch))
        with _process(python, folder) as engine:
            for done in range(len(SIDES)):
                engine.answer()
                watch(Step("compile", done + 1, len(SIDES)))
            found = engine.answer()
            error = max(_difference(folder / f"{side}.{phase}.npy", wanted[side, phase]) for side, phase in wanted)
            if error > TOLERANCE:
                raise UserError(
                    f"--engine deepsparse: its logits differ from transformers' by {error:.2g} of the largest; "
                    "nothing was stored"
                )
            device = f"{cpu_name()} ({found['isa']})"
            engine.about = About("deepsparse", found["version"], "float32", device, cores, error)
            yield engine


def _exported(
    pair: Pair, task: Workload, folder: Path, cores: int, watch: EventHandler
) -> Iterator[tuple[tuple[Side, Phase], Tensor]]:
    """Writes the graphs and task.json; yields transformers' logits for each graph."""
    graphs: dict[Side, dict[Phase, str]] = {}
    for done, side in enumerate(SIDES):
        checkpoint = pair.load(side, torch.float32, torch.device("cpu"))
        (folder / side).mkdir()
        paths = export(checkpoint.model, task, folder / side)
        graphs[side] = {phase: str(path) for phase, path in paths.items()}
        ids = random_ids(checkpoint, task)
        with torch.inference_mode():
            logits = checkpoint.model(ids[:, : task.tokens + 1], logits_to_keep=2).logits[0]
        yield from (((side, phase), row) for phase, row in zip(PHASES, logits, strict=True))
        watch(Step("export", done + 1, len(SIDES)))
    told = {"graphs": graphs, "ids": ids[0].tolist(), "cores": cores, "folder": str(folder)}
    (folder / "task.json").write_text(json.dumps({**told, "tokens": task.tokens, "steps": task.steps}))


@contextmanager
def _process(python: Path, folder: Path) -> Iterator[DeepSparse]:
    command = [str(python), "-I", str(WORKER), str(folder / "task.json")]
    pipe = subprocess.PIPE
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=errors, text=True, env={**os.environ, **SILENT}
        )
        try:
            yield DeepSparse(process, errors)
        finally:
            process.kill()
            process.communicate()


def _difference(path: Path, wanted: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    found = torch.from_numpy(np.load(path)).reshape(wanted.shape)
    return float((found - wanted).abs().max() / wanted.abs().max())


# The environment


def python_of() -> Path:
    """The environment's Python; UserError if DeepSparse cannot run here or is not installed."""
    check_machine()
    python = _python_in(_home())
    if not python.exists():
        raise UserError(f"--engine deepsparse: is not installed; run: {SETUP}")
    return python


def setup(watch: EventHandler) -> Path:
    """Makes the environment unless it exists, and returns its folder; UserError if it cannot be made."""
    check_machine()
    home = _home()
    watch(Message(LICENCE))
    if not _python_in(home).exists():
        python = find_python()
        watch(Message(f"installing DeepSparse {VERSION} by {python} into {home}"))
        with folder_atomically(home, shared=True) as folder:
            _run([str(python), "-m", "venv", str(folder)])
            quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
            _run([str(_python_in(folder)), "-m", "pip", "install", *quiet, *PACKAGES])
    return home


def check_machine() -> None:
    """UserError if DeepSparse does not support the system or the CPU."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise UserError(
            f"--engine deepsparse: runs on Linux on x86-64, this is {sys.platform} on {platform.machine()}; "
            "--engine torch runs here"
        )
    if "avx2" not in cpu_flags():
        raise UserError("--engine deepsparse: needs a CPU with AVX2 or AVX-512; --engine torch runs here")


def find_python() -> Path:
    """A Python that DeepSparse supports: this one or one in PATH; UserError if there is none."""
    own = ".".join(map(str, sys.version_info[:2]))
    if own in PYTHONS:
        return Path(sys.executable)
    found = next(filter(None, (shutil.which(f"python{version}") for version in PYTHONS)), None)
    if found is None:
        raise UserError(
            f"--engine deepsparse: needs Python {PYTHONS[-1]} to {PYTHONS[0]}, this is {own}; install python3.11 so "
            f"that it is in PATH, then run: {SETUP}"
        )
    return Path(found)


def _home() -> Path:
    return cache_dir("engines") / f"deepsparse-{VERSION}"


def _python_in(folder: Path) -> Path:
    return folder / "bin" / "python"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"--engine deepsparse: cannot be installed: {said[-1]}; the network is needed once")
