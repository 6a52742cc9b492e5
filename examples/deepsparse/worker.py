"""A script for DeepSparse's environment, which lacks this package: measures what stdin asks for.

    python -I worker.py TASK.json

TASK.json holds `graphs` (side → phase → path), `ids`, `tokens`, `steps`, `cores`, `folder`. Answers are JSON lines on
stdout: the number of compiled models, after each; version and instruction set; then, for each line [side, phase] on
stdin, the seconds of a run. `SIDE.PHASE.npy` in the folder are the logits after the prompt and after the next token.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np


class CompiledModel:
    """Both graphs of one model; the cache of the decode graph holds the prompt."""

    def __init__(self, graphs: dict[str, str], task: dict[str, Any]) -> None:
        from deepsparse.engine import LIB, Engine

        self._ids = np.array([task["ids"]], np.int64)
        self._tokens, self._steps = task["tokens"], task["steps"]
        self._prefill = Engine(graphs["prefill"], 1, num_cores=task["cores"])
        kept = len(self._prefill.output_names) - 1  # beside the logits: keys and values of each block
        self._decode = Engine(graphs["decode"], 1, num_cores=task["cores"], cached_outputs=[False] + [True] * kept)
        shapes = dict(zip(self._decode.input_names, self._decode.input_shapes))  # noqa: B905 (Python 3.8 has no strict)
        self._positions = shapes["attention_mask"][1]
        self._empty = {  # DeepSparse's own cache replaces these inputs
            name: np.zeros((0, *shape[1:]), np.float32) for name, shape in shapes.items() if name.startswith("past")
        }
        self._cache = LIB.kv_cache(0, 0)
        for position in range(self._tokens):
            self._next(position)

    def logits(self, phase: str) -> Any:
        """Logits of the prompt's last token (prefill), or of the next one (decode)."""
        if phase == "prefill":
            return self._prompt()
        found = self._next(self._tokens)
        self._cache.shift_last(1)
        return found

    def seconds(self, phase: str) -> float:
        """Seconds of one run."""
        began = perf_counter()
        if phase == "prefill":
            self._prompt()
            return perf_counter() - began
        for position in range(self._tokens, self._tokens + self._steps):
            self._next(position)
        taken = perf_counter() - began
        self._cache.shift_last(self._steps)
        return taken

    def _prompt(self) -> Any:
        tokens = self._tokens
        mask = np.tril(np.ones((1, 1, tokens, tokens), np.int64))
        return self._run(self._prefill, self._ids[:, :tokens], mask, np.arange(tokens)[None])

    def _next(self, position: int) -> Any:
        mask = np.zeros((1, 1, 1, self._positions), np.int64)
        mask[..., self._positions - position - 1 :] = 1
        return self._run(self._decode, self._ids[:, position : position + 1], mask, np.array([[position]]))

    def _run(self, engine: Any, ids: Any, mask: Any, positions: Any) -> Any:
        given = {"input_ids": ids, "attention_mask": mask[:, 0, -1], "causal_mask": mask, "positions": positions}
        given.update(self._empty)
        inputs = [np.ascontiguousarray(given[name]) for name in engine.input_names]
        if engine is self._prefill:
            return engine._eng_net.execute_list_out(inputs)[0]
        return engine._eng_net.execute_list_out(inputs, self._cache)[0]


def main() -> None:
    """Compiles the graphs, then measures until stdin ends."""
    task = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries go to stderr
    models = {}
    for side, graphs in task["graphs"].items():
        models[side] = CompiledModel(graphs, task)
        for phase in graphs:
            np.save(Path(task["folder"]) / f"{side}.{phase}.npy", models[side].logits(phase))
        answers.write(json.dumps(len(models)) + "\n")
    from deepsparse import __version__, cpu

    answers.write(json.dumps({"version": __version__, "isa": cpu.cpu_architecture().isa}) + "\n")
    for line in sys.stdin:
        side, phase = json.loads(line)
        answers.write(json.dumps(models[side].seconds(phase)) + "\n")


if __name__ == "__main__":
    main()
