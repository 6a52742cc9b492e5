"""Seconds of one trial by phase against the floor: its multiplications at the rate at which this machine does them.

    python benchmarks/trial_cost.py                 SmolLM2-135M with Wanda and SparseGPT, every way of statistics
    python benchmarks/trial_cost.py --growth        0.5 to 4 times the tokens, and 6, 12 and 30 blocks
    python benchmarks/trial_cost.py --proportions   one calibration pass against two, by the sizes of the two texts

The floor is the matrix products that a trial cannot do without, done alone: each block's linears on each token that
passes them, scores and values of attention, and the head, in the shapes, number format and batches of the trial. What a
trial takes beyond it is masks, norms, rotations, activations, NLLs and the interpreter. Floor and trial are measured in
turn; ratios are medians of pairs.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import cache
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.events import ignore_events
from atp_tune.inputs.windows import Windows
from atp_tune.plan import make_plan
from atp_tune.run.session import Session, Setup
from atp_tune.scores.next_token import POSITIONS
from atp_tune.search.objective import Record
from atp_tune.spec.prune import PruneConfig
from atp_tune.spec.studyfile import load

Batches = list[tuple[int, int]]  # windows and tokens of each
PAIRS = 5
BETA = 0.006


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = perf_counter()
    call()
    return perf_counter() - began


class Floor:
    """The matrix products of a trial and nothing else, block by block with each block's own weights."""

    def __init__(self, context: Session) -> None:
        config = context.checkpoint.config
        self.context, self.dtype = context, context.checkpoint.dtype
        self.heads, self.width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.head = torch.randn(config.vocab_size, config.hidden_size).to(self.dtype)

    def seconds(self, statistics: str) -> float:
        """Seconds of a trial: calibration as the statistics say, search, head."""
        measuring, running = {"block": (1, 1), "sequential": (0, 1), "dense": (0, 0)}[statistics]
        texts = self._batches("calibration"), self._batches("validation")
        return seconds_of(lambda: self._multiply(*texts, measuring, running))

    def _batches(self, role: str) -> list[tuple[int, int]]:
        """Windows and tokens of each batch."""
        windows, tokens = self.context.items(role).shape
        size = self.context.batch(role).windows
        return [(min(size, windows - start), tokens) for start in range(0, windows, size)]

    def _multiply(self, calibration: Batches, search: Batches, measuring: int, running: int) -> None:
        for index, linears in enumerate(self.context.checkpoint.linears):
            weights = [linear.matrix(self.context.checkpoint.weights(index)[linear.key]) for linear in linears]
            for batches, used in (
                (measuring * calibration, weights[:-1]),
                (running * calibration, weights),
                (search, weights),
            ):
                for windows, tokens in batches:
                    q = self._random((windows, self.heads, tokens, self.width))
                    scaled_dot_product_attention(q, q, q, is_causal=True)
                    for weight in used:
                        linear(self._random((windows * tokens, weight.shape[1])), weight)
        for windows, tokens in search:
            for start in range(0, tokens - 1, POSITIONS):
                rows = windows * min(POSITIONS, tokens - 1 - start)
                linear(self._random((rows, self.head.shape[1])), self.head)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        """The same numbers each time: drawing them is no product."""
        return _random(shape, self.dtype)


@cache
def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@torch.inference_mode()
def trial(context: Session, pruner: str) -> dict[str, float]:
    """Seconds of one trial by phase."""
    record = Record(context)
    plan = make_plan(pruner, "atp", context.budget(0.6), {"beta": BETA})
    context.all_nlls(record.follow(context.prune(plan)), "validation")
    seconds: dict[str, float] = record.close()["seconds"]
    return seconds


def compare(context: Session, pruner: str, statistics_: str, title: str) -> float:
    """Prints a row, and gives the median seconds."""
    way = context.prune_settings.model_copy(update={"statistics": statistics_})
    context.prune_settings = way
    floor, ratios, rows = Floor(context), [], []
    trial(context, pruner)
    with torch.inference_mode():
        for _ in range(PAIRS):
            least, row = floor.seconds(statistics_), trial(context, pruner)
            rows.append(row)
            ratios.append(sum(row.values()) / least)
    seconds = [statistics.median(row[phase] for row in rows) for phase in ("calibrate", "prune", "evaluate")]
    total = statistics.median(sum(row.values()) for row in rows)
    cells = " | ".join(f"{value:.2f}" for value in (*seconds, total, total / statistics.median(ratios)))
    print(f"| {title} | {cells} | {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |", flush=True)
    return total


def smol() -> Session:
    """The context of the study smol-60."""
    file = load("smol-60")
    texts = {"calibration": file.study.data.calibration, "validation": file.study.data.validation}
    return Session.open(Setup(file.study.model, file.study.prune, texts, file.folder, "cpu"))


def proportion(context: Session, calibration: int, search: int) -> None:
    """Prints a row: both ways of statistics with texts of so many thousand tokens, in turn."""
    pairs = []
    sized = resized(context, {"calibration": 1024 * calibration, "validation": 1024 * search}, 30)
    for _ in range(PAIRS + 1):
        pair = []
        for way in ("block", "sequential"):
            sized.prune_settings = sized.prune_settings.model_copy(update={"statistics": way})
            pair.append(sum(trial(sized, "wanda").values()))
        pairs.append(pair)
    block, sequential = (statistics.median(pair[k] for pair in pairs[1:]) for k in (0, 1))
    ratios = sorted(pair[1] / pair[0] for pair in pairs[1:])
    shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
    print(f"| {1024 * calibration:,} | {1024 * search:,} | {block:.2f} | {sequential:.2f} | {shown} |", flush=True)


def windows_of(context: Session) -> dict[str, Windows]:
    """The texts of a language model."""
    return {role: windows for role, windows in context.windows.items() if isinstance(windows, Windows)}


def resized(context: Session, tokens: dict[str, int], blocks: int) -> Session:
    """A random model of the same shape with fewer blocks, and texts of another length."""
    config = AutoConfig.from_pretrained(context.folder.path, num_hidden_layers=blocks)
    model = AutoModelForCausalLM.from_config(config, dtype=context.checkpoint.dtype)  # type: ignore[no-untyped-call]
    texts = {}
    for role, windows in windows_of(context).items():
        count = tokens[role] // windows.ids.shape[1]
        texts[role] = Windows(np.resize(windows.ids, (count, windows.ids.shape[1])), role)
    return Session(context.folder, Checkpoint(model, context.checkpoint.device), texts, PruneConfig(), ignore_events)


def main() -> None:
    """Prints the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="more tokens, more blocks")
    parser.add_argument("--proportions", action="store_true", help="block and sequential, by the sizes of the texts")
    asked = parser.parse_args()
    context = smol()
    batches = " and ".join(str(context.batch(role).windows) for role in ("calibration", "validation"))
    print(f"{torch.get_num_threads()} threads, {context.dtype}, batches of {batches} windows\n")
    if asked.proportions:
        print("| calibration tokens | search tokens | block s | sequential s | ratio |\n|---|---|---|---|---|")
        for calibration, search in ((2, 4), (4, 5), (4, 4), (4, 2), (8, 2), (16, 2)):
            proportion(context, calibration, search)
        return
    print("| trial | calibrate s | prune s | evaluate s | all s | floor s | times the floor |")
    print("|---|---|---|---|---|---|---|")
    if asked.growth:
        for tokens, blocks in ((0.5, 30), (1, 30), (2, 30), (4, 30), (1, 6), (1, 12)):
            sizes = {role: int(windows.ids.size * tokens) for role, windows in windows_of(context).items()}
            compare(resized(context, sizes, blocks), "wanda", "block", f"{tokens:g}× tokens, {blocks} blocks")
        return
    for pruner, way in (
        ("wanda", "block"), ("wanda", "sequential"), ("wanda", "dense"), ("magnitude", "block"),
        ("sparsegpt", "block"), ("sparsegpt", "sequential"),
    ):  # fmt: skip
        compare(context, pruner, way, f"{pruner}, {way}")


if __name__ == "__main__":
    main()
