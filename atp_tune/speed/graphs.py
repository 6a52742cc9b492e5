"""A Llama-shaped model as two ONNX graphs: `prefill` takes the whole prompt, `decode` one token and what came before.

Shapes are fixed. Names are DeepSparse's: input_ids, attention_mask, positions, causal_mask, past_key_values.I.key and
.value go in; logits, present.I.key and .value come out.
"""

import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atp_tune.errors import UserError
from atp_tune.metrics.speed import PHASES, Phase
from atp_tune.speed.decoder import Decoder
from atp_tune.speed.throughput import Task

OPSET = 14  # the newest that DeepSparse reads
NAMES = ("input_ids", "attention_mask", "positions", "causal_mask")


def check_onnx() -> None:
    """UserError where the exporter's library is not installed."""
    if find_spec("onnx") is None:
        raise UserError("--engine deepsparse: onnx is not installed; run: pip install 'atp-tune[speed]'")


def capacity(task: Task) -> int:
    """Positions of the decode graph: a power of two, since DeepSparse's own cache doubles and overruns any other."""
    return 1 << (task.tokens + task.steps).bit_length()


def export(model: Any, task: Task, folder: Path) -> Mapping[Phase, Path]:
    """Writes both graphs of a model in float32; UserError for a model that is not Llama-shaped."""
    decoder = Decoder(model, capacity(task)).eval()
    shapes: dict[Phase, tuple[int, int]] = {"prefill": (task.tokens, task.tokens), "decode": (1, capacity(task))}
    paths = {phase: folder / f"{phase}.onnx" for phase in PHASES}
    for phase, (tokens, positions) in shapes.items():
        _export(decoder, list(example(decoder, tokens, positions)), paths[phase])
    return paths


def example(decoder: Decoder, tokens: int, positions: int) -> Iterator[Tensor]:
    """Inputs of a graph in its order; what came before is zeros."""
    yield torch.zeros(1, tokens, dtype=torch.int64)
    yield torch.ones(1, positions, dtype=torch.int64)
    yield torch.arange(positions - tokens, positions)[None]
    yield torch.ones(tokens, positions, dtype=torch.int64).tril(positions - tokens)[None, None]
    if positions > tokens:
        for _ in range(2 * len(decoder.inner.layers)):
            yield torch.zeros(1, decoder.heads, positions - tokens, decoder.width)


@torch.no_grad()
def _export(decoder: Decoder, inputs: list[Tensor], path: Path) -> None:
    kept = [f"{block}.{kind}" for block in range(len(decoder.inner.layers)) for kind in ("key", "value")]
    past = [f"past_key_values.{name}" for name in kept] if len(inputs) > len(NAMES) else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter is the old one; DeepSparse needs it
        torch.onnx.export(
            decoder, tuple(inputs), str(path), dynamo=False, opset_version=OPSET, input_names=[*NAMES, *past],
            output_names=["logits", *(f"present.{name}" for name in kept)],
        )  # fmt: skip
