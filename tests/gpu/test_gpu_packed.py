"""Packed models on a GPU by their Triton kernels; on a CPU those stand in the place of the CPU's, interpreted."""

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY
from test_packed_gpu import SHAPES, check_codes, check_floats
from tinystudy import quiet
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from atp_tune.folders import speed
from atp_tune.folders.packing import pack_folder
from atp_tune.folders.speed import Workload
from atp_tune.metrics import GRAPH, SIDES
from atp_tune.packed import gpu, kernel
from atp_tune.packed.kernel import kernel_name

pytestmark = pytest.mark.gpu


@pytest.fixture
def runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("a CPU needs TRITON_INTERPRET=1")
        monkeypatch.setattr(kernel, "PackedMatrix", gpu.GpuMatrix)
    return device


@pytest.mark.parametrize("shape", [*SHAPES[1:3], (70, 576), (4096, 4096), (1000, 11008)])
def test_the_kernels(shape: tuple[int, int], runs: torch.device) -> None:
    if runs.type == "cpu" and shape[0] * shape[1] > 50000:
        pytest.skip("the interpreter is slow")
    check_floats(shape, 0.3, torch.bfloat16, runs)
    if shape[1] % 64 == 0:
        check_codes(shape, 2, runs)


def test_the_kernels_are_what_a_gpu_takes(runs: torch.device) -> None:
    assert gpu.has_kernel(runs)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Llama with zeros in bfloat16, and the same packed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **sizes)).bfloat16()
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if name.endswith("proj.weight"):
                weight[torch.rand_like(weight) < 0.7] = 0
    model.save_pretrained(tmp_path / "dense")
    pack_folder(tmp_path / "dense", tmp_path / "packed")
    return tmp_path / "dense", tmp_path / "packed"


def test_a_packed_model(folders: tuple[Path, Path], runs: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 1, 5 and 40 tokens, each of them by the kernels, and generation, against the unpacked weights."""
    used, product = [], gpu.GpuMatrix.product
    monkeypatch.setattr(gpu.GpuMatrix, "product", lambda self, x: used.append(len(x)) or product(self, x))
    dense, packed = (AutoModelForCausalLM.from_pretrained(folder).to(runs).eval() for folder in folders)
    with torch.inference_mode():
        for tokens in (1, 5, 40):
            ids = torch.randint(VOCABULARY, (1, tokens), device=runs)
            assert_close(packed(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
        assert {1, 5, 40} <= set(used)
        assert packed.generate(ids, max_new_tokens=1, do_sample=False).shape == (1, 41)


def test_the_operator(device: torch.device, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as one graph, which captures the kernels; read as in a checkout, whose kernel for CPUs is not built."""
    monkeypatch.setenv("ATP_TUNE_ISA", "torch")
    packed: Any = AutoModelForCausalLM.from_pretrained(folders[1])
    monkeypatch.delenv("ATP_TUNE_ISA")
    if device.type == "cpu" and kernel_name() is None:
        pytest.skip("needs a kernel")
    linear, x = packed.to(device).eval().model.layers[0].mlp.up_proj, torch.randn(1, 3, 64, device=device).bfloat16()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    with torch.inference_mode():
        assert_close(torch.compile(linear, fullgraph=True, backend=backend)(x), linear(x))


def test_a_token_in_a_cuda_graph(device: torch.device, folders: tuple[Path, Path]) -> None:
    """As `speedup` decodes, dense and packed; on a CPU compiled, but by no compiler that records graphs."""
    if device.type == "cpu" and kernel_name() is None:
        pytest.skip("needs a kernel")
    dense, sparse = (AutoModelForCausalLM.from_pretrained(folder).to(device).eval() for folder in folders)
    models: Any = {"dense": dense, "sparse": sparse}
    compiler: Any = speed.COMPILER if device.type == "cuda" else {"backend": "aot_eager"}
    about = speed.about_torch("packed", torch.bfloat16, device)
    ids = torch.randint(VOCABULARY, (1, 12), device=device)
    with quiet(), closing(speed.Eager(about, models, ids, Workload(tokens=8, steps=4), compiler)) as engine:
        assert engine.phases[-1] == GRAPH
        assert all(engine.seconds(side, GRAPH) > 0 for side in SIDES)
