import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantizing as q
import torch
import transformers
from expect import parametrize, refusal, refused, slow
from families import DEEPSEEK, MIXTURE, few, same_bits
from packaging.version import Version
from quantizing import as_fp8, as_int8, as_metal, as_mxfp4, fp8_table
from tinystudy import CommandLine, make_tokenizer, run
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from atp_tune.checkpoints import files
from atp_tune.checkpoints.blocks import find_linears
from atp_tune.checkpoints.checkpoint import Checkpoint
from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config import study
from atp_tune.utils.system import install

CPU = torch.device("cpu")
READS = Version(transformers.__version__) >= Version("5.24")  # these formats itself, on a CPU, to the same numbers
KINDS = {
    "gpt_oss": {**MIXTURE, "hidden_size": 32, "intermediate_size": 64, "num_local_experts": 3, "head_dim": 8},
    "deepseek_v3": DEEPSEEK,
    "qwen3": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip


def dense(place: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """A folder with a tiny random model and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    options = {**KINDS[kind], "vocab_size": len(tokenizer), "dtype": dtype, **more}
    folder = place / "dense"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def found(folder: Path, notes: list[str] | None = None) -> ModelFolder:
    return resolve(study.ModelConfig(source=str(folder)), Path(), [].append if notes is None else notes.append)


def check_same(folder: Path, expected: Path, dtype: torch.dtype) -> None:
    """An ordinary folder, equal to another to the last bit, in its files and as it is loaded."""
    assert "quantization" not in (folder / "config.json").read_text()
    have, want = q.read(folder), q.read(expected)
    assert have.keys() == want.keys()
    assert all(same_bits(have[name], want[name].to(have[name].dtype)) for name in want)
    assert {tensor.dtype for tensor in have.values()} == {dtype}
    ours, theirs = (Checkpoint.load(path, dtype, CPU).model.state_dict() for path in (folder, expected))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def as_transformers_reads(folder: Path, dtype: torch.dtype, **how: Any) -> dict[str, torch.Tensor]:
    """Without a GPU it dequantizes FP8 by itself."""
    loaded: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).state_dict()
    return loaded


# Read back


@slow
@parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.bfloat16]))
@parametrize(
    ("tile", "table", "suffix", "bytes_"),
    [
        ((16, 16), fp8_table((16, 16)), ".weight_scale_inv", False),
        ((20, 12), fp8_table((20, 12)), ".weight_scale_inv", False),
        ((128, 128), fp8_table((128, 128), activation_scheme="static"), ".weight_scale_inv", False),
        ((128, 128), {"quant_method": "fp8"}, ".weight_scale", False),
        ((1, 128), {"quant_method": "fp8", "weight_block_size": None}, ".qscale_weight", False),
        ((16, 16), fp8_table((16, 16), modules_to_not_convert=["lm_head"]), ".scale", False),
        ((1, 32), fp8_table((1, 32), quant_method="mxfp8", scale_fmt="ue8m0"), ".weight_scale_inv", True),
    ],
    ids=["tiles", "cut tiles", "one tile", "weight_scale", "rows", "scale", "mxfp8"],
)
def test_fp8(
    tile: tuple[int, int], table: dict[str, Any], suffix: str, bytes_: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    notes: list[str] = []
    how = as_fp8(tile, table, suffix, bytes_, dtype)
    source, plain = q.pair(dense(tmp_path, "qwen3", dtype), how)
    folder = found(source, notes)
    check_same(folder.path, plain, dtype)
    assert found(source, notes) == folder
    assert notes == [f"dequantizing {source} from {table['quant_method']}, once"]
    assert (folder.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    # transformers 5.24 takes 64 rows in tiles of 20 for four tiles of 16, and leaves out what is called weight_scale
    if tile != (20, 12) and suffix != ".weight_scale" and READS:
        theirs = as_transformers_reads(source, dtype)
        ours = Checkpoint.load(folder.path, dtype, CPU).model.state_dict()
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_scales_may_lie_in_another_file(tmp_path: Path) -> None:
    source, plain = q.pair(dense(tmp_path, "qwen3"), as_fp8((16, 16), fp8_table((16, 16)), dtype=torch.bfloat16))
    tensors = q.read(source)
    parts = {"a.safetensors": [], "b.safetensors": []}  # type: dict[str, list[str]]
    for name in tensors:
        parts["b.safetensors" if name.endswith("scale_inv") or "layers.1" in name else "a.safetensors"].append(name)
    (source / "model.safetensors").unlink()
    for file, names in parts.items():
        q.save_file({name: tensors[name] for name in names}, source / file, {"format": "pt"})
    places = {name: file for file, names in parts.items() for name in names}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    folder = found(source).path
    check_same(folder, plain, torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) == 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: places[name] for name in q.read(plain)}


@slow
def test_a_mixture_of_fp8_experts(tmp_path: Path) -> None:
    """DeepSeek's form; its 12 rows of `kv_a_proj_with_mqa` are no multiple of a tile, as the 576 of the real one."""
    source, plain = q.pair(dense(tmp_path, "deepseek_v3"), as_fp8((8, 8), fp8_table((8, 8)), dtype=torch.bfloat16))
    assert sum(".experts." in name and name.endswith("_scale_inv") for name in q.read(source)) == 2 * 4 * 3
    check_same(found(source).path, plain, torch.bfloat16)


@slow
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4(dtype: torch.dtype, tmp_path: Path) -> None:
    source, plain = q.pair(dense(tmp_path, "gpt_oss", dtype), as_mxfp4)
    folder = found(source)
    check_same(folder.path, plain, dtype)
    if READS:  # with the package `kernels`, which 5.25 brings along, it takes a kernel from the hub unless told so
        theirs = as_transformers_reads(source, dtype, quantization_config=Mxfp4Config(dequantize=True))
        ours = Checkpoint.load(folder.path, dtype, CPU).model.state_dict()
        assert all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_experts_of_four_bits_in_an_fp8_folder(tmp_path: Path) -> None:
    """Two inputs a byte, a power of two for 32 of them."""
    source, plain = q.pair(dense(tmp_path, "qwen3"), as_fp8((16, 16), fp8_table((16, 16)), dtype=torch.bfloat16))
    name = "model.layers.1.mlp.up_proj.weight"
    blocks, scales = q.mxfp4(q.read(plain)[name].T[None])
    tensors = {**q.read(source), name: blocks[0].flatten(-2).view(torch.int8), f"{name}_scale_inv": scales[0]}
    q.write(source, tensors, fp8_table((16, 16), expert_dtype="fp4"))
    q.write(plain, {**q.read(plain), name: q.from_mxfp4(blocks, scales)[0].T.bfloat16()}, None)
    check_same(found(source).path, plain, torch.bfloat16)


def test_int8_that_is_sorted_for_a_gpu(tmp_path: Path) -> None:
    source, _ = q.pair(dense(tmp_path, "qwen3"), as_int8)
    table = json.loads((source / "config.json").read_text())["quantization_config"]
    sorted_ = {"model.layers.0.mlp.up_proj.weight_format": torch.tensor(2, dtype=torch.uint8)}
    q.write(source, {**q.read(source), **sorted_}, table)
    with refused(r"up_proj\.weight in a form that is not known: sorted for one kind of GPU"):
        found(source)


@parametrize(("bits", "group"), [(4, 16), (8, 32), (2, 16)])
def test_metal(bits: int, group: int, tmp_path: Path) -> None:
    source, plain = q.pair(dense(tmp_path, "qwen3", torch.float32), as_metal(bits, group))
    check_same(found(source).path, plain, torch.float32)


def damaged(tensors: q.Tensors, how: str) -> q.Tensors:
    name = "model.layers.0.mlp.up_proj.weight"
    match how:
        case "no scale":
            tensors.pop(name + "_scale_inv")
        case "no weight":
            tensors.pop(name)
        case "too few":
            tensors[name + "_scale_inv"] = tensors[name + "_scale_inv"][:-1].clone()
        case "integers":
            tensors[name] = tensors[name].to(torch.int8)
        case "shape":
            tensors[f"{name}.absmax"] = tensors.pop(name + "_scale_inv")
        case "bytes":
            tensors[name] = tensors[name].view(torch.uint8)
        case "words":
            tensors.pop(name + "_scale_inv")
            tensors[name] = tensors[name].to(torch.int32)
        case "unknown":
            tensors["model.layers.0.mlp.up_proj.codes"] = torch.ones(3, dtype=torch.uint8)
    return tensors


@parametrize(
    ("how", "said"),
    [
        ("no scale", r"has model\.layers\.0\.mlp\.up_proj\.weight as F8_E4M3 without its scales$"),
        ("no weight", r"has scales \(model\.layers\.0\.mlp\.up_proj\.weight_scale_inv\) without their weights$"),
        ("too few", r"up_proj\.weight in a form that is not known: 5 scales for 96 values$"),
        ("integers", r"up_proj\.weight in a form that is not known: 8-bit integers$"),
        ("bytes", r"up_proj\.weight in a form that is not known: codes of uint8$"),
        ("words", r"has model\.layers\.0\.mlp\.up_proj\.weight as I32 without its scales$"),
        ("shape", r"up_proj\.weight in a form that is not known: no quant_state, or several$"),
        ("unknown", r"has model\.layers\.0\.mlp\.up_proj\.codes as U8 without its scales$"),
    ],
)
def test_what_does_not_belong_together_is_one_line(how: str, said: str, tmp_path: Path, cache: Path) -> None:
    source, _ = q.pair(dense(tmp_path, "qwen3"), as_fp8((16, 16), fp8_table((16, 16))))
    q.write(source, damaged(q.read(source), how), fp8_table((16, 16)))
    with refused(said):
        found(source)
    assert list((cache / "models").glob("*/*")) == []


# By packages that need not be there


def is_here(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


NESTED = {"bnb_4bit_use_double_quant": True}


@pytest.mark.skipif(not is_here("bitsandbytes"), reason="needs bitsandbytes")
@parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", **NESTED},
    ],
)
def test_what_bitsandbytes_itself_reads_back(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows of 64 or 128: bitsandbytes 0.50 takes others wrongly on a CPU where they are no multiple of a block."""
    from transformers import BitsAndBytesConfig

    folder, source = dense(tmp_path, "qwen3", intermediate_size=128), tmp_path / "quantized"
    shutil.copytree(folder, source)
    asked = {"quantization_config": BitsAndBytesConfig(**options), "device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    AutoModelForCausalLM.from_pretrained(folder, **asked).save_pretrained(source)
    have = q.read(found(source).path)
    theirs = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cpu"}).dequantize().state_dict()
    assert have.keys() == q.read(folder).keys()
    for name in filter(q.is_linear, have):
        assert have[name].dtype == torch.bfloat16
        torch.testing.assert_close(have[name], theirs[name], atol=2**-12, rtol=2**-6)  # it rounds on the way
    Checkpoint.load(found(source).path, torch.bfloat16, CPU)


def as_compressed(folder: Path, tensors: q.Tensors, form: str, arguments: dict[str, Any]) -> q.Tensors:
    """Integers of four bits for groups of 32 inputs, eight a word, from 8 up; or FP8 by rows."""
    codes, numbers = dict(tensors), dict(tensors)
    for name in filter(q.is_linear, tensors):
        module, weight = name.removesuffix(".weight"), tensors[name].float()
        if form == "float-quantized":
            scale = (weight.abs().amax(-1, keepdim=True) / 448).bfloat16()
            codes |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}
            numbers[name] = (codes[name].bfloat16() * scale).bfloat16()
            continue
        grouped = weight.unflatten(-1, (-1, 32))
        scale = (grouped.abs().amax(-1) / 7).bfloat16()
        whole = (grouped / scale[..., None]).round().clamp(-8, 7).int()
        words = (whole.flatten(-2) + 8).unflatten(-1, (-1, 8)).long()
        packed = torch.stack([words[..., k] << 4 * k for k in range(8)], -1).sum(-1)
        packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
        del codes[name]
        shape = torch.tensor(weight.shape)
        codes |= {f"{module}.weight_packed": packed, f"{module}.weight_scale": scale, f"{module}.weight_shape": shape}
        numbers[name] = (whole.bfloat16() * scale[..., None]).flatten(-2)
    group = {"targets": ["Linear"], "weights": arguments, "format": form}
    q.write(folder, codes, {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
                            "config_groups": {"group_0": group}, "ignore": ["lm_head"]})  # fmt: skip
    return numbers


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


@slow
@pytest.mark.skipif(not is_here("compressed_tensors"), reason="needs compressed-tensors")
@pytest.mark.skipif(not READS, reason="this transformers leaves scales in the model, which is refused")
@parametrize(("form", "arguments"), [("pack-quantized", INT4), ("float-quantized", FP8)])
def test_compressed_tensors(form: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    source, plain = q.pair(
        dense(tmp_path, "qwen3"), lambda folder, tensors: as_compressed(folder, tensors, form, arguments)
    )
    check_same(found(source).path, plain, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    table = json.loads((source / "config.json").read_text())["quantization_config"]
    codes = q.read(source)
    q.write(source, {**codes, f"{name}_g_idx": torch.zeros(64, dtype=torch.int32)}, table)
    with refused(r"has .*up_proj\.weight_g_idx, which transformers leaves out when"):
        found(source)
    q.write(source, {key: value for key, value in codes.items() if key != f"{name}_scale"}, table)
    with refused(r"up_proj\.weight.* without its scales; download it again$"):
        found(source)


@pytest.mark.skipif(not is_here("compressed_tensors"), reason="needs compressed-tensors")
@parametrize(
    ("more", "said"),
    [
        ({"transform_config": {"config_groups": {}, "x": 1}}, r"with rotations \(transform_config\)"),
        ({"config_groups": {"a": {}, "b": {}}}, r"in 2 ways at once \(config_groups\)"),
    ],
)
def test_what_transformers_would_read_wrongly(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with refused(said):
        files.find_method(said_only(tmp_path, {"quant_method": "compressed-tensors", **more}), "it")


# Refused


def said_only(place: Path, table: Any, **config: Any) -> Path:
    """A folder of which only the config is there."""
    folder = place / "said"
    folder.mkdir(parents=True)
    said = {"model_type": "llama", "quantization_config": table, **config}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


REFUSED = [
    *(method for method in AUTO_QUANTIZATION_CONFIG_MAPPING if method not in (*files.BY_TENSOR, *files.BY_MODEL)),
    "never_heard_of",
]


@slow
def test_other_methods_are_refused_by_their_config_alone(place: Path, command: CommandLine) -> None:
    """No weights are there: nothing of them was looked at."""
    for method in REFUSED:
        folder = said_only(place / method, {"quant_method": method})
        said = command("--study", place / "tiny.toml", "--set", f"model.source={folder}").error
        assert said.startswith(f'model.source: {folder} is quantized by "{method}", which cannot be dequantized')
        assert said.endswith("give the checkpoint that it was made from")
        assert not (place / "tiny.db").exists()


@parametrize(
    ("table", "said"),
    [
        ({"quant_method": "compressed-tensors"}, '"compressed-tensors", and compressed-tensors is needed '
         f"to read it: {install('quantized')}, or give the checkpoint that it was made from"),
        ({"quant_method": "bitsandbytes"}, 'by "bitsandbytes", which cannot be dequantized'),
        ({"quant_method": "a\nb" + 99 * "c"}, 'by "a b' + 37 * "c" + '", which cannot'),
        ({"quant_method": ["fp8"]}, """by "['fp8']", which cannot be dequantized"""),
        ({"bits": 4}, 'by "an unnamed method", which cannot be dequantized'),
        ({}, 'by "an unnamed method", which cannot be dequantized'),
    ],
)  # fmt: skip
def test_each_other_reason_is_one_line(table: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    assert said in refusal(found, said_only(tmp_path, table))


@parametrize(
    ("key", "value"),
    [
        ("compression_config", {"config_groups": {}, "quant_method": "compressed-tensors"}),
        ("compression_config", {"quantization_config": {}}),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("quantize_config.json", None),
        ("quant_config.json", None),
        ("hf_quant_config.json", None),
    ],
)
def test_where_transformers_does_not_look(key: str, value: Any, tmp_path: Path) -> None:
    folder = said_only(tmp_path, None, **({key: value} if value else {}))
    if not value:
        (folder / key).write_text("{}")
    with refused(rf"is quantized, as its {key} says, in a form that transformers does not read"):
        found(folder)


def test_codes_of_which_the_config_says_nothing(tmp_path: Path) -> None:
    """Weights that were cast to FP8 as they are, without a scale, are numbers as others."""
    source, _ = q.pair(dense(tmp_path, "qwen3"), as_fp8((16, 16), fp8_table((16, 16))))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(files.without_quantization(config)))
    with refused(r"holds .*\.weight as F8_E4M3 with a scale beside it \(.*\), but its config"):
        found(source)
    q.write(source, {k: v for k, v in q.read(source).items() if not k.endswith("_scale_inv")}, None)
    assert found(source).path == source


def test_quantized_pickles_are_refused(tmp_path: Path) -> None:
    folder = said_only(tmp_path, {"quant_method": "fp8"})
    torch.save({}, folder / "pytorch_model.bin")
    with refused("has quantized weights in pickles, which is not supported; take safetensors"):
        resolve(study.ModelConfig(source=str(folder), allow_pickle=True), Path())


def test_a_folder_that_is_loaded_is_in_full_numbers(tmp_path: Path) -> None:
    with refused('is quantized by "gptq"; give the checkpoint'):
        Checkpoint.load(said_only(tmp_path, {"quant_method": "gptq"}), torch.float32, CPU)


# What is pruned is the matrix that is multiplied by


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("scale", torch.ones(1))


class Packed(torch.Tensor):
    pass


def odd(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@parametrize(
    ("linear", "said"),
    [
        (lambda: FP8Linear(4, 4, (2, 2)), r"module FP8Linear: 0\.weight is a Parameter of float8_e4m3fn"),
        (Scaled, r"module Scaled: 0\.weight has scale beside it"),
        (lambda: odd(torch.ones(4, 4, dtype=torch.uint8)), r"0\.weight is a Parameter of uint8"),
        (lambda: odd(torch.ones(4, 4).as_subclass(Packed)), r"0\.weight is a Packed of float32"),
    ],
)
def test_linears_of_other_kinds_are_refused(linear: Callable[[], nn.Linear], said: str) -> None:
    with refused(said):
        find_linears(nn.Sequential(linear()))


# From end to end


@pytest.fixture
def both(place: Path) -> tuple[Path, Path]:
    """Two places with the same study: of a model in FP8, and of the same numbers in an ordinary folder."""
    (place / "model").rename(place / "dense")
    quantized_, plain = q.pair(place / "dense", as_fp8((20, 20), fp8_table((20, 20))))
    other = place.parent / "other"
    shutil.copytree(place, other)
    quantized_.rename(place / "model")
    (other / "plain").rename(other / "model")
    assert plain.exists()
    return place, other


@slow
def test_a_study_and_its_sparse_folder_are_those_of_the_plain_numbers(
    both: tuple[Path, Path], command: CommandLine
) -> None:
    values, folders = [], []
    for place in both:
        study_ = run(place, "search.trials=2")
        values.append([trial.value for trial in study_.get_trials(deepcopy=False)])
        out = place / "sparse"
        command.ok("apply", "--config", place / "tiny.best.json", "--out", out)
        folders.append(out)
    assert values[0] == values[1]
    have, want = map(q.read, folders)
    assert have.keys() == want.keys()
    assert all(same_bits(have[name], want[name]) for name in want)
    assert sum(int((have[name] == 0).sum()) for name in filter(q.is_linear, have)) > 1000
    assert "quantization" not in (folders[0] / "config.json").read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(folders[0], output_loading_info=True)
    assert not info["missing_keys"]
    assert type(loaded.model.layers[0].mlp.up_proj) is nn.Linear
