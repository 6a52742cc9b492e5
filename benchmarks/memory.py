"""Peak memory against the size of the model: weights on the device, in host memory, and mapped from disk.

    python benchmarks/memory.py          three random Llamas of 0.1, 0.3 and 0.8 GB; about two minutes
    python benchmarks/memory.py --tiny   the same of a few MB, in seconds

Each model is written in float32 as safetensors into a temporary folder; each measurement loads it, prunes and evaluates
it once, in a process of its own; "converted" computes in bfloat16. Memory is what only this process has (anonymous
pages, above those before the model was loaded). Weights that are mapped from files are not in it: the system drops such
pages where it wants the memory. `loading` is its peak until the model is there, `trial` its peak after that, above what
lies at rest: states, activations, a pruned block and, where blocks are copied, the copies. `copies` is how much larger
that is than with the weights on the device, in blocks. On CUDA `device` is the most that tensors took there.

Limits: loading at most 1.1 times the weights, copies at most two blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint, bytes_of
from atp_tune.checkpoints.devices import find_device, reset_peak_memory
from atp_tune.checkpoints.models import ModelFolder
from atp_tune.inputs.windows import Windows
from atp_tune.plan import Plan
from atp_tune.run.session import Session
from atp_tune.spec.prune import PruneConfig

MB = 1e6
SIZES = {"0.1 GB": (512, 1408, 7), "0.3 GB": (768, 2048, 10), "0.8 GB": (1024, 2816, 15)}  # width, inner, blocks
TINY = {"1 MB": (64, 160, 4)}
WAYS = ("none", "cpu", "disk", "none, converted", "cpu, converted", "disk, converted")
WINDOWS, TOKENS, VOCABULARY = 4, 64, 1024


def write_model(folder: Path, width: int, inner: int, blocks: int) -> int:
    """Writes a random Llama in float32; the bytes of its files."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Peak:
    """Looks every few milliseconds at the anonymous memory of this process, and keeps the most."""

    def __init__(self) -> None:
        self.most = self.start = anonymous()
        self._ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, anonymous())

    def end(self) -> int:
        """The most above what there was at the start, in bytes."""
        self._ended.set()
        return self.most - self.start


def anonymous() -> int:
    """Bytes that only this process has."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Loads, prunes and evaluates once."""
    device = find_device("auto")
    offload, _, converted = way.partition(", ")
    dtype = torch.bfloat16 if converted else torch.float32
    with tempfile.TemporaryDirectory() as small:  # libraries take memory once, which is not the model's
        write_model(Path(small), *TINY["1 MB"])
        work(Path(small), Checkpoint.load(Path(small), dtype, device, offload=offload))  # type: ignore[arg-type]
    reset_peak_memory(device)
    peak = Peak()
    checkpoint = Checkpoint.load(folder, dtype, device, offload=offload)  # type: ignore[arg-type]
    found = {"loading": peak.end()}
    peak = Peak()
    work(folder, checkpoint)
    found["trial"] = peak.end()
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return {
        **found,
        "weights": bytes_of(checkpoint.model.parameters()),
        "block": bytes_of(checkpoint.blocks[0].parameters()),
    }


def work(folder: Path, checkpoint: Checkpoint) -> None:
    """One trial over random windows."""
    ids = torch.randint(VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0)).numpy()
    texts = dict.fromkeys(("calibration", "validation"), Windows(ids, ""))
    context = Session(ModelFolder(folder, "", ""), checkpoint, texts, PruneConfig(), lambda event: None)
    plan = Plan("wanda", "uniform", (0.5,) * len(checkpoint.blocks))
    context.all_nlls(((block.index, block.weights) for block in context.prune(plan)), "validation")


def in_process(folder: Path, way: str) -> dict[str, Any]:
    """A measurement in a process of its own, with one thread and without memory pools that keep what was freed."""
    command = [sys.executable, __file__, "--measure", str(folder), way]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, way: str, found: dict[str, Any], resident: dict[str, Any]) -> str:
    """A line of the table; `resident`: the same with the weights on the device."""
    copies = (found["trial"] - resident["trial"]) / found["block"]
    cells = [name, way, *(f"{found[key] / MB:.1f}" for key in ("weights", "block", "loading"))]
    cells += [f"{found['loading'] / found['weights']:.2f}", f"{found['trial'] / MB:.1f}", f"{copies:.1f}"]
    if "device" in found:
        cells.append(f"{found['device'] / MB:.1f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measures all sizes in all ways, and prints the table in MB."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", nargs=2)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(Path(asked.measure[0]), asked.measure[1])))
        return
    heads = ["model", "weights lie", "weights", "block", "loading", "× weights", "trial", "copies"]
    heads += ["device"] * torch.cuda.is_available()
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for name, shape in (TINY if asked.tiny else SIZES).items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), *shape)
            found: dict[str, Any] = {}
            for way in WAYS:
                found[way] = in_process(Path(folder), way)
                resident = found[way.replace("cpu", "none").replace("disk", "none")]
                print(row(name, way, found[way], resident), flush=True)


if __name__ == "__main__":
    main()
