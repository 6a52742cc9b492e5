"""Folders of rounded weights as other programs store them: `apply --format`, read by those programs themselves."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from expect import parametrize, slow
from naive import nlls_of
from safetensors.torch import load_file
from tinystudy import STUDY, CommandLine, copied, make_model, make_tokenizer, run
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from atp_tune.config.best import read_config
from atp_tune.inputs.windows import token_windows

ROUNDED = """
[quantize]
quantizers = ["gptq"]
group_size = {}
symmetric = {}
"""
# Asymmetric in groups, and symmetric in whole rows, of which some end within a word: group size, symmetry, inner width.
GROUPS = {"groups": (32, "false", 64), "rows": (-1, "true", 80)}

TURNS = {
    "rope_type": "linear",
    "factor": 2.0,
    "rope_theta": 5e5,
}  # by keys of transformers 5, which mlx-lm does not read


@pytest.fixture(scope="module", params=GROUPS)
def ran(request: pytest.FixtureRequest, tiny_place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished study of a model in several files, bits by linear; to be added to only."""
    with copied(tiny_place, tmp_path_factory) as place:
        (place / "model/model.safetensors").unlink()
        size, symmetric, inner = GROUPS[request.param]
        made = make_model(make_tokenizer(), 100, intermediate=inner)
        made.config.rope_parameters = TURNS
        made.save_pretrained(place / "model", max_shard_size="30KB")
        toml = STUDY.replace("sparsity = 0.6", 'bits = 3.5\nallocation = ["gradient"]').replace(
            "trials = 3", "trials = 4"
        )
        (place / "tiny.toml").write_text(toml + ROUNDED.format(size, symmetric))
        run(place)
        yield place


def integers(words: Tensor, bits: int, columns: int) -> Tensor:
    """Codes [rows, columns] out of words [rows, words], one bit after the other."""
    rows = (int.from_bytes(row.numpy().tobytes(), "little") for row in words.contiguous())
    return torch.tensor([[row >> bits * at & (1 << bits) - 1 for at in range(columns)] for row in rows])


def spread(groups: Tensor, columns: int) -> Tensor:
    return groups.float().repeat_interleave(columns // groups.shape[1], 1)


def compressed(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weights of a matrix of compressed-tensors, (q - z) Δ, which are equal to those of its own reader."""
    rows, columns = parts["weight_shape"].tolist()
    zeros = torch.full(parts["weight_scale"].shape, 2 ** (bits - 1))
    if (packed := parts.get("weight_zero_point")) is not None:
        zeros = integers(packed.T, bits, rows).T
    codes = integers(parts["weight_packed"], bits, columns)
    weights = (codes - spread(zeros, columns)) * spread(parts["weight_scale"], columns)
    library = import_module("compressed_tensors.quantization")
    group = columns // zeros.shape[1]
    form: dict[str, Any] = {"num_bits": bits, "symmetric": packed is None}
    form |= {"strategy": "channel"} if group == columns and packed is None else {"group_size": group}
    scheme = library.QuantizationScheme(targets=[], weights=library.QuantizationArgs(**form))
    reader = import_module("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    theirs = reader.decompress(dict(parts), scheme)["weight"]
    assert torch.equal(theirs, weights.to(theirs.dtype))
    return weights


def affine(parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """The weights of a matrix of MLX, q Δ + o."""
    columns = parts["weight"].shape[1] * 32 // bits
    scales, offsets = (spread(parts[name], columns) for name in ("scales", "biases"))
    return integers(parts["weight"].view(torch.int32), bits, columns) * scales + offsets


READ = {"compressed-tensors": compressed, "mlx": affine}


def as_computed(engine: str, out: Path, plain: Path) -> Any:
    """The model that a folder for an engine says, by a naive reader.

    Its codes are those of the folder `plain` of floats; scales differ by bfloat16's rounding, and nothing else does.
    """
    tensors = {name: part for file in out.glob("*.safetensors") for name, part in load_file(file).items()}
    model: Any = AutoModelForCausalLM.from_pretrained(plain)
    best = read_config(out / "atp_tune.json")
    assert best.linears is not None
    for block, names in enumerate(best.linears):
        for linear, level in zip(names, best.plan.of(block, len(names)), strict=True):
            name, bits = f"model.layers.{block}.{linear}", int(level.width)
            parts = {part.rpartition(".")[2]: tensors.pop(part) for part in [*tensors] if part.startswith(f"{name}.")}
            bias = parts.pop("bias", None)
            floats, module = READ[engine](parts, bits), model.get_submodule(name)
            was = module.weight.data
            steps = spread(parts.get("weight_scale", parts.get("scales")), was.shape[1])
            assert bool(((floats - was).abs() <= was.abs() * 2**-7 + steps * 2 ** (bits - 8)).all())
            was.copy_(floats)
            assert bias is None or torch.equal(bias, module.bias)
    for name, part in tensors.items():
        assert torch.equal(model.get_parameter(name), part)
    return model.float()


def by_mlx(folder: Path, ids: Tensor) -> Tensor:
    """Logits [texts, tokens, vocabulary] by mlx-lm."""
    there, _ = import_module("mlx_lm").load(str(folder))
    return torch.tensor(there(import_module("mlx.core").array(ids.tolist())).tolist())


@slow
@parametrize("dtype", ["float32", "bfloat16"])
@parametrize("engine", READ)
def test_engines_compute_what_was_measured(
    engine: str, dtype: str, ran: Path, tmp_path: Path, command: CommandLine
) -> None:
    words = "apply", "--config", ran / "tiny.best.json", "--dtype", dtype
    out, plain = tmp_path / "out", tmp_path / "plain"
    best = read_config(ran / "tiny.best.json")
    assert best.quantize is not None and len({level.width for level in best.plan.each_linear()}) > 1
    if engine == "mlx" and best.quantize.group_size == -1:
        refused = command(*words, "--out", out, "--format", engine)
        assert refused.code == 2 and "in groups of -1: set" in refused.error and not out.exists()
        return
    said = command.ok(*words, "--out", out, "--format", engine).out
    command.ok(*words, "--out", plain)
    command.ok("apply", "--verify", out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {name: part for file in out.glob("*.safetensors") for name, part in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(part.nbytes for part in tensors.values())
    model = as_computed(engine, out, plain)
    # Its perplexity is what was printed, and what the engine computes with.
    test = best.texts.test
    ids = torch.from_numpy(token_windows(test, ran / "model", ran).ids)  # type: ignore[arg-type]
    nlls = nlls_of(model, ids)
    measured = read_config(out / "atp_tune.json").final("test")
    assert measured is not None and f"perplexity on the test text: {measured}" in said
    assert measured.value == pytest.approx(math.exp(sum(nlls) / len(nlls)), rel=1e-4)
    if engine == "mlx":
        theirs = by_mlx(out, ids[:4])
    elif best.quantize.symmetric:
        with torch.inference_mode():
            theirs = AutoModelForCausalLM.from_pretrained(out)(ids[:4]).logits
    else:  # transformers 5.24 with compressed-tensors 0.20 loads no zero points: `compressed` has read it
        return
    with torch.inference_mode():
        ours = model(ids[:4]).logits
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=1e-4 if dtype == "float32" else 0.2)


@slow
def test_a_study_for_mlx(place: Path, command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command finds the bits of each linear, and writes the folder that mlx-lm reads; --packed still packs."""
    monkeypatch.chdir(place)
    make_model(make_tokenizer(), 100, intermediate=64).save_pretrained(place / "model")
    words = ("--format", "mlx", "--bpw", "4.5", "--preset", "quick", "--texts", "mixed", "--name", "own")
    few = [word for role in ("calibration", "validation", "test") for word in ("--set", f"texts.{role}.nsamples=4")]
    few += ["--trials", "4", "--set", "quantize.group_size=32"]  # of its 32 columns; scales take twice as many bits
    said = command.ok(place / "model", *words, *few, "--out", "out").out
    best = read_config(Path("studies/own.best.json"))
    assert best.quantize is not None and best.quantize.format == "mlx" and best.bits is not None
    assert "4 bits" in said and best.bits.target == 4
    assert best.bits.effective is not None and best.bits.nominal + 1 == pytest.approx(best.bits.effective)
    assert {level.width for level in best.plan.each_linear()} <= {2, 3, 4, 5, 6, 8}
    command.ok("apply", "--study", "own", "--out", "again")
    out, again = (
        {file.name: file.read_bytes() for file in Path(folder).glob("*.safetensors")} for folder in ("out", "again")
    )
    assert out == again and "quantization" in json.loads(Path("out/config.json").read_text())
    command.ok("apply", "--study", "own", "--out", "packed", "--packed")
    assert "quantization" not in json.loads(Path("packed/config.json").read_text())
    for given, said in (
        (("model", "--format", "mlx", "--bpw", "6", "--name", "own"), "size is mlx 4.5bpw there, and mlx 6bpw is ask"),
        (("model", "--format", "mlx", "--size", "1MB", "--texts", "mixed"), "--size: --format mlx takes bits a weight"),
        (("model", "--format", "mlx", "--bpw", "4", "--pruner", "wanda"), "--pruner: --format mlx rounds weights and"),
        (
            ("--study", "own", "--study-name", "odd", "--set", "quantize.group_size=48"),
            "quantize.format: mlx stores an nn.Linear in whole groups of inputs of 32, 64 or 128",
        ),
    ):
        answer = command(*given)
        assert answer.code == 2 and said in answer.error, given


@slow
@parametrize("family", ["qwen2", "qwen3", "phi3", "olmo2", "mistral", "gemma2"])
def test_families_as_mlx_lm_computes_them(family: str, place: Path, command: CommandLine) -> None:
    """Other positions than the defaults of mlx-lm, which knows no sliding windows of Mistral and Gemma 2."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    turns = {"rope_type": "default", "rope_theta": 5e4}
    more: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": turns, "sliding_window": 4096}
    more |= {"vocab_size": len(make_tokenizer()), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more))
    made.apply(lambda module: torch.nn.init.normal_(module.weight, std=0.2) if hasattr(module, "weight") else None)
    shutil.rmtree(place / "model")
    made.save_pretrained(place / "model")
    make_tokenizer().save_pretrained(place / "model")
    toml = STUDY.replace("sparsity = 0.6", 'bits = 4\nallocation = ["uniform"]').replace("trials = 3", "trials = 1")
    (place / "tiny.toml").write_text(toml + ROUNDED.format(32, "false"))
    command.ok("--study", place / "tiny.toml")
    for name, more_words in (("out", ("--format", "mlx")), ("plain", ())):
        command.ok("apply", "--config", place / "tiny.best.json", "--out", place / name, *more_words)
    model, ids = as_computed("mlx", place / "out", place / "plain"), torch.arange(5, 85).view(2, 40)
    with torch.inference_mode():
        ours = model(ids).logits
    torch.testing.assert_close(by_mlx(place / "out", ids), ours, rtol=0, atol=1e-3 * float(ours.abs().max()))
