"""Peak memory against the size of the model: weights on the device, in host memory, and mapped from disk.

    python benchmarks/memory.py          three random Llamas of 0.1, 0.3 and 0.8 GB; about two minutes
    python benchmarks/memory.py --tiny   the same of a few MB, in seconds

Each model is written as safetensors into a temporary folder; each measurement loads, prunes and evaluates it once, in
a process of its own. On the CPU `anonymous` are the pages that only this process has: weights that were copied or
converted, states, activations. `mapped` are pages of files, which the system drops where it wants the memory. Both are
the most above what the process had before it loaded the model. On CUDA `device` is the most that tensors took there.

Limits: host memory 1.1 times the checkpoint, device memory two blocks, the shell (embeddings, norm, head), the states
and the activations of one batch. Where the CPU is the device too, both limits are one.
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

from atp_tune.bench import Bench
from atp_tune.checkpoint import Checkpoint, bytes_of
from atp_tune.devices import find_device, reset_peak_memory
from atp_tune.models import ModelFolder
from atp_tune.plan import Plan
from atp_tune.study import Prune
from atp_tune.windows import Windows

MB = 1e6
SIZES = {"0.1 GB": (512, 1408, 12), "0.3 GB": (768, 2048, 20), "0.8 GB": (1024, 2816, 31)}  # width, inner, blocks
TINY = {"1 MB": (64, 160, 4)}
WAYS = ("device", "host", "disk", "device, converted", "disk, converted")
WINDOWS, TOKENS, VOCABULARY = 4, 128, 4096


def write_model(folder: Path, width: int, inner: int, blocks: int) -> int:
    """Writes a random Llama in float32; the bytes of its files."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Peak:
    """Looks every few milliseconds at what a process has, and keeps the most of each kind of page."""

    def __init__(self) -> None:
        self._before = self._pages()
        self.most = dict.fromkeys(self._before, 0)
        self._ended = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            for kind, size in self._pages().items():
                self.most[kind] = max(self.most[kind], size - self._before[kind])

    def end(self) -> dict[str, int]:
        """The most of each kind, in bytes above what there was at the start."""
        self._ended.set()
        return self.most

    def _pages(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
                  if name in ("RssAnon", "RssFile")}  # fmt: skip
        return {"anonymous": fields["RssAnon"], "mapped": fields["RssFile"]}


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Loads, prunes and evaluates once."""
    device = find_device("auto")
    residency, _, converted = way.partition(", ")
    dtype = torch.bfloat16 if converted else torch.float32
    with tempfile.TemporaryDirectory() as small:  # libraries take memory once, which is not the model's
        write_model(Path(small), *TINY["1 MB"])
        work(Path(small), Checkpoint.load(Path(small), dtype, device, residency=residency))  # type: ignore[arg-type]
    reset_peak_memory(device)
    peak = Peak()
    checkpoint = Checkpoint.load(folder, dtype, device, residency=residency)  # type: ignore[arg-type]
    loading = dict(peak.most)
    work(folder, checkpoint)
    found: dict[str, Any] = {**peak.end(), "loading": loading["anonymous"]}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    found["weights"] = bytes_of(checkpoint.model.parameters())
    found["block"] = bytes_of(checkpoint.blocks[0].parameters())
    found["shell"] = found["weights"] - bytes_of(checkpoint.blocks.parameters())
    found["states"] = 4 * WINDOWS * TOKENS * checkpoint.config.hidden_size * dtype.itemsize
    return found


def work(folder: Path, checkpoint: Checkpoint) -> None:
    """One trial over random windows."""
    ids = torch.randint(VOCABULARY, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0)).numpy()
    texts = dict.fromkeys(("calibration", "search"), Windows(ids, ""))
    bench = Bench(ModelFolder(folder, "", ""), checkpoint, texts, Prune(), lambda event: None)
    plan = Plan("wanda", "uniform", (0.5,) * len(checkpoint.blocks))
    bench.all_nlls(((block.index, block.weights) for block in bench.prune(plan)), "search")


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


def row(name: str, way: str, found: dict[str, Any]) -> str:
    """A line of the table; `host`: anonymous memory over the checkpoint; `held`: of it, what is no weight at rest."""
    weights = found["weights"]
    resting = weights - found["shell"] if way.startswith("host") else 0
    cells = [
        name, way, *(f"{found[key] / MB:.1f}" for key in ("weights", "block", "loading", "anonymous", "mapped")),
        f"{found['anonymous'] / weights:.2f}", f"{(found['anonymous'] - resting) / found['block']:.1f}",
    ]  # fmt: skip
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
    heads = ["model", "way", "weights", "block", "loading", "anonymous", "mapped", "× weights", "beside rest, blocks"]
    heads += ["device"] * torch.cuda.is_available()
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for name, shape in (TINY if asked.tiny else SIZES).items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), *shape)
            for way in WAYS:
                print(row(name, way, in_process(Path(folder), way)), flush=True)


if __name__ == "__main__":
    main()
