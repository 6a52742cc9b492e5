"""The engine `deepsparse`: exports both models to ONNX; DeepSparse runs them in a process, in its own environment."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from atp_tune.cache import cache_dir
from atp_tune.checkpoints.classes import model_config
from atp_tune.checkpoints.devices import cpu_name
from atp_tune.errors import UserError
from atp_tune.events import EventHandler, Step
from atp_tune.metrics.speed import PHASES, SIDES, Phase, Side
from atp_tune.speed.deepsparse_home import python_of
from atp_tune.speed.graphs import capacity, check_family, check_onnx, export
from atp_tune.speed.model_pair import Pair
from atp_tune.speed.throughput import About, SpeedEngine, Workload
from atp_tune.speed.torch_engine import random_ids

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
    with tempfile.TemporaryDirectory(dir=cache_dir("engines"), prefix=".graphs.") as name:
        folder = Path(name)
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
