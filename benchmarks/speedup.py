"""What zeros are worth in packed folders and torch: the tables of docs/speedup.md, on an idle machine.

    python benchmarks/speedup.py                         packed; goes on where it was stopped; 10 minutes on 2 cores
    OMP_NUM_THREADS=1 python benchmarks/speedup.py       the same on one core, as lines of their own
    python benchmarks/speedup.py --batch 4               four texts at once, as lines of their own
    python benchmarks/speedup.py --large                 16 blocks of width 2048, 4 of 4096; 12 GB of memory, 40 of disk
    python benchmarks/speedup.py --only 70 --tokens 512 --steps 64   longer texts at one sparsity, as lines of their own
    ATP_TUNE_ISA=avx2 python benchmarks/speedup.py       by another kernel than the processor's best, likewise
    python benchmarks/speedup.py --show                  measures nothing, writes the tables of the runs that are there
    python benchmarks/speedup.py --csr                   CSR matrices of torch and scipy against dense ones; a minute

SmolLM2-135M, Wanda, uniform, at 50 to 80 %, and a random Llama 2048 wide whose zeros stand anywhere. Each line of
docs/speedup/runs.jsonl is a model on a CPU: what `tune.py speedup` would keep, all runs in it. The tables are written
between the marks in docs/speedup.md.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from operator import matmul
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from marked_page import write_between
from scipy.sparse import csr_array
from transformers import LlamaConfig, LlamaForCausalLM

from atp_tune.api.pruning import prune_study
from atp_tune.cli.display import Display
from atp_tune.cli.terminal import markdown, quiet
from atp_tune.config.best import read_config
from atp_tune.config.studyfile import load
from atp_tune.events import EventHandler, Place
from atp_tune.folders.card import ABOUT
from atp_tune.folders.speed import Pair, Workload, find_pair, measure
from atp_tune.metrics import Measured, Phase, Rates, Speed
from atp_tune.utils.cache import cache_dir, folder_atomically
from atp_tune.utils.system import cpu_name

ROOT = Path(__file__).parents[1]
RUNS, PAGE = ROOT / "docs" / "speedup" / "runs.jsonl", ROOT / "docs" / "speedup.md"
MARKS = ("<!-- measured: python benchmarks/speedup.py -->", "<!-- end -->")
WIDE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 2048,
}  # fmt: skip
LARGE = {
    "16 blocks of width 2048": {**WIDE, "num_hidden_layers": 16},
    "4 blocks of width 4096": {**WIDE, "hidden_size": 4096, "intermediate_size": 11008},
}
ISA = "ATP_TUNE_ISA"
CSR = (5632, 2048)  # [out, in] of the linear that is multiplied by CSR


Models = dict[str, Callable[[int, EventHandler], Pair]]  # by name: what makes one of a percentage of zeros


def main() -> None:
    """Measures what is missing, then writes the tables."""
    options = parse()
    if options.csr:
        print("\n".join(csr()))
        return
    with quiet(), Display() as display:
        task = Workload(options.tokens, options.steps, options.runs, options.batch)
        for name, make in () if options.show else lines(options):
            if (name, cpu_name()) not in known():
                keep(name, measure(make(display), "packed", task, "cpu", display))
    write_between(PAGE, MARKS, tables())
    print(tables())


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--csr", action="store_true")
    parser.add_argument("--tokens", type=int, default=Workload.tokens)
    parser.add_argument("--steps", type=int, default=Workload.steps)
    parser.add_argument("--only", type=int, metavar="PERCENT")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--large", action="store_true")
    return parser.parse_args()


def lines(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[EventHandler], Pair]]]:
    """Name of each model, and what makes it."""
    after = of_runs(options)
    small: Models = {"SmolLM2-135M": smol, "random Llama, 4 blocks of width 2048": partial(wide, WIDE)}
    large: Models = {f"random Llama, {name}": partial(wide, shape) for name, shape in LARGE.items()}
    for name, make in (large if options.large else small).items():
        for percent in (options.only,) if options.only else (70,) if options.batch > 1 else (70, 80, 60, 50):
            yield f"{name}, {percent} %, {after}", partial(make, percent)


def of_runs(options: argparse.Namespace) -> str:
    """How a model is run, where that is told by the names of lines."""
    parts = [f"threads: {torch.get_num_threads()}", "packed"]
    if (options.tokens, options.steps) != (Workload.tokens, Workload.steps):
        parts.append(f"{options.tokens} + {options.steps} tokens")
    if isa := os.environ.get(ISA):
        parts.append(f"kernel {isa}")
    if options.batch > 1:
        parts.append(f"batch {options.batch}")
    return ", ".join(parts)


def smol(percent: int, watch: EventHandler) -> Pair:
    """SmolLM2-135M by Wanda with the same sparsity everywhere."""
    out = cache_dir("sparse") / f"smol-{percent}"
    if not out.is_dir():
        prune_study(load("smol-60", [f"sparsity={percent / 100}"]), {"beta": 0.0}, out, watch)
    config = read_config(out / ABOUT)
    return find_pair(config, out, Place(out / config.folder, "cpu", watch=watch))


def wide(shape: Mapping[str, int], percent: int, watch: EventHandler) -> Pair:
    """A random Llama, and the same with zeros anywhere in its linears."""
    name = f"wide-{shape['hidden_size']}-{shape['num_hidden_layers']}"
    folders = {share: cache_dir("sparse") / f"{name}-{share}" for share in (0, percent)}
    for share, folder in folders.items():
        if not folder.is_dir():
            with folder_atomically(folder) as made:
                random_llama(share / 100, shape).save_pretrained(made)
    return Pair(folders[0], folders[percent])


@torch.no_grad()
def random_llama(sparsity: float, shape: Mapping[str, int] = WIDE) -> LlamaForCausalLM:
    """The same numbers each time, but for those that are zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(dict(shape)))
    for name, weight in model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            weight.masked_fill_(torch.rand_like(weight) < sparsity, 0)  # no product, which makes zeros negative
    return model


def keep(name: str, found: Speed) -> None:
    """Adds a line to the runs."""
    RUNS.parent.mkdir(exist_ok=True)
    line = {"model": name, "date": str(date.today()), "speed": found.model_dump(mode="json")}
    with RUNS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def known() -> dict[tuple[str, str], Speed]:
    """What has been measured, by the name of the model and of the CPU."""
    text = RUNS.read_text(encoding="utf-8") if RUNS.exists() else ""
    lines = [(line["model"], Speed.model_validate(line["speed"])) for line in map(json.loads, text.splitlines())]
    return {(name, found.engines[0].device): found for name, found in lines}


def tables() -> str:
    """A table for each CPU: a row for each model and engine that is not torch's, which every row is compared with."""
    parts: list[str] = []
    for cpu in dict.fromkeys(cpu for _, cpu in known()):
        measured = [(name, found) for (name, there), found in known().items() if there == cpu]
        rows = [
            (
                name.replace(", threads: 2", "").replace(", packed", ""),
                row.name,
                *(cell(found, row, phase, rates) for phase, rates in row.rates.items()),
            )
            for name, found in measured
            for row in found.engines
            if row.engine != "torch"
        ]
        parts += [f"### {cpu}", markdown(("model", "engine", "prefill", "decode"), rows)]
    return "\n\n".join(parts)


def cell(found: Speed, row: Measured, phase: Phase, rates: Rates) -> str:
    """Tokens per second of the sparse model, over the engine's own dense model, and over torch's best."""
    return f"{median(rates.sparse):.1f} ({median(rates.ratios):.2f}×, {found.over_torch(row, phase):.2f}×)"


def csr() -> Iterator[str]:
    """One linear as a dense and as a CSR matrix, in turns; in brackets how many times as fast as dense."""
    yield f"{CSR[0]} × {CSR[1]}, float32, {cpu_name()}, {torch.get_num_threads()} threads, milliseconds, medians"
    yield "\n| zeros | tokens | torch dense | torch CSR | scipy CSR |\n|---|---|---|---|---|"
    for zeros in (0.5, 0.7, 0.9):
        weight = torch.randn(CSR) * (torch.rand(CSR) >= zeros)
        packed = weight.to_sparse_csr()
        for tokens in (1, 512):
            x = torch.randn(CSR[1], tokens)
            other, y = csr_array(weight.numpy()), x.numpy()
            ways = [partial(torch.mm, weight, x), partial(torch.mm, packed, x), partial(matmul, other, y)]
            dense, *sparse = milliseconds(ways)
            cells = (f"{own:.2f} ({dense / own:.2f}×)" for own in sparse)
            yield f"| {zeros:.0%} | {tokens} | {dense:.2f} | {' | '.join(cells)} |"


def milliseconds(ways: Sequence[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Median of each way; they take turns, and the first round is not counted."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, own in zip(ways, taken, strict=True):
            began = perf_counter()
            way()
            own.append(1000 * (perf_counter() - began))
    return [median(own[1:]) for own in taken]


if __name__ == "__main__":
    main()
