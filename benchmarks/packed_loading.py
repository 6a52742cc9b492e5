"""Seconds and memory to load a folder with zeros and the same packed, cold: `python benchmarks/packed_loading.py`.

Each load is a process of its own that has imported everything, and whose files are not in the page cache. It loads the
model with transformers and reads one token, so that files which are mapped are read too. Dense and packed take turns;
the table has medians, and the median of the ratios. Memory is what the process holds more than before the load, pages
of mapped files included. SmolLM2-135M at 70 % (its files are float32), and a random Llama of 4 blocks 2048 wide in
bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from speedup import random_llama, smol

from atp_tune.cli.display import Display
from atp_tune.cli.terminal import quiet
from atp_tune.events import EventHandler
from atp_tune.folders.packing import pack_folder
from atp_tune.packed.layout import Kind
from atp_tune.utils.cache import cache_dir, folder_atomically

LOAD = "load"  # the word by which this file calls itself
Numbers = tuple[float, float]  # seconds, megabytes


def load(folder: Path) -> Numbers:
    """Loads a model and reads a token."""
    import torch
    from psutil import Process
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (imported on its first use else)

    import atp_tune.packed.modeling_atp_sparse  # noqa: F401

    evict(folder)
    before, began = Process().memory_info().rss, perf_counter()
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model(torch.tensor([[1]]))
    return perf_counter() - began, (Process().memory_info().rss - before) / 1e6  # while the model is still held


def evict(folder: Path) -> None:
    """Takes the files of a folder out of the page cache."""
    for file in folder.iterdir():
        number = os.open(file, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def in_process(folder: Path) -> Numbers:
    """The same in a new process."""
    command = [sys.executable, __file__, LOAD, str(folder)]
    seconds, megabytes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seconds, megabytes


def row(name: str, dense: Path, packed: Path, runs: int) -> str:
    """Both folders in turns."""
    pairs = [(in_process(dense), in_process(packed)) for _ in range(runs)]
    cells = [f"{median(pair[side][part] for pair in pairs):.{2 - part}f}" for part in (0, 1) for side in (0, 1)]
    ratios = [f"{median(pair[1][part] / pair[0][part] for pair in pairs):.2f}" for part in (0, 1)]
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    share = size / sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    return f"| {name} | {share:.2f} | {' | '.join(cells[:2])} | {ratios[0]} | {' | '.join(cells[2:])} | {ratios[1]} |"


def packed_of(dense: Path, kind: Kind, watch: EventHandler) -> Path:
    """The folder, packed once into the cache."""
    out = dense.with_name(f"{dense.name}-packed-{kind}")
    if not out.is_dir():
        pack_folder(dense, out, kind, watch=watch)
    return out


def main() -> None:
    """Prints the table."""
    if sys.argv[1:2] == [LOAD]:
        with quiet():
            print(json.dumps(load(Path(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with quiet(), Display() as display:
        smol(70, display)
        wide = cache_dir("sparse") / "wide-70-bf16"
        if not wide.is_dir():
            with folder_atomically(wide) as made:
                random_llama(0.7).bfloat16().save_pretrained(made)
        folders: list[tuple[str, Path, Kind]] = [
            ("SmolLM2-135M, float32", cache_dir("sparse") / "smol-70", "same"),
            ("the same, values bf16", cache_dir("sparse") / "smol-70", "bf16"),
            ("2048 wide, bfloat16", wide, "same"),
            ("the same, values int8", wide, "int8"),
        ]
        pairs = [(name, dense, packed_of(dense, kind, display)) for name, dense, kind in folders]
    print("| 70 % zeros | bytes | dense s | packed s | ratio | dense MB | packed MB | ratio |\n" + "|---" * 8 + "|")
    for name, dense, packed in pairs:
        print(row(name, dense, packed, runs), flush=True)


if __name__ == "__main__":
    main()
