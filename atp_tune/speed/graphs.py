"""A Llama-shaped model as two ONNX graphs: `prefill` takes the prompt, `decode` one token and the cached ones.

Shapes are fixed. Names are DeepSparse's: inputs input_ids, attention_mask, positions, causal_mask,
past_key_values.I.key and .value; outputs logits, present.I.key and .value. The inputs are T tokens at the end of a
sequence of S positions; keys and values of the S - T before them come from the cache.

Embedding, norms, linears, MLP and head are the model's own modules. Attention is written here, with keys and values as
inputs and outputs. Each key/value head is repeated for all query heads that share it: the result is the same, and
DeepSparse's own cache crashes otherwise.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atp_tune.errors import UserError
from atp_tune.extras import require
from atp_tune.metrics.speed import PHASES, Phase
from atp_tune.speed.throughput import Workload

OPSET = 14  # the newest that DeepSparse reads
NAMES = ("input_ids", "attention_mask", "positions", "causal_mask")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAR = 1e9  # subtracted from scores of masked positions


class Decoder(nn.Module):
    """Logits [1, 1, words] of the last token, then keys and values [1, heads, S, width] of each block."""

    def __init__(self, model: Any, positions: int) -> None:
        """`model`: of transformers; `positions`: length of the table of rotary embeddings."""
        super().__init__()
        check_family(model.config, positions)
        self.inner, self.head = model.model, model.lm_head
        config = model.config
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads = int(config.num_attention_heads)
        cos, sin = self.inner.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
        self.register_buffer("cos", cos[0], persistent=False)  # [positions, width]
        self.register_buffer("sin", sin[0], persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, causal_mask: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Integers [1, T], [1, S], [1, T], [1, 1, T, S]: masks are 0 and 1; `past`: [1, heads, S - T, width] each."""
        states = self.inner.embed_tokens(input_ids)
        turn = self.cos[positions][:, None], self.sin[positions][:, None]  # type: ignore[index]
        hidden = (1.0 - (causal_mask * attention_mask[:, None, None]).to(states.dtype)) * -FAR
        present: list[Tensor] = []
        for index, block in enumerate(self.inner.layers):
            inputs = block.input_layernorm(states)
            query, key, value = self._project(block.self_attn, inputs, turn)
            if past:
                key = torch.cat((past[2 * index], key), 2)
                value = torch.cat((past[2 * index + 1], value), 2)
            present += [key, value]
            scores = query @ key.transpose(2, 3) * self.width**-0.5 + hidden
            seen = scores.softmax(-1) @ value
            states = states + block.self_attn.o_proj(seen.transpose(1, 2).flatten(2))
            states = states + block.mlp(block.post_attention_layernorm(states))
        return self.head(self.inner.norm(states)[:, -1:]), *present

    def _project(self, attention: Any, inputs: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [1, heads, T, width], with rotary embedding."""
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (projection(inputs).unflatten(-1, (-1, self.width)) for projection in projections)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        key, value = self._repeat(rotate(key, *turn)), self._repeat(value)
        return rotate(query, *turn), key, value

    def _repeat(self, shared: Tensor) -> Tensor:
        """[1, key/value heads, T, width] → [1, heads, T, width]."""
        _, few, tokens, width = shared.shape
        if few == self.heads:
            return shared
        return shared[:, :, None].expand(-1, -1, self.heads // few, -1, -1).reshape(1, self.heads, tokens, width)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: rotates pairs of a head's first and second half by the angle of the position."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


def check_family(config: Any, positions: int) -> None:
    """UserError for a model that is not Llama-shaped, or whose sliding window is shorter than the sequence."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"--engine deepsparse: {config.model_type} is not exported, only {', '.join(FAMILIES)}; "
            "--engine torch measures any model"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < positions:
        raise UserError(f"--tokens: {positions} positions are more than the model's sliding window of {window}")


def check_onnx() -> None:
    """UserError if onnx is not installed."""
    require("speed", "--engine deepsparse", "onnx")


def capacity(task: Workload) -> int:
    """Positions of the decode graph: a power of two, since DeepSparse's cache doubles in size and overruns others."""
    return 1 << (task.tokens + task.steps).bit_length()


def export(model: Any, task: Workload, folder: Path) -> Mapping[Phase, Path]:
    """Writes both graphs of a model in float32; UserError for a model that is not Llama-shaped."""
    decoder = Decoder(model, capacity(task)).eval()
    shapes: dict[Phase, tuple[int, int]] = {"prefill": (task.tokens, task.tokens), "decode": (1, capacity(task))}
    paths = {phase: folder / f"{phase}.onnx" for phase in PHASES}
    for phase, (tokens, positions) in shapes.items():
        _export(decoder, list(example(decoder, tokens, positions)), paths[phase])
    return paths


def example(decoder: Decoder, tokens: int, positions: int) -> Iterator[Tensor]:
    """Example inputs of a graph in its order; cached keys and values are zeros."""
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
        warnings.simplefilter("ignore")  # it is deprecated, but DeepSparse reads no graph of the new one
        torch.onnx.export(
            decoder, tuple(inputs), str(path), dynamo=False, opset_version=OPSET, input_names=[*NAMES, *past],
            output_names=["logits", *(f"present.{name}" for name in kept)],
        )  # fmt: skip
