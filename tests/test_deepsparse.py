"""examples/deepsparse: its graphs are the models, and the example runs."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from expect import parametrize, slow
from tinystudy import HANGS, CommandLine, settings
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from atp_tune.folders.speed import Workload
from atp_tune.utils.system import cpu_flags

SCRIPT = Path(__file__).parents[1] / "examples" / "deepsparse" / "speed.py"
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, not shared": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "llama, scaled positions": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    ),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("deepsparse_speed", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases are 1 and 0 in a new model
                parameter.normal_(1 if "norm" in name else 0, 0.3)
    return model


@slow
@parametrize("phase", ["prefill", "decode"])
def test_the_graphs_are_the_model(phase: str, script: ModuleType, tmp_path: Path) -> None:
    """Computed by onnx's own reference, with the names and shapes that DeepSparse looks for."""
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    model, task = random_model("llama"), Workload(tokens=5, steps=2)
    graph = load(script.export(model, task, tmp_path)[phase])
    kept = [f"{block}.{kind}" for block in range(2) for kind in ("key", "value")]
    past = [f"past_key_values.{name}" for name in kept] if phase == "decode" else []
    assert [one.name for one in graph.graph.input] == [*script.NAMES, *past]
    assert [one.name for one in graph.graph.output] == ["logits", *(f"present.{name}" for name in kept)]
    assert [one.version for one in graph.opset_import if not one.domain] == [14]
    tokens, positions = (5, 5) if phase == "prefill" else (1, 8)  # 5 + 2 tokens, and one that is left out
    decoder = script.Decoder(model, positions)
    given = [tensor.numpy() for tensor in script.example(decoder, tokens, positions)]
    found = ReferenceEvaluator(graph).run(None, dict(zip([*script.NAMES, *past], given, strict=True)))
    with torch.no_grad():
        wanted = decoder(*map(torch.from_numpy, given))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)
    assert found[0].shape == (1, 1, 64)


@slow
@pytest.mark.skipif("avx2" not in cpu_flags(), reason="DeepSparse needs AVX2")
def test_the_example_runs(done: Path, command: CommandLine, cache: Path) -> None:
    """Installed as a user does; a tiny Llama at 70 %, whose logits agree, and a process that dies.

    40 tokens and 32: at the 65th its cache grows, and it would overrun positions that are no power of two.
    """
    out = done.parent / "sparse"
    command("prune", "--study", done / "tiny.toml", "--beta", 0, *settings("sparsity=0.7"), "--out", out)

    def run() -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, str(SCRIPT), str(out), "--tokens", "40", "--runs", "2"]
        return subprocess.run(words, capture_output=True, text=True, timeout=HANGS, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "proprietary" in first.stdout and "| deepsparse, float32 | decode" in first.stdout
    assert (
        "deepsparse, float32: version 1.8.0 on " in first.stdout
        and "; logits are transformers' within " in first.stdout
    )
    assert [file.name for file in (cache / "engines").iterdir()] == ["deepsparse-1.8.0"]  # no graphs are left
    (package,) = (cache / "engines" / "deepsparse-1.8.0" / "lib").glob("python3.*/site-packages/deepsparse")
    (package / "engine.py").unlink()
    second = run()
    assert second.returncode == 1 and second.stderr.startswith("error: the process of DeepSparse has ended: ")
