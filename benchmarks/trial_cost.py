"""Seconds of one trial by phase against the floor: its multiplications at the rate at which this machine does them.

    python benchmarks/trial_cost.py                 SmolLM2-135M with Wanda and SparseGPT, every way of statistics
    python benchmarks/trial_cost.py --growth        0.5 to 4 times the tokens, and 6, 12 and 30 blocks

The floor counts the matrix products that a trial cannot do without: each linear on each token that passes it, scores
and values of attention, and the head, each timed alone in the shapes, number format and batches of the trial. What a
trial takes beyond it is masks, norms, rotations, activations, softmax and the interpreter. Floor and trial are
measured in turn; ratios are medians of pairs.
"""

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from atp_tune.bench import GROUPS, Bench, Setup
from atp_tune.checkpoint import Checkpoint
from atp_tune.events import unwatched
from atp_tune.plan import make_plan
from atp_tune.record import Record
from atp_tune.study import Prune
from atp_tune.studyfile import load
from atp_tune.windows import Windows

PAIRS = 5
BETA = 0.006


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = perf_counter()
    call()
    return perf_counter() - began


class Floor:
    """Seconds of the matrix products of one batch of windows through a block, and of the head."""

    def __init__(self, bench: Bench) -> None:
        config = bench.checkpoint.config
        self.bench, self.dtype = bench, bench.checkpoint.dtype
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.shapes = [(x.in_features, x.out_features) for x in bench.checkpoint.linears[0]]
        self.head = config.hidden_size, config.vocab_size

    def seconds(self, statistics: str) -> float:
        """Seconds of a trial: calibration as the statistics say, search, head."""
        ids = self.bench._ids
        calibration = self._text(ids["calibration"], len(ids["calibration"]), self.shapes)
        measuring = self._text(ids["calibration"], len(ids["calibration"]), self.shapes[:-1])
        windows = len(ids["search"])
        group = -(-windows // min(GROUPS, -(-windows // self.bench.batch_windows)))
        search = self._text(ids["search"], group, self.shapes)
        passes = {"block": measuring + calibration, "sequential": calibration, "dense": 0.0}[statistics]
        blocks = len(self.bench.checkpoint.blocks)
        return blocks * (passes + search) + self._products(ids["search"].numel(), group * 256, [self.head])

    def _text(self, ids: Tensor, group: int, shapes: list[tuple[int, int]]) -> float:
        windows, tokens = ids.shape
        batch = min(self.bench.batch_windows, group)
        q = torch.randn(batch, self.heads, tokens, self.width, dtype=self.dtype)
        attention = min(seconds_of(lambda: scaled_dot_product_attention(q, q, q, is_causal=True)) for _ in range(3)) * (
            windows / batch
        )
        return attention + self._products(ids.numel(), batch * tokens, shapes)

    def _products(self, tokens: int, batch: int, shapes: list[tuple[int, int]]) -> float:
        total = 0.0
        for inputs, outputs in shapes:
            x, w = torch.randn(batch, inputs).to(self.dtype), torch.randn(outputs, inputs).to(self.dtype)
            total += min(seconds_of(lambda x=x, w=w: linear(x, w)) for _ in range(3)) * (tokens / batch)
        return total


@torch.inference_mode()
def trial(bench: Bench, pruner: str) -> dict[str, float]:
    """Seconds of one trial by phase."""
    record = Record(bench.checkpoint.device, bench.dtype)
    plan = make_plan(pruner, "atp", bench.budget(0.6), {"beta": BETA})
    bench.all_nlls(record.follow(bench.prune(plan), bench.checkpoint.sizes), "search")
    seconds: dict[str, float] = record.close()["seconds"]
    return seconds


def compare(bench: Bench, pruner: str, statistics_: str, title: str) -> float:
    """Prints a row, and gives the median seconds."""
    way = bench.prune_settings.model_copy(update={"statistics": statistics_})
    bench.prune_settings = way
    floor, ratios, rows = Floor(bench), [], []
    trial(bench, pruner)
    with torch.inference_mode():
        for _ in range(PAIRS):
            least, row = floor.seconds(statistics_), trial(bench, pruner)
            rows.append(row)
            ratios.append(sum(row.values()) / least)
    seconds = [statistics.median(row[phase] for row in rows) for phase in ("calibrate", "prune", "evaluate")]
    total = statistics.median(sum(row.values()) for row in rows)
    cells = " | ".join(f"{value:.2f}" for value in (*seconds, total, total / statistics.median(ratios)))
    print(f"| {title} | {cells} | {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |", flush=True)
    return total


def smol() -> Bench:
    """The bench of the study smol."""
    file = load("smol")
    texts = {"calibration": file.study.texts.calibration, "search": file.study.texts.search}
    return Bench.open(Setup(file.study.model, file.study.prune, texts, file.folder, "cpu"))


def resized(bench: Bench, tokens: float, blocks: int) -> Bench:
    """A random model of the same shape with fewer blocks, and texts of another length."""
    config = AutoConfig.from_pretrained(bench.folder.path, num_hidden_layers=blocks)
    model = AutoModelForCausalLM.from_config(config).to(bench.checkpoint.dtype)
    texts = {}
    for role, windows in bench.windows.items():
        count = int(len(windows.ids) * tokens)
        texts[role] = Windows(windows.ids.repeat(4, axis=0)[:count], role)
    return Bench(bench.folder, Checkpoint(model, bench.checkpoint.device), texts, Prune(), unwatched)


def main() -> None:
    """Prints the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="more tokens, more blocks")
    asked = parser.parse_args()
    bench = smol()
    print(f"{torch.get_num_threads()} threads, {bench.dtype}, batches of {bench.batch_windows} windows\n")
    print("| trial | calibrate s | prune s | evaluate s | all s | floor s | times the floor |")
    print("|---|---|---|---|---|---|---|")
    if asked.growth:
        for tokens, blocks in ((0.5, 30), (1, 30), (2, 30), (4, 30), (1, 6), (1, 12)):
            compare(resized(bench, tokens, blocks), "wanda", "block", f"{tokens:g}× tokens, {blocks} blocks")
        return
    for pruner, way in (
        ("wanda", "block"), ("wanda", "sequential"), ("wanda", "dense"), ("magnitude", "block"),
        ("sparsegpt", "block"), ("sparsegpt", "sequential"),
    ):  # fmt: skip
        compare(bench, pruner, way, f"{pruner}, {way}")


if __name__ == "__main__":
    main()
