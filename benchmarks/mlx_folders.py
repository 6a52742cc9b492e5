r"""KL of a folder for mlx-lm beside mlx-lm's own ways at the same bits, on kinds of text that calibration never saw.

    python tune.py FOLDER --format mlx --bpw 5 --preset quick --texts mixed --out OURS \
        --set 'texts.calibration.source="mixed:manual,debates"' --set 'texts.validation.source="mixed:manual,debates"'
    python benchmarks/mlx_folders.py FOLDER OURS

FOLDER is the dense model. Theirs: `mlx_lm.convert` with 4 bits in groups of 32, which is 5 bits a weight with scales,
and `mlx_lm.dynamic_quant` with 4 and 5 bits in groups of 64: the gradient of the KL at 4 bits times what 5 bits change,
a weight; the linears where that is highest have 5 bits, within the bits of OURS. Embedding and head stay as they are,
in all. MLX rounds and reads; transformers computes, in float32: MLX takes 100 seconds for a gradient of one window on a
CPU.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import mlx.core as mx
import numpy as np
import torch
from gguf_types import PARTS, WINDOWS, compared, ratio, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from atp_tune.config.data import KINDS

SIZE, LOW, HIGH = 64, 4, 5  # weights of a group, and bits, of mlx_lm.dynamic_quant
SMALL = 32  # weights of a group of `mlx_lm.convert` at 4 bits
BATCH = 4  # windows whose gradient is taken at a time
Weights = Mapping[str, Tensor]  # of the linears of the blocks, by name


def main() -> None:
    """Prints a line for each way and kind of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("--calibration", default="mixed:manual,debates", help="a source of texts")
    parser.add_argument("--windows", type=int, default=12, help="of each kind that is measured")
    options = parser.parse_args()
    model = Model(options.dense)
    ours, bits = stored(options.ours, model.dense)
    text = windows(options.calibration, options.dense, WINDOWS, PARTS["calibration"])
    ways = {
        "atp_tune": ours,
        "mlx_lm.convert": {name: rounded(weight, LOW, SMALL) for name, weight in model.dense.items()},
        "mlx_lm.dynamic_quant": dynamic(model, text, bits),
    }
    print(f"{bits:.3f} bits a weight of linears in {options.ours}")
    for kind in [kind for kind in KINDS if kind not in options.calibration]:
        text = windows(f"mixed:{kind}", options.dense, options.windows)
        expected, first = [*model.logs({}, text)], list[float]()
        for way, weights in ways.items():
            found = compared(expected, [*model.logs(weights, text)], text)
            first = first or found["kl"]
            times = "" if weights is ours else f", of which ours is {ratio(first, found['kl'])}"
            print(f"{kind}, {way}: KL {fmean(found['kl']):.4f}{times}; same top {fmean(found['same']):.1%}")


class Model:
    """The dense model in float32, whose linears may have other weights."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found = (
            pair for pair in self._model.named_modules() if isinstance(pair[1], nn.Linear) and "layers." in pair[0]
        )
        self.dense = {f"{name}.weight": linear.weight.detach() for name, linear in found}

    def logs(self, weights: Weights, text: Tensor) -> Iterator[Tensor]:
        """Logarithms of the probabilities [tokens - 1, vocabulary] of each window."""
        for window in text:
            with torch.no_grad():
                yield self._call(weights, window[None])[0, :-1].log_softmax(-1)

    def _call(self, weights: Weights, ids: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(self._model, dict(weights), ids).logits
        return logits

    def gradients(self, weights: Weights, text: Tensor) -> Weights:
        """Gradients of the mean KL from the dense model, at these weights."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        for start in range(0, len(text), BATCH):
            ids = text[start : start + BATCH]
            dense = torch.cat([*self.logs({}, ids)])
            there = self._call(leaves, ids)[:, :-1].log_softmax(-1).flatten(0, 1)
            kl = nn.functional.kl_div(there, dense, log_target=True, reduction="batchmean")
            torch.autograd.backward(kl * len(ids) / len(text))
        return {name: weight.grad for name, weight in leaves.items() if weight.grad is not None}


def dynamic(model: Model, text: Tensor, bits: float) -> Weights:
    """The weights of `mlx_lm.dynamic_quant`, within so many bits a weight, scales included."""
    low, high = ({name: rounded(w, bits, SIZE) for name, w in model.dense.items()} for bits in (LOW, HIGH))
    slopes = model.gradients(low, text)
    gains = {name: float((slopes[name] * (low[name] - high[name])).mean()) for name in low}
    room = (bits - LOW - 2 * 16 / SIZE) * sum(weight.numel() for weight in low.values())
    chosen = dict(low)
    for name in sorted(gains, key=lambda name: -gains[name]):
        if (room := room - low[name].numel()) < 0:
            break
        chosen[name] = high[name]
    return chosen


def rounded(weight: Tensor, bits: int, size: int) -> Tensor:
    """A matrix as MLX rounds it."""
    codes, scales, offsets = mx.quantize(mx.array(weight.numpy()), bits=bits, group_size=size)
    return read(mx.dequantize(codes, scales, offsets, bits=bits, group_size=size))


def stored(folder: Path, dense: Weights) -> tuple[Weights, float]:
    """The linears of a folder for mlx-lm, and their bits a weight with scales and offsets of 16 bits."""
    about, found, total = json.loads((folder / "config.json").read_text())["quantization"], {}, 0.0
    parts: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        parts |= cast("dict[str, Any]", mx.load(str(file)))
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        own = about | (about.get(module) or {})
        bits, size = own["bits"], own["group_size"]
        codes, scales, offsets = (parts[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        found[name] = read(mx.dequantize(codes, scales, offsets, bits=bits, group_size=size))
        total += weight.numel() * (bits + 2 * 16 / size)
    return found, total / sum(weight.numel() for weight in dense.values())


def read(matrix: Any) -> Tensor:
    """A matrix of MLX in float32."""
    return torch.from_numpy(np.array(matrix.astype(mx.float32)))


if __name__ == "__main__":
    main()
