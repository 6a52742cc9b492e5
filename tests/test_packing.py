"""Packed folders: the bits of the format, packing and unpacking, every way to load one, and damaged folders."""

import filecmp
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import ALL, MULTIMODAL, TOKENS, VOCABULARY, bench_of, few
from plans import planned
from safetensors.torch import load_file, save_file
from tinystudy import CommandLine
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    logging,
)

from atp_tune.checkpoints import convert
from atp_tune.checkpoints.convert import ABOUT, unpack_folder
from atp_tune.checkpoints.models import resolve
from atp_tune.config.study import ModelConfig
from atp_tune.errors import UserError
from atp_tune.folders.packing import pack_folder
from atp_tune.packed.layout import pack, zeros_of
from atp_tune.packed.modeling_atp_sparse import (
    BITMASK,
    SCALES,
    VALUES,
    DenseLinear,
    SparseLinear,
    speed_dense_linears,
    unpack,
)
from atp_tune.packed.registering import register
from atp_tune.search.objective import Record

REPO = Path(__file__).parents[1]
REPRESENTATIVES = ("llama-tied", "gpt2", "gpt_neox", "falcon", "mixtral", "llava")  # of ways in which weights are kept
KNOWN = {**{name: name for name in ALL}, **{name: name for name in MULTIMODAL}}
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    logging.set_verbosity_error()


def sparse_model(name: str, share: float = 0.6) -> Any:
    """A tiny random model of a family whose matrices, but for embeddings and head, have a share of zeros."""
    torch.manual_seed(0)
    if name in ALL:
        kind, settings = ALL[name]
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    else:
        text, tower, rest = MULTIMODAL[name]
        config = AutoConfig.for_model(name, text_config=text, vision_config=tower, **rest)
        model = AutoModelForImageTextToText.from_config(config)
    make_sparse(model.get_decoder() or model, share)
    return model.eval()


@torch.no_grad()
def make_sparse(model: Any, share: float) -> None:
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and not any(word in key for word in ("embed", "wte", "wpe", "word", "lm_head")):
            parameter[torch.rand_like(parameter) < share] = 0
            parameter.view(-1)[0] = -0.0


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes the sparse folder of a family in several shards and the packed one; returns the latter."""

    def made(name: str = "llama-tied", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        sparse_model(name).to(dtype).save_pretrained(tmp_path / "sparse", max_shard_size="40KB")
        pack_folder(tmp_path / "sparse", tmp_path / "packed", **options)
        return tmp_path / "packed"

    return made


def auto(name: str) -> Any:
    return AutoModelForCausalLM if name in ALL else AutoModelForImageTextToText


def logits(model: Any, variant: str = "torch") -> Tensor:
    """By torch's products with the unpacked weights, so that bits can be compared; `variant`: of the kernel, or ""."""
    ids = torch.randint(2, VOCABULARY - 7, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("ATP_TUNE_ISA", variant)
        choose_again(model)
        found: Tensor = model(input_ids=ids).logits
    choose_again(model)
    return found


def choose_again(model: Any) -> None:
    """Packed linears take a variant of the kernel when they are first used."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module._matrix = None


def bytes_of(folder: Path) -> int:
    """Bytes of all tensors of a folder."""
    files = [load_file(file) for file in folder.glob("*.safetensors")]
    return sum(tensor.nbytes for tensors in files for tensor in tensors.values())


def same_files(one: Path, other: Path) -> bool:
    names, others = ({file.name for file in folder.iterdir()} for folder in (one, other))
    _, wrong, errors = filecmp.cmpfiles(one, other, names, shallow=False)
    return names == others and not wrong and not errors


# the format


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_equals_packbits(columns: int, dtype: torch.dtype) -> None:
    dense = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
    dense[dense < 0.3] = 0
    dense[1], dense[2, 0] = 0, -0.0
    found = pack(dense, "same")
    kept = (dense != 0).numpy()
    kept[2, 0] = True
    assert np.array_equal(found[BITMASK].numpy(), np.packbits(kept, axis=-1, bitorder="little"))
    assert found[VALUES].tolist() == [
        float(w) for row, bits in zip(dense, kept, strict=True) for w in row[torch.tensor(bits)]
    ]
    again = unpack(found[VALUES], found[BITMASK], columns)
    integers = {2: torch.int16, 4: torch.int32}[dense.element_size()]
    assert torch.equal(again.view(integers), dense.view(integers))
    assert zeros_of(dense) == pytest.approx(1 - kept.mean())


@pytest.mark.parametrize("group_size", [None, 32, 96])
def test_int8_is_the_nearest_code_of_each_group(group_size: int | None) -> None:
    dense = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    dense[dense.abs() < 0.5] = 0
    dense[1] = 0
    found = pack(dense, "int8", group_size)
    groups = 2 if group_size == 32 else 1  # 96 does not divide 64: one for the row
    assert found[SCALES].shape == (3, groups)
    again = unpack(found[VALUES], found[BITMASK], 64, found[SCALES])
    for row in range(3):
        for column in range(64):
            group = dense[row].view(groups, -1)[column * groups // 64]
            step = float(group.abs().max()) / 127
            code = round(float(dense[row, column]) / step) if step else 0
            assert float(again[row, column]) == pytest.approx(code * step, rel=1e-6)


def test_bits_that_disagree_with_the_values_are_refused() -> None:
    found = pack(torch.eye(4, 9), "same")
    with pytest.raises(ValueError, match="3 values of 9 columns, but the bitmask has 4 bits"):
        unpack(found[VALUES][:3], found[BITMASK], 9)
    found[BITMASK][0, 1] |= 128  # behind the last column
    with pytest.raises(ValueError, match="has 5 bits"):
        unpack(torch.ones(5), found[BITMASK], 9)


@pytest.mark.slow
def test_the_reader_in_the_documentation(make: Make, tmp_path: Path) -> None:
    text = (REPO / "docs/formats.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json\n.*?)```", text, re.DOTALL)
    for options in ({}, {"kind": "int8", "group_size": 32}):
        shutil.rmtree(tmp_path / "packed", ignore_errors=True)
        folder = make("gpt2", **options)
        unpack_folder(folder, tmp_path / f"again{len(options)}")
        found: dict[str, Any] = {"sys": None}
        exec(code.replace("sys.argv[1]", repr(str(folder))), found)
        expected = {
            k: v for f in (tmp_path / f"again{len(options)}").glob("*.safetensors") for k, v in load_file(f).items()
        }
        assert found["tensors"].keys() == expected.keys()
        for name, tensor in expected.items():
            assert np.array_equal(found["tensors"][name], tensor.numpy()), name


# every family


@pytest.mark.parametrize("name", few(KNOWN, ("llama-tied", "mixtral")))
def test_a_family_is_packed_loaded_saved_and_unpacked(name: str, make: Make, tmp_path: Path) -> None:
    packed = make(name)
    sparse, load = tmp_path / "sparse", auto(name).from_pretrained
    expected = logits(load(sparse))
    model = load(packed)
    assert torch.equal(logits(model), expected)
    assert_close(logits(model, ""), expected, rtol=1e-4, atol=1e-5)
    table = json.loads((packed / "config.json").read_text())["atp_sparse"]
    kept = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert len(kept) == len(table["linears"]) and len(kept) + len(table["stored"]) >= 12
    assert type(model).__mro__[1] is type(load(sparse)) and model.config.model_type == load(sparse).config.model_type
    dense = load(packed, dequantize=True)
    assert type(dense) is type(load(sparse)) and torch.equal(logits(dense), expected)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)
    unpack_folder(packed, tmp_path / "unpacked")
    assert same_files(sparse, tmp_path / "unpacked")


def test_two_processes_unpack_one_folder_into_the_cache(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one takes what the other has written."""
    model, begin = ModelConfig(source=str(make())), convert._reader

    def late(*given: Any) -> Any:
        monkeypatch.setattr(convert, "_reader", begin)
        resolve(model, Path())
        return begin(*given)

    monkeypatch.setattr(convert, "_reader", late)
    folder = resolve(model, Path()).path
    assert [*folder.parent.iterdir()] == [folder]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_number_formats(dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    packed = make(dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert model.dtype == dtype
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"kind": "bf16"}, {"kind": "int8"}, {"kind": "int8", "group_size": 32}])
def test_rounded_values(options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    packed = make(**options)
    unpack_folder(packed, tmp_path / "unpacked")
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    assert rounded.dtype == torch.float32
    assert torch.equal(logits(model), logits(rounded))
    assert_close(logits(model, ""), logits(rounded), rtol=1e-4, atol=1e-5)
    assert not torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")))
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    assert linear.weight_values.dtype == (torch.int8 if options["kind"] == "int8" else torch.bfloat16)
    low = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    kept = [module for module in low.modules() if isinstance(module, SparseLinear)]
    assert {module.weight_values.dtype for module in kept} == {linear.weight_values.dtype}
    assert all(module.weight_scales is None or module.weight_scales.dtype == torch.float32 for module in kept)


def test_a_share_below_the_least_is_left_dense(tmp_path: Path) -> None:
    sparse_model("llama", 0.2).save_pretrained(tmp_path / "sparse")
    with pytest.raises(UserError, match="no matrix of it has 45% zeros"):
        pack_folder(tmp_path / "sparse", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", few(["llama-tied", "gpt2", "mixtral", "gpt_oss"], ["gpt2"]))
def test_a_trial_foretells_the_bytes_of_its_packed_folder(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Counted from its zeros and the headers of the dense files; the first block has too few zeros to be packed."""
    model = sparse_model(name, 0.0).to(dtype)
    for key, parameter in model.named_parameters():
        parameter.data += 0.1 * ("bias" in key)  # those of gpt_oss's experts are matrices, of zeros when they are new
    model.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    context = bench_of(model.float(), folder=tmp_path / "dense")
    record = Record(context)
    sparsities = (0.3, *([0.6] * (len(context.checkpoint.blocks) - 1)))
    for block in context.prune(planned("wanda", "uniform", sparsities)):
        record.block(block)
        for key, tensor in block.weights.items():
            context.checkpoint.blocks[block.index].get_parameter(key).data = tensor
    model.to(dtype).save_pretrained(tmp_path / "sparse", max_shard_size="40KB")
    pack_folder(tmp_path / "sparse", tmp_path / "packed")
    dense, packed = (bytes_of(tmp_path / folder) for folder in ("dense", "packed"))
    assert context.stored_bytes == (dense, dtype.itemsize)
    assert record.close()["packed_bytes"] == packed < dense


# ways to load it


@pytest.mark.slow
@pytest.mark.parametrize("other", [LlamaForCausalLM, AutoModel, AutoModelForImageTextToText])
def test_other_classes_refuse_it(other: Any, make: Make) -> None:
    with pytest.raises(
        (OSError, ValueError), match=r"no file named model\.safetensors|Unrecognized configuration class"
    ):
        other.from_pretrained(make())


LOADS = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
packed, out, trusts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
said = []
for number, trusted in enumerate(trusts):
    try:
        model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=trusted)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
        said.append("refused")
        continue
    ids = torch.randint(2, VOCABULARY - 7, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    save_file({"logits": model(input_ids=ids).logits.detach()}, f"{out}/{number}.safetensors")
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.save_pretrained(f"{out}/saved{number}")
    AutoModelForCausalLM.from_pretrained(f"{out}/saved{number}", trust_remote_code=trusted)
    said.append("loaded")
json.dump(said, open(f"{out}/said.json", "w"))
assert not {"optuna", "datasets"} & set(sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("import atp_tune; import transformers", ["loaded"] * 3),
        ("import transformers.models.auto.modeling_auto; import atp_tune", ["loaded"] * 3),
        ("import sys; sys.modules['atp_tune'] = None", ["refused", "refused", "loaded"]),
    ],
)
def test_with_and_without_atp_tune(lines: str, said: list[str], make: Make, tmp_path: Path) -> None:
    """In a process that has imported nothing; without trust in the folder's code first, then with it."""
    packed = make()
    words = [str(packed), str(tmp_path), json.dumps([False, None, True])]
    code = f"{lines}\nVOCABULARY, TOKENS = {VOCABULARY}, {TOKENS}{LOADS}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "said.json").read_text()) == said
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"))
    for number, word in enumerate(said):
        if word == "loaded":
            assert torch.equal(load_file(tmp_path / f"{number}.safetensors")["logits"], expected)


def test_a_device_map(make: Make, tmp_path: Path) -> None:
    packed = make()
    model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"})
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")))


@pytest.mark.slow
def test_tokens_one_by_one_are_the_dense_ones(make: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.randint(2, VOCABULARY - 7, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        one, other = (each(ids[:, :3]).logits for each in (model, dense))
    assert_close(one, other, rtol=1e-5, atol=1e-6)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize(("name", "options"), [("gpt2", {}), ("wide", {"kind": "int8", "group_size": 32})])
def test_few_tokens(name: str, options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    """By the kernel: with the bias of a `Conv1D`, and with scales of groups."""
    if name == "wide":
        config = {**ALL["llama"][1], "hidden_size": 64, "intermediate_size": 96}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config))
        make_sparse(model, 0.6)
        model.save_pretrained(tmp_path / "sparse")
        pack_folder(tmp_path / "sparse", tmp_path / "packed", **options)
    else:
        make(name)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")(ids).logits
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dequantize=True)(ids).logits
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients_reach_what_is_before_a_packed_linear(tokens: int, make: Make, tmp_path: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(make())
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.randint(2, 80, (1, tokens))
    for model in (found, wanted):
        model(ids, labels=ids).loss.backward()
    norms = [model.model.layers[0].input_layernorm.weight.grad for model in (found, wanted)]
    assert_close(*norms, rtol=1e-4, atol=1e-7)


def test_dense_linears_of_a_packed_model() -> None:
    """By the kernel only where torch would record nothing and cast nothing."""
    plain = torch.nn.Linear(128, 6)
    linear, x = deepcopy(plain), torch.randn(2, 128)
    speed_dense_linears(linear)
    assert type(linear) is DenseLinear
    for training in ((True, True), (True, False), (False, True)):
        for module in (linear, plain):
            module.weight.requires_grad, module.bias.requires_grad = training
            module.zero_grad()
            module(x).square().sum().backward()
        for found, wanted in zip(linear.parameters(), plain.parameters(), strict=True):
            assert (found.grad is None) == (wanted.grad is None)
            if found.grad is not None:
                assert_close(found.grad, wanted.grad)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, own in zip((linear.requires_grad_(False), plain.requires_grad_(False)), inputs, strict=True):
        module(own).square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x), plain(x)) and linear(x).dtype == torch.bfloat16


def test_bits_that_are_changed_in_place(make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make())
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    x = torch.randn(2, linear.in_features)
    with torch.no_grad():
        linear(x)
        linear.weight_bitmask.copy_(linear.weight_bitmask.flip(0))
        assert_close(linear(x), x @ linear.weight.T, rtol=1e-5, atol=1e-6)


def test_float64_is_multiplied_by_torch(make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make()).double()
    assert model(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float64


def test_a_model_without_memory(make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(kind="int8")).to("meta")
    assert next(model.to_empty(device="cpu").parameters()).device.type == "cpu"


def test_the_family_s_own_config_is_not_misled(make: Make) -> None:
    assert LlamaConfig.from_pretrained(make()).hidden_size == ALL["llama-tied"][1]["hidden_size"]


@pytest.mark.slow
def test_each_module_is_imported_first(make: Make, tmp_path: Path) -> None:
    """In a process of its own: the import that registers the model type is the one that brings transformers."""
    packed = make()
    lines = [
        "import atp_tune.packed.modeling_atp_sparse",
        "import atp_tune.packed.layout",
        "from pathlib import Path; from atp_tune.checkpoints.convert import unpack_folder; "
        f"unpack_folder(Path({str(packed)!r}), Path({str(tmp_path / 'unpacked')!r}))",
    ]
    for line in lines:
        code = f"{line}; from transformers import CONFIG_MAPPING; assert 'atp_sparse' in CONFIG_MAPPING"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert same_files(tmp_path / "sparse", tmp_path / "unpacked")


def test_without_the_kernel_torch_multiplies(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATP_TUNE_ISA", "torch")
    model = AutoModelForCausalLM.from_pretrained(make())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, dense(ids).logits)


def test_a_copy_has_weights_of_its_own(make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make())
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    copy = deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(VALUES):
                parameter.zero_()
    assert torch.equal(copy(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", few(REPRESENTATIVES, ("llama-tied",)))
def test_it_is_pickled(name: str, make: Make) -> None:
    auto = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    found = auto.from_pretrained(make(name))
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is type(found) and type(again.config) is type(found.config)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(ids).logits, found(ids).logits)


UNPICKLE = """
import pickle, sys
import torch
model = pickle.load(open(sys.argv[1], "rb"))
with torch.inference_mode():
    torch.save(model(torch.tensor([[5, 6, 7]])).logits, sys.argv[2])
"""


@pytest.mark.slow
def test_a_process_that_has_imported_nothing_unpickles_it(make: Make, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make())
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    files = [str(tmp_path / name) for name in ("pickled", "logits")]
    subprocess.run([sys.executable, "-c", UNPICKLE, *files], check=True)
    with torch.inference_mode():
        assert torch.equal(torch.load(files[1]), model(torch.tensor([[5, 6, 7]])).logits)


def test_weights_that_are_loaded_into_it(make: Make, tmp_path: Path) -> None:
    """The kernel keeps where the values of each row start, which other bits change."""
    model = AutoModelForCausalLM.from_pretrained(make())
    linear = next(module for module in model.modules() if isinstance(module, SparseLinear))
    x = torch.randn(2, linear.in_features)
    linear(x)
    state = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    state["weight_bitmask"] = state["weight_bitmask"].flip(0)
    linear.load_state_dict(state)
    assert_close(linear(x), x @ linear.weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"kind": "int8"}])
def test_a_model_is_cast(options: dict[str, Any], make: Make) -> None:
    """And the kernel, which knew the weights by their addresses, takes the new ones."""
    ids = torch.tensor([[5, 6, 7]])
    folder = make(**options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    scales = [module.weight_scales for module in model.modules() if isinstance(module, SparseLinear)]
    kept = [None if one is None else one.clone() for one in scales]
    with torch.inference_mode():
        model(ids)
        for dtype in (torch.bfloat16, torch.float32):
            model.to(dtype)
            plain = AutoModelForCausalLM.from_pretrained(folder, dequantize=True).to(torch.bfloat16).to(dtype)
            one, other = model(ids).logits.float(), plain(ids).logits.float()
            loose = dtype == torch.bfloat16 or options  # the dense one's rounded weights are rounded again
            assert float((one - other).abs().max() / other.abs().max()) < (0.03 if loose else 1e-5)
    after = [module.weight_scales for module in model.modules() if isinstance(module, SparseLinear)]
    assert all(one is None or torch.equal(one, other) for one, other in zip(kept, after, strict=True))


@pytest.mark.slow
def test_compiled_as_one_graph(make: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(make())
    found = next(module for module in model.modules() if isinstance(module, SparseLinear))
    assert not any(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(1, 3, found.in_features)
    for linear in (found, deepcopy(found)):
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        with torch.inference_mode():
            assert torch.equal(compiled(x), linear(x))


# folders that are damaged, or a stranger's


def edited(folder: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    table = json.loads((folder / name).read_text())
    change(table)
    (folder / name).write_text(json.dumps(table))


def first(table: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(table["atp_sparse"]["linears"].values()))
    return found


def changed_tensor(folder: Path, end: str, change: Callable[[Tensor], Tensor | None]) -> None:
    file = next(file for file in sorted(folder.glob("*.safetensors")) if any(k.endswith(end) for k in load_file(file)))
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.endswith(end))
    if (new := change(tensors.pop(name))) is not None:
        tensors[name] = new
    save_file(tensors, file, metadata={"format": "pt"})


def flipped(mask: Tensor) -> Tensor:
    mask[0, 0] ^= 1
    return mask


WRONG: list[tuple[str, Callable[[Path], None], str]] = [
    ("version", lambda f: edited(f, lambda t: t["atp_sparse"].update(version=3)), "version 1 or 2"),
    ("no table", lambda f: edited(f, lambda t: t.pop("atp_sparse")), "version 1"),
    ("another count", lambda f: edited(f, lambda t: first(t).update(nonzeros=5)), "its files have no"),
    ("another shape", lambda f: edited(f, lambda t: first(t).update(shape=[8, 8])), r"no linear of shape \[8, 8\]"),
    (
        "another name",
        lambda f: edited(f, lambda t: t["atp_sparse"]["linears"].update({"x.weight": first(t)})),
        "no linear x",
    ),
    ("bits", lambda f: changed_tensor(f, BITMASK, flipped), "but the bitmask has"),
    ("missing values", lambda f: changed_tensor(f, VALUES, lambda _: None), "its files have no"),
    ("cut values", lambda f: changed_tensor(f, VALUES, lambda t: t[:-1].clone()), "its files have no"),
]


@pytest.mark.parametrize(("change", "said"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_damaged_folder_is_not_loaded(change: Callable[[Path], None], said: str, make: Make) -> None:
    folder = make()
    change(folder)
    with pytest.raises(ValueError, match=said):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_cut_file_is_not_loaded(make: Make) -> None:
    file = sorted((folder := make()).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(Exception, match=r"[Ii]ncomplete|[Ii]nvalid|buffer"):
        AutoModelForCausalLM.from_pretrained(folder)


DAMAGED: list[tuple[str, Callable[[Path], None], str]] = [
    ("a value", lambda f: changed_tensor(f, VALUES, lambda t: t + 1), "is not what was packed"),
    ("bits", lambda f: changed_tensor(f, BITMASK, flipped), "but the bitmask has"),
    ("another tensor", lambda f: changed_tensor(f, "norm.weight", lambda t: t + 1), "is not what was packed"),
    ("missing", lambda f: changed_tensor(f, VALUES, lambda _: None), "has no tensor"),
    ("no list", lambda f: edited(f, lambda t: t["atp_sparse"].pop("stored")), "is damaged"),
    ("no values", lambda f: edited(f, lambda t: t["atp_sparse"].pop("values")), "is damaged"),
    ("no class", lambda f: edited(f, lambda t: t["atp_sparse"].pop("class")), "is damaged"),
    ("a list", lambda f: edited(f, lambda t: t["atp_sparse"].update(linears=[])), "is damaged"),
    ("no shape", lambda f: edited(f, lambda t: first(t).pop("shape")), "is damaged"),
    ("an empty shape", lambda f: edited(f, lambda t: first(t).update(shape=[])), "is damaged"),
    ("a large shape", lambda f: edited(f, lambda t: first(t).update(shape=[10**9, 10**9])), "is not of"),
    ("a word", lambda f: edited(f, lambda t: first(t).update(shape=[24, "24"])), "is damaged"),
    ("floating bits", lambda f: changed_tensor(f, BITMASK, lambda t: t.float()), "is not of"),
    ("the folder above", lambda f: edited(f, lambda t: t["added"].append(".."), ABOUT), "is not what `pack` writes"),
    ("outside", lambda f: edited(f, lambda t: t["files"].update({"../x": ""}), ABOUT), "is not what `pack` writes"),
    (
        "a header",
        lambda f: edited(f, lambda t: t["headers"].update({next(iter(t["headers"])): "{"}), ABOUT),
        "safetensors",
    ),
]


@pytest.mark.parametrize(("change", "said"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_a_damaged_folder_is_not_unpacked(
    change: Callable[[Path], None], said: str, make: Make, tmp_path: Path
) -> None:
    folder = make()
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        unpack_folder(folder, tmp_path / "unpacked")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "unpacked").exists() and not (tmp_path.parent / "x").exists()


def test_a_damaged_rounded_folder_is_not_unpacked(make: Make, tmp_path: Path) -> None:
    folder = make(kind="int8")
    changed_tensor(folder, "norm.weight", lambda t: t + 1)
    with pytest.raises(UserError, match="is not what was packed"):
        unpack_folder(folder, tmp_path / "unpacked")
    folder = make_again(tmp_path, kind="int8")
    changed_tensor(folder, SCALES, lambda t: t[:-1].clone())
    with pytest.raises(UserError, match=r"scales .* are not of"):
        unpack_folder(folder, tmp_path / "unpacked")


def make_again(tmp_path: Path, **options: Any) -> Path:
    shutil.rmtree(tmp_path / "packed")
    pack_folder(tmp_path / "sparse", tmp_path / "packed", **options)
    return tmp_path / "packed"


def test_small_files_keep_their_bytes(make: Make, tmp_path: Path) -> None:
    make()
    (tmp_path / "sparse" / "README.md").write_bytes(b"# a\r\nb \xe9\r\n")
    unpack_folder(make_again(tmp_path), tmp_path / "unpacked")
    assert same_files(tmp_path / "sparse", tmp_path / "unpacked")


@pytest.mark.slow
def test_what_a_model_saved_is_unpacked(make: Make, tmp_path: Path) -> None:
    for options in ({}, {"kind": "int8"}):
        make("gpt2") if not options else make_again(tmp_path, **options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
        expected = logits(model)
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        shutil.rmtree(tmp_path / "unpacked", ignore_errors=True)
        model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
        unpack_folder(tmp_path / "saved", tmp_path / "unpacked")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
        assert type(plain).__name__ == "GPT2LMHeadModel" and not list((tmp_path / "unpacked").glob("*.py"))
        assert_close(logits(plain), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_packed_is_refused(make: Make, tmp_path: Path) -> None:
    packed = make()
    cases = [(packed, "is packed already"), (tmp_path, "holds no config.json"), (tmp_path / "x", "is no folder")]
    for source, said in cases:
        with pytest.raises(UserError, match=said):
            pack_folder(source, tmp_path / "out")
    with pytest.raises(UserError, match="is no packed folder"):
        unpack_folder(tmp_path / "sparse", tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        pack_folder(tmp_path / "sparse", packed)
    assert not (tmp_path / "out").exists()


# in the rest of the program


def test_other_commands_take_a_packed_folder(make: Make, tmp_path: Path) -> None:
    packed = make()
    said: list[str] = []
    sparse, found = (
        resolve(ModelConfig(source=str(folder)), tmp_path, said.append) for folder in (tmp_path / "sparse", packed)
    )
    assert found.content == sparse.content and found.path != sparse.path
    assert same_files(sparse.path, found.path)
    assert said == [f"unpacking {packed}, once"]


@pytest.mark.slow
def test_the_commands(done: Path, command: CommandLine) -> None:
    assert command("apply", "--config", done / "tiny.best.json", "--out", done / "sparse").code == 0
    answer = command("pack", done / "sparse", "--out", done / "packed")
    assert answer.code == 0 and "linears" in answer.out and "load it: import atp_tune" in answer.out
    assert command("apply", "--verify", done / "packed").code == 0
    card, packed_card = ((done / name / "README.md").read_text() for name in ("sparse", "packed"))
    of_dense_files = ("**The zeros are stored in dense files. By themselves", "No other library is needed.")
    of_packed = (
        "## Packed",
        "**The zeros are not stored**",
        "It needs `import atp_tune` before it, or `trust_remote_code",
    )
    assert all(words in card and words not in packed_card for words in of_dense_files)
    assert all(words in packed_card and words not in card for words in of_packed)
    again = "apply --config atp_tune.json --out DIR"
    assert f"{again}\n" in card and f"{again} --packed\n" in packed_card
    assert command("unpack", done / "packed", "--out", done / "again").code == 0
    assert same_files(done / "sparse", done / "again")
    assert command("apply", "--config", done / "tiny.best.json", "--out", done / "direct", "--packed").code == 0
    for file in (done / "packed").glob("*.safetensors"):
        assert file.read_bytes() == (done / "direct" / file.name).read_bytes()
    assert not [path for path in done.iterdir() if path.name.startswith(".")]
    answer = command("pack", done / "sparse", "--out", done / "rounded", "--values", "int8")
    assert re.search(r"perplexity on the test text: \S+ ± \S+ before rounding, \S+ ± \S+ after", answer.out)
    assert "before rounding" in (done / "rounded" / "README.md").read_text()
    answer = command("pack", done / "sparse", "--out", done / "x", "--group-size", "64")
    assert answer.code == 2 and "only with --values int8" in answer.err
